"""Batchmill: files of prompts into files of answers, by quantized models on your own GPUs.

Its rooms lie at the top of the repository and are linked here, so that everything is imported as `batchmill.*`: a wheel
puts nothing else into site-packages, and no `jobs` or `worker` of a user's is taken for ours, or ours for theirs.
"""
