"""Batchmill: files of prompts into files of answers, by quantized models on your own GPUs.

Its rooms are links to the folders at the top of the repository; see `docs/development` for why.
"""
