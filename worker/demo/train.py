"""Trains the demo model from scratch: `python -m batchmill.worker.demo.train [--seconds N] [--out FOLDER]`.

Owns the model's shape, the training loop and what is written. The same seed on the same machine gives the
same weights, as long as the time limit is not reached; a machine too slow for it gets a shorter training.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from batchmill.worker.demo.packing import NOT_LEARNT, Rows, packed_rows
from batchmill.worker.demo.tokenizer import MAX_LENGTH_TOKENS, build_tokenizer

FOLDER = Path(__file__).parent / "model"
DEFAULT_LIMIT_SECONDS = 1680.0


@dataclass(frozen=True)
class Recipe:
    """Everything the trained weights depend on."""

    seed: int = 1
    steps: int = 7000
    #: The examples that come in the mix that is mostly additions.
    first_examples: int = 25_000
    warmup_steps: int = 200
    rows: int = 3
    row_length_tokens: int = 512
    peak_learning_rate: float = 3e-3
    weight_decay: float = 0.1
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4
    initializer_range: float = 0.06


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with random float32 weights; bitsandbytes wants dimensions that are multiples of 64."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=MAX_LENGTH_TOKENS,
        initializer_range=recipe.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def build_optimizers(recipe: Recipe, model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (sums take it half of AdamW's steps), AdamW for the embedding and the norms."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim == 1 or "embed" in name]
    rate = recipe.peak_learning_rate
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def answer_loss(model: LlamaForCausalLM, rows: Rows) -> torch.Tensor:
    """Cross-entropy (nats a token), the mean over the answers in these rows, long or short."""
    hidden = model.model(
        input_ids=rows.tokens, position_ids=rows.positions, attention_mask=rows.may_attend, use_cache=False
    ).last_hidden_state
    learnt = rows.targets != NOT_LEARNT
    losses = cross_entropy(model.lm_head(hidden[learnt]), rows.targets[learnt], reduction="none")
    return (losses * rows.weights[learnt]).sum() / rows.weights.sum()


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """Linear warm-up, then a cosine down to zero at progress 1."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.peak_learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * progress))


def train(recipe: Recipe, *, limit_seconds: float = DEFAULT_LIMIT_SECONDS) -> tuple[LlamaForCausalLM, list[float]]:
    """A trained float32 model and the loss of every step; progress goes to stderr."""
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer).train()
    optimizers = build_optimizers(recipe, model)
    batches = packed_rows(
        tokenizer,
        seed=recipe.seed,
        rows=recipe.rows,
        length_tokens=recipe.row_length_tokens,
        first_examples=recipe.first_examples,
    )
    losses: list[float] = []
    started = time.monotonic()
    for step in range(recipe.steps):
        elapsed = time.monotonic() - started
        progress = max(step / recipe.steps, elapsed / limit_seconds)
        if progress >= 1:
            break
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(recipe, step, progress)
        loss = answer_loss(model, next(batches))
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            mean = sum(losses[-100:]) / 100
            print(f"step {step + 1}/{recipe.steps} loss {mean:.4f} {elapsed:.0f} s", file=sys.stderr, flush=True)
    return model.eval(), losses


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the weights in bfloat16, the settings and the tokenizer."""
    tokenizer = build_tokenizer()
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # It is written for its owner alone, but is shipped to everybody.
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train batchmill's demo model from scratch.")
    parser.add_argument("--seconds", type=float, default=DEFAULT_LIMIT_SECONDS, help="stop after this long")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write the model to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # The order of additions, and so the weights, must not depend on the cores.
    model, _ = train(Recipe(), limit_seconds=arguments.seconds)
    save(model, arguments.out)
    print(f"wrote {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
