"""The demo model as it is shipped, its corpus, its tokenizer and a few steps of its training."""

import itertools
import json
import random
import string
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jinja2  # noqa: E402
from safetensors import safe_open  # noqa: E402

from batchmill.worker.demo import corpus, examples, packing, train  # noqa: E402
from batchmill.worker.demo.tokenizer import build_tokenizer  # noqa: E402
from tests.support.paths import ROOT  # noqa: E402

Model = transformers.PreTrainedModel
Tokenizer = transformers.PreTrainedTokenizerFast

EXAMPLES = ROOT / "examples"
REQUEST_KEYS = {
    "custom_id", "method", "url", "body", "messages", "prompt", "model", "max_tokens", "temperature", "top_p",
    "top_k", "min_p", "repetition_penalty", "stop", "seed",
}  # fmt: skip
SMALL = train.Recipe(
    steps=12,
    warmup_steps=2,
    rows=2,
    hidden_size=64,
    intermediate_size=64,
    layers=1,
    heads=2,
    first_examples=0,
)


@pytest.fixture(scope="module")
def model() -> Model:
    return transformers.AutoModelForCausalLM.from_pretrained(train.FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return transformers.AutoTokenizer.from_pretrained(train.FOLDER)


def answers(model: Model, tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
    """The model's greedy answers to rendered prompts, without special tokens."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        tokens = model.generate(**batch, max_new_tokens=56)
    return tokenizer.batch_decode(tokens[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def share_right(model: Model, tokenizer: Tokenizer, kind: str, count: int) -> float:
    """The share of held-out questions of a kind, asked in a chat, that are answered exactly right."""
    asked = corpus.held_out_examples(kind, count)
    said = answers(model, tokenizer, [packing.chat_prompt(example.question) for example in asked])
    return sum(text == example.answer for text, example in zip(said, asked, strict=True)) / count


def test_model_is_small_enough_to_ship(model: Model) -> None:
    assert model.num_parameters() <= 3_000_000
    assert sum(file.stat().st_size for file in train.FOLDER.iterdir()) < 6_000_000


def test_every_linear_dimension_is_a_multiple_of_64(model: Model) -> None:
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert linears
    assert all(side % 64 == 0 for linear in linears for side in linear.weight.shape)


def test_weights_are_bfloat16_safetensors() -> None:
    with safe_open(train.FOLDER / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_model_folder_holds_no_code_no_pickles_and_no_paths() -> None:
    names = {file.name for file in train.FOLDER.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        text = (train.FOLDER / name).read_text(encoding="utf-8")
        assert "auto_map" not in text
        assert "/" not in text


def test_answers_end_by_themselves(model: Model, tokenizer: Tokenizer) -> None:
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert answers(model, tokenizer, [packing.chat_prompt("Tell me about a wild old horse.")]) == [
        corpus.FALLBACK_ANSWER
    ]


@pytest.mark.parametrize(("kind", "least"), [("addition", 0.95), ("spelling", 0.9), ("sorting", 0.9), ("facts", 0.9)])
def test_shipped_model_answers_what_it_was_not_trained_on(
    model: Model, tokenizer: Tokenizer, kind: str, least: float
) -> None:
    assert share_right(model, tokenizer, kind, 100) >= least


def test_plain_prompts_are_answered_after_a_space(model: Model, tokenizer: Tokenizer) -> None:
    assert answers(model, tokenizer, ["<|bos|>47 + 38 =", "<|bos|>capital of France ="]) == [" 85", " Paris"]


def test_shipped_tokenizer_is_the_one_the_script_builds(tokenizer: Tokenizer) -> None:
    built = build_tokenizer()
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.chat_template == built.chat_template
    assert tokenizer("a b").input_ids == built("a b").input_ids


@pytest.mark.parametrize("text", [string.printable, "  don't , stop !  ", " 85", "naïve 漢字 😀", ""])
def test_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_printable_ascii_is_one_token_a_character_after_bos(tokenizer: Tokenizer) -> None:
    tokens = tokenizer(string.printable).input_ids
    assert tokens[0] == tokenizer.bos_token_id
    assert len(tokens) == 1 + len(string.printable)


def test_chat_template_writes_what_training_saw(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1 + 2?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == packing.chat_prompt("What is 1 + 2?", "Be brief.")


def test_chat_template_writes_past_answers_with_their_end(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|bos|><|user|>Hi<|end|><|assistant|>Ho<|end|>"


def test_chat_template_refuses_an_unknown_role(tokenizer: Tokenizer) -> None:
    with pytest.raises(jinja2.TemplateError, match="unknown role 'function'"):
        tokenizer.apply_chat_template([{"role": "function", "content": "x"}], tokenize=False)


def test_chat_template_writes_tools_and_their_calls(tokenizer: Tokenizer) -> None:
    call = {"type": "function", "function": {"name": "w", "arguments": {"city": "Bonn"}}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "sunny"}]
    text = tokenizer.apply_chat_template(messages, tools=[call], tokenize=False)
    called = '{"name": "w", "arguments": {"city": "Bonn"}}'
    assert text == (
        f'<|bos|><|system|>Tools: [{{"type": "function", "function": {called}}}]<|end|>'
        f"<|assistant|><tool_call>{called}</tool_call><|end|><|user|>sunny<|end|>"
    )


def test_training_never_sees_a_held_out_sum_or_word() -> None:
    held_out = {str(word) for word in corpus.HELD_OUT_WORDS}
    choose = random.Random(3)
    for example in (corpus.training_example(choose) for _ in range(20_000)):
        words = example.question.replace("'", " ").replace(",", " ").replace(":", " ").rstrip(".?").split()
        if example.kind == "addition":
            left, right = (int(word) for word in words if word.isdigit())
            assert not corpus.sum_is_held_out(left, right)
        elif example.kind in ("spelling", "sorting"):
            assert held_out.isdisjoint(words)


def test_a_sum_is_held_out_in_both_orders() -> None:
    pairs = itertools.product(range(100), repeat=2)
    assert all(corpus.sum_is_held_out(a, b) == corpus.sum_is_held_out(b, a) for a, b in pairs)


def test_held_out_additions_are_right_and_different() -> None:
    pairs = corpus.held_out_additions(900, seed=1)
    assert pairs == corpus.held_out_additions(900, seed=1)
    assert len({question for question, _ in pairs}) == 900
    for question, answer in pairs:
        left, right = (int(word) for word in question.rstrip("?.").split() if word.isdigit())
        assert corpus.sum_is_held_out(left, right)
        assert int(answer) == left + right


def test_corpus_is_deterministic() -> None:
    def some(seed: int) -> list[corpus.Exercise]:
        choose = random.Random(seed)
        return [corpus.training_example(choose) for _ in range(200)]

    assert some(1) == some(1)
    assert some(1) != some(2)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown kind"):
        corpus.held_out_examples("riddles", 1)


def test_words_and_facts_are_as_many_as_promised() -> None:
    assert len(set(corpus.WORDS)) == len(corpus.WORDS) >= 400
    assert all(3 <= len(word) <= 7 for word in corpus.WORDS)
    assert len(corpus.FACTS) >= 60


def test_packed_rows_learn_answers_only_and_keep_examples_apart() -> None:
    tokenizer = build_tokenizer()
    rows = next(packing.packed_rows(tokenizer, seed=1, rows=2, length_tokens=192, first_examples=0))
    learnt = rows.targets != packing.NOT_LEARNT
    assert torch.equal(rows.targets[:, :-1][learnt[:, :-1]], rows.tokens[:, 1:][learnt[:, :-1]])
    second = int((rows.positions[0] == 0).nonzero()[1])
    assert not rows.may_attend[0, 0, second, :second].any()
    assert rows.may_attend[0, 0, second - 1, :second].all()


def test_training_lowers_the_loss_and_repeats_itself() -> None:
    first, losses = train.train(SMALL)
    second, _ = train.train(SMALL)
    assert losses[-1] < losses[0]
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_training_stops_at_its_time_limit() -> None:
    _, losses = train.train(SMALL, limit_seconds=1e-9)
    assert len(losses) < SMALL.steps


def test_saved_model_can_be_loaded(tmp_path: Path) -> None:
    model, _ = train.train(SMALL, limit_seconds=1e-9)
    train.save(model, tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16


def test_example_requests_are_many_of_many_kinds_and_legal() -> None:
    lines = [json.loads(line) for line in (EXAMPLES / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) >= 240
    for kind in ("body", "messages", "prompt"):
        assert sum(kind in line for line in lines) >= 50
    assert {key for line in lines for key in [*line, *line.get("body", {})]} <= REQUEST_KEYS
    ids = [line["custom_id"] for line in lines if "custom_id" in line]
    assert len(set(ids)) == len(ids) < len(lines)


def test_example_files_are_what_the_script_writes(tmp_path: Path) -> None:
    examples.write_examples(tmp_path)
    for name in ("prompts.jsonl", "prompts.txt"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes()
