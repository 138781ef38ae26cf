"""Weights laid out for speed say what they said before: fused layers, 4-bit kernels and copies, really quantized."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.nn.modules
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
)

from batchmill.worker.engine.continuous.weights.fused_matmul import CPU_COPY_ROWS, fused_matmul_of
from batchmill.worker.engine.continuous.weights.fused_projections import FusedProjections, find_shared_inputs
from batchmill.worker.engine.continuous.weights.preparation import Prepared, prepare
from batchmill.worker.engine.options import Dequantize

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "phi3": Phi3Config,
    "gemma3": Gemma3TextConfig,
    "olmo2": Olmo2Config,
}
#: Of two layers: groups that are joined, and layers beside them that are called directly where they are 4-bit.
JOINED = {"llama": (4, 4), "qwen2": (4, 4), "phi3": (0, 8), "gemma3": (4, 4), "olmo2": (4, 4), "gpt2": (0, 8)}
needs_fused_kernel = pytest.mark.skipif(not has_avx512bf16(), reason="this CPU has no AVX-512 with bf16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights of every architecture, biases included."""
    root = tmp_path_factory.mktemp("models")
    gpt2 = GPT2Config(vocab_size=260, n_embd=64, n_layer=2, n_head=4, n_positions=512, initializer_range=0.3)
    configs = {name: config(**SIZES) for name, config in CONFIGS.items()} | {"gpt2": gpt2}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for part in model.modules():
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.normal_(part.bias)
        model.save_pretrained(root / name)
    return {name: root / name for name in configs}


def loaded(folder: Path, quantization: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model as worker.models.load leaves it: quantized, on the CPU, warm."""
    asked: dict[str, Any] = {}
    if quantization == "int8":
        asked = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    elif quantization != "none":
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        asked = {"quantization_config": four_bit}
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, device_map={"": "cpu"}, **asked)
    if quantization == "none":
        # Weights of a file may lie at odd addresses, where float32 products are rounded otherwise.
        for each in model.parameters():
            each.data = each.data.clone()
    logits(model, 1)
    return model


@torch.inference_mode()
def logits(model: PreTrainedModel, tokens: int) -> Tensor:
    found: Tensor = model(input_ids=torch.arange(tokens)[None] * 3 % 260, use_cache=False).logits
    return found


def answers(model: PreTrainedModel) -> Tensor:
    """Greedy answers to three prompts of one batch."""
    prompts = torch.arange(36).reshape(3, 12)
    found: Tensor = model.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False
    )
    return found


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4", "fp4"])
@pytest.mark.parametrize("name", [*CONFIGS, "gpt2"])
def test_a_prepared_model_says_the_same_bit_for_bit(folders: dict[str, Path], name: str, quantization: str) -> None:
    model = loaded(folders[name], quantization)
    before = [logits(model, tokens) for tokens in (1, 5, 40, 130)]
    answered = answers(model)
    held = model.get_memory_footprint()
    done = prepare(model, dequantize=Dequantize.NEVER, free_bytes=0)
    joined, alone = JOINED[name]
    assert (done.joined, done.copied_bytes) == (joined, 0)
    if has_avx512bf16():
        assert done.direct == (alone if "4" in quantization else 0)
    assert all(torch.equal(logits(model, each.shape[1]), each) for each in before)
    assert torch.equal(answers(model), answered)
    assert model.get_memory_footprint() == held


@needs_fused_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_and_precision_are_kept_around_the_fused_kernel(folders: dict[str, Path], dtype: torch.dtype) -> None:
    model = loaded(folders["qwen2"], "nf4", dtype)
    before = logits(model, 50)
    assert prepare(model, dequantize=Dequantize.NEVER, free_bytes=0).direct == 4
    assert torch.equal(logits(model, 50), before)
    assert logits(model, 50).dtype == dtype


@needs_fused_kernel
def test_large_steps_run_from_copies_of_the_same_weights_and_small_ones_do_not(folders: dict[str, Path]) -> None:
    model = loaded(folders["llama"], "nf4")
    few, many = logits(model, CPU_COPY_ROWS - 1), logits(model, 200)
    done = prepare(model, dequantize=Dequantize.ALWAYS, free_bytes=0)
    parameters = 2 * (64 * 128 + 64 * 64 + 3 * 64 * 192)
    assert done == Prepared(joined=4, direct=4, copied_bytes=2 * parameters, copy_rows=(CPU_COPY_ROWS, CPU_COPY_ROWS))
    assert torch.equal(logits(model, CPU_COPY_ROWS - 1), few)
    found = logits(model, 200)
    assert not torch.equal(found, many), "the copies were not used"
    assert (found - many).norm() < 0.05 * many.norm()


@needs_fused_kernel
def test_a_copy_holds_what_the_fused_kernel_multiplies_with(folders: dict[str, Path]) -> None:
    layer = loaded(folders["llama"], "fp4").model.layers[0].mlp.down_proj
    product = fused_matmul_of([layer])
    assert product is not None
    with torch.inference_mode():
        rows = torch.eye(192)
        before = product(rows)
        product.copy()
        assert torch.equal(product(rows), before)
        assert product(torch.zeros(1, 0, 192)).shape == (1, 0, 64)


@pytest.mark.parametrize(("free", "copies"), [(-1, False), (0, True)])
def test_auto_copies_where_all_copies_fit(folders: dict[str, Path], free: int, copies: bool) -> None:
    needed = prepare(loaded(folders["llama"], "nf4"), dequantize=Dequantize.ALWAYS, free_bytes=0).copied_bytes
    assert needed > 0
    done = prepare(loaded(folders["llama"], "nf4"), dequantize=Dequantize.AUTO, free_bytes=needed + free)
    assert done.copied_bytes == (needed if copies else 0)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_only_4_bit_weights_are_copied(folders: dict[str, Path], quantization: str) -> None:
    done = prepare(loaded(folders["llama"], quantization), dequantize=Dequantize.ALWAYS, free_bytes=2**40)
    assert (done.copied_bytes, done.copy_rows) == (0, (0, 0))


@pytest.mark.parametrize("dequantize", [Dequantize.NEVER, Dequantize.ALWAYS])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_without_a_fused_kernel_joined_and_copied_weights_are_bit_equal(
    folders: dict[str, Path], name: str, dequantize: Dequantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    model = loaded(folders[name], "nf4")
    before = [logits(model, tokens) for tokens in (1, 40, 130)]
    done = prepare(model, dequantize=dequantize, free_bytes=0)
    assert (done.joined, done.direct) == (4, 4)
    assert done.copy_rows == ((1, 1) if dequantize == Dequantize.ALWAYS else (0, 0))
    assert all(torch.equal(logits(model, each.shape[1]), each) for each in before)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_joined_weights_are_held_once(folders: dict[str, Path], quantization: str) -> None:
    model = loaded(folders["llama"], quantization)
    attention = model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    held = [weakref.ref(each.weight.data.untyped_storage()) for each in layers]
    prepare(model, dequantize=Dequantize.NEVER, free_bytes=0)
    gc.collect()
    assert len({each.weight.untyped_storage().data_ptr() for each in layers}) == 1
    assert [each() for each in held] == [None] * 3


class Pair(nn.Module):
    """Two layers that may read one tensor."""

    def __init__(self, *, change: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.left, self.right, self.change = nn.Linear(8, 4), nn.Linear(8, 6), change
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(self.change(x))


def joined(pair: Pair) -> FusedProjections:
    layers = (pair.left, pair.right)
    product = fused_matmul_of(layers)
    assert product is not None
    product.adopt()
    fused = FusedProjections(layers, product)
    fused.join()
    return fused


def test_siblings_are_those_of_one_parent_that_read_one_tensor() -> None:
    same, other = Pair(), Pair(change=torch.clone)
    x = torch.ones(2, 8)
    assert find_shared_inputs(same, lambda: same(x)) == [(same.left, same.right)]
    assert find_shared_inputs(other, lambda: other(x)) == [(other.left,), (other.right,)]
    assert find_shared_inputs(same, lambda: (same(x), same(x))) == [(same.left,), (same.right,)], (
        "called more than once"
    )
    both = nn.ModuleList([Pair(), Pair()])
    assert len(find_shared_inputs(both, lambda: [each(x) for each in both])) == 2, "of two parents"


@torch.inference_mode()
def test_every_call_gets_the_output_of_its_own_input() -> None:
    pair = Pair()
    first, second = torch.randn(3, 8), torch.randn(3, 8)
    # One product of both layers: the last bit of a sum may be another one in a matrix of another shape.
    weight, bias = (torch.cat([getattr(pair.left, name), getattr(pair.right, name)]) for name in ("weight", "bias"))
    expected = {id(x): nn.functional.linear(x, weight, bias).split([4, 6], dim=-1) for x in (first, second)}
    joined(pair)
    for left, right in ((first, second), (second, second), (first, first), (second, first)):
        assert torch.equal(pair.left(left), expected[id(left)][0])
        assert torch.equal(pair.right(right), expected[id(right)][1])
        assert torch.equal(pair.right(right), expected[id(right)][1]), "the same one again"


@torch.inference_mode()
def test_an_error_between_siblings_leaves_nothing_behind() -> None:
    pair = Pair()
    fused = joined(pair)
    taken = weakref.ref(pair.left(x := torch.randn(3, 8)))
    assert fused._parts, "the right layer's part waits"
    del x
    gc.collect()
    assert (taken(), fused._parts, fused._read) == (None, {}, None)
    pair(torch.randn(3, 8))
    assert (fused._parts, fused._read) == ({}, None), "all parts were taken"


def test_layers_that_were_parted_compute_for_themselves() -> None:
    pair = Pair()
    x = torch.randn(3, 8)
    before = pair(x)
    joined(pair).part()
    assert "forward" not in vars(pair.left) | vars(pair.right)
    assert all(torch.equal(*each) for each in zip(pair(x), before, strict=True))


def test_layers_of_different_kinds_are_not_joined() -> None:
    plain, biasless = nn.Linear(8, 4).eval(), nn.Linear(8, 4, bias=False).eval()
    assert fused_matmul_of([plain, biasless]) is None
    assert fused_matmul_of([plain, nn.Linear(16, 4).eval()]) is None
    assert fused_matmul_of([plain, nn.Linear(8, 4)]) is None, "in training"
    assert fused_matmul_of([plain, Linear4bit(8, 4).eval()]) is None
    assert fused_matmul_of([Linear4bit(8, 4).eval()] * 2) is None, "not quantized yet"
    assert fused_matmul_of([plain]) is None, "nothing to gain"


class Changing(nn.Module):
    """Writes into what its layers read, between them."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.left, self.right, self.down = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        x += 1.0
        found: Tensor = self.down(left * self.right(x))
        return found


def test_what_changes_a_models_values_is_taken_back(folders: dict[str, Path]) -> None:
    model = loaded(folders["llama"], "none")
    layer = model.model.layers[1]
    layer.mlp = Changing(layer.mlp)
    before = logits(model, 30)
    assert prepare(model, dequantize=Dequantize.ALWAYS, free_bytes=0) == Prepared()
    assert torch.equal(logits(model, 30), before)
