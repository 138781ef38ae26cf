"""LoRA adapters for tests, made by peft: random ones over tiny models, and some trained over the demo model in nf4."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from batchmill.jobs.models.spec import DEMO_FOLDER
from batchmill.worker.models.load import LoadedModel

STEPS = 40
ROWS = 8
NOT_LEARNT = -100


@contextmanager
def quiet() -> Iterator[None]:
    """peft asks transformers for names that are deprecated, and warns of the layers that it changes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_random_adapter(folder: Path, config: PreTrainedConfig, *, seed: int = 0, **asked: Any) -> Path:
    """An adapter with random weights for a random model of this configuration."""
    with quiet():
        torch.manual_seed(0)  # the weights of tests.support.models.families, some of which are saved with it
        model = AutoModelForCausalLM.from_config(config)
        torch.manual_seed(seed)
        lora = LoraConfig(
            **{"task_type": "CAUSAL_LM", "init_lora_weights": False, "target_modules": "all-linear"} | asked
        )
        get_peft_model(model, lora).save_pretrained(folder)
    return folder


def save_trained_adapter(folder: Path, answer: str, **asked: Any) -> Path:
    """QLoRA over the demo model in nf4, until it answers every sum by this text: seconds on a CPU."""
    with quiet():
        model = _trainable(LoraConfig(task_type="CAUSAL_LM", **asked))
        tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=5e-3)
        choose = random.Random(0)
        for _ in range(STEPS):
            questions = [sum_question(choose.randrange(100), choose.randrange(100)) for _ in range(ROWS)]
            loss = model(**_examples(tokenizer, questions, answer)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder)
    return folder


def sum_question(left: int, right: int) -> str:
    return f"What is {left} plus {right}?"


def _trainable(lora: LoraConfig) -> Any:
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        DEMO_FOLDER, quantization_config=four_bit, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    torch.manual_seed(0)
    return get_peft_model(prepare_model_for_kbit_training(base, use_gradient_checkpointing=False), lora).train()


def _examples(tokenizer: Any, questions: Sequence[str], answer: str) -> dict[str, torch.Tensor]:
    """Chats in which the answer alone is learnt, padded on the right."""
    learnt = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    prompts = [
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": each}], add_generation_prompt=True, return_dict=False
            )
        )
        for each in questions
    ]
    width = max(map(len, prompts)) + len(learnt)
    ids = torch.full((len(prompts), width), int(tokenizer.pad_token_id))
    labels = torch.full_like(ids, NOT_LEARNT)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt) + len(learnt)] = torch.tensor(prompt + learnt)
        labels[row, len(prompt) : len(prompt) + len(learnt)] = torch.tensor(learnt)
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != tokenizer.pad_token_id).long()}


def alone(model: PreTrainedModel, folder: Path | None) -> Any:
    """This model under peft, with this adapter alone. The model is peft's from then on."""
    with quiet():
        return model if folder is None else PeftModel.from_pretrained(model, folder).eval()


def greedy(model: Any, loaded: LoadedModel, prompt: Sequence[int], tokens: int, *, ends: bool = False) -> list[int]:
    """Generates with transformers' `generate`: so many tokens, or up to an end token where `ends`."""
    with torch.no_grad():
        found = model.generate(
            input_ids=torch.tensor([prompt], device=loaded.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=loaded.device),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=loaded.pad_token_id,
            eos_token_id=list(loaded.end_token_ids) if ends else None,
        )
    answer: list[int] = found[0, len(prompt) :].tolist()
    return answer
