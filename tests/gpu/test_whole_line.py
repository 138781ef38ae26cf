"""The whole line on a CUDA device: submit to results, with the peak VRAM of each quantization recorded and sane."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from batchmill.worker.demo.corpus import held_out_additions
from tests.integration.conftest import Mill
from tests.support.models.tiny import build_tokenizer

GIB = 2**30
#: Bytes of a 1 B Llama's weights on the device, at least and at most: its linear layers in 4, 8 or 16 bits.
WEIGHTS = {"nf4": (0.5 * GIB, 1.2 * GIB), "int8": (0.9 * GIB, 1.7 * GIB), "none": (1.7 * GIB, 2.6 * GIB)}


@pytest.fixture(scope="session")
def llama_1b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of about a billion random weights in bfloat16."""
    folder = tmp_path_factory.mktemp("llama-1b")
    build_tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=20,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_a_billion_weights_through_the_whole_line(
    mill: Mill, llama_1b: Path, tmp_path: Path, quantization: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "a b c " * (index % 40 + 1)}) + "\n" for index in range(64)))
    mill.start("worker", "-m", llama_1b, "-q", quantization, "--device", "cuda:0")
    mill.command(
        "submit", file, "-m", llama_1b, "-q", quantization, "--max-tokens", "32", "--temperature", "0", "--wait"
    )
    status = mill.status()
    vram = status["vram"]
    least, most = WEIGHTS[quantization]
    assert status["counts"]["succeeded"] == 64
    assert least < vram["weights_bytes"] < most
    assert vram["weights_bytes"] < vram["peak_allocated_bytes"] <= vram["peak_reserved_bytes"]
    assert vram["peak_reserved_bytes"] < vram["device_total_bytes"]
    (worker,) = mill.store.workers.rows()
    assert worker.device_uuid is not None
    assert worker.device_uuid.startswith("GPU-")


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_the_demo_model_answers_on_the_device(mill: Mill, tmp_path: Path, quantization: str) -> None:
    pairs = held_out_additions(100, seed=1)
    file = tmp_path / "prompts.jsonl"
    lines = [{"messages": [{"role": "user", "content": question}]} for question, _ in pairs]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    mill.start("worker", "-m", "demo", "-q", quantization, "--device", "cuda:0")
    mill.command("submit", file, "-m", "demo", "-q", quantization, "--temperature", "0", "--max-tokens", "8", "--wait")
    texts = [line["text"] for line in mill.results()]
    right = sum(text.strip() == answer for text, (_, answer) in zip(texts, pairs, strict=True))
    assert right >= 90
