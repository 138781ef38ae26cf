"""LoRA adapters beside a loaded model: what their folders may ask for, and their low-rank weights on its devices.

Which rows of a batch use which adapter is the engines' matter.
"""
