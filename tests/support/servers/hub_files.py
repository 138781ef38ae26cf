"""Files of the repositories that tests serve."""

from __future__ import annotations

#: Files of the repositories beside the model, none of which is to be fetched.
CLUTTER = {
    "README.md": b"# A model",
    ".gitattributes": b"*.bin filter=lfs",
    "own.py": b"raise SystemExit",
    "pytorch_model.bin": b"a pickle",
    "pytorch_model.bin.index.json": b"{}",
    "training_args.bin": b"a pickle",
    "model.Q4_K_M.gguf": b"GGUF",
    "consolidated.safetensors": b"the same in another form",
    "onnx/model.onnx": b"the same in another form",
    "onnx/config.json": b"{}",
    "original/params.json": b"{}",
    "original/model.safetensors": b"the same in another form",
    "custom_generate/generate.py": b"raise SystemExit",
}
NEEDED = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
