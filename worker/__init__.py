"""Everything that touches a device: the only room that imports torch and transformers."""
