"""LoRA adapters beside a loaded model: the options of their folders, and their low-rank weights on its devices.

The engines assign rows of a batch to adapters.
"""
