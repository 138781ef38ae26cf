"""Perplexity and divergence are those of a direct computation, whatever the windows, batches and pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from batchmill.worker.evaluate.data.passages import Passage
from batchmill.worker.evaluate.data.windows import Window, batches, windows
from batchmill.worker.evaluate.measures import scoring
from batchmill.worker.evaluate.measures.divergence import Comparison, Distributions, divergence
from batchmill.worker.evaluate.measures.perplexity import Perplexity
from batchmill.worker.evaluate.measures.scoring import scored
from batchmill.worker.models.load import LoadedModel
from tests.support.models.families import END_TOKEN, VOCABULARY, load_family

BEGIN = 0


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return load_family("llama-grouped")


@pytest.fixture(scope="module")
def other() -> LoadedModel:
    """The same model with its weights a little off."""
    model = load_family("llama-grouped")
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.model.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    return model


def text(count: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(4, VOCABULARY, (count,), generator=generator).tolist())


def perplexity(loaded: LoadedModel, found: Sequence[Window]) -> tuple[float, int]:
    result = Perplexity()
    for log_probs, targets in scored(loaded, found):
        result.take(log_probs, targets)
    return result.value, result.tokens


@torch.no_grad()
def direct(loaded: LoadedModel, tokens: Sequence[int], width: int, stride: int, begin: Sequence[int]) -> float:
    """As transformers' guide computes it: the model's own loss, window after window, seen tokens masked."""
    nats = count = seen = 0.0
    for start in range(0, len(tokens), stride):
        end = min(start + width - len(begin), len(tokens))
        ids = torch.tensor([[*begin, *tokens[start:end]]])
        labels = ids.clone()
        labels[:, : ids.shape[1] - int(end - seen)] = -100
        learnt = int((labels[:, 1:] != -100).sum())
        if learnt:
            nats += loaded.model(input_ids=ids, labels=labels).loss.item() * learnt
        count, seen = count + learnt, end
        if end == len(tokens):
            break
    return math.exp(nats / count)


@pytest.mark.parametrize("begin", [(), (BEGIN,)], ids=["no begin token", "begin token"])
@pytest.mark.parametrize(
    ("length", "width", "stride"), [(150, 32, 16), (150, 32, 31), (97, 40, 7), (12, 64, 32), (200, 64, 64), (33, 32, 1)]
)
def test_perplexity_is_that_of_the_models_own_loss(
    llama: LoadedModel, length: int, width: int, stride: int, begin: tuple[int, ...]
) -> None:
    stride = min(stride, width - len(begin))
    found, _ = perplexity(llama, windows([Passage(text(length), begin)], width=width, stride=stride))
    assert found == pytest.approx(direct(llama, text(length), width, stride, begin), rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "gemma2", "gpt-neox"])
def test_perplexity_holds_for_other_families(family: str) -> None:
    loaded = load_family(family)
    found, tokens = perplexity(loaded, windows([Passage(text(90))], width=40, stride=20))
    assert tokens == 89
    assert found == pytest.approx(direct(loaded, text(90), 40, 20, ()), rel=1e-5)


def test_passages_of_many_lengths_are_scored_together_as_each_alone(
    llama: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = [Passage(text(length, seed=length), (BEGIN,), first) for length, first in ((3, 0), (50, 40), (20, 19))]
    alone = [perplexity(llama, windows([each], width=64, stride=32)) for each in passages]
    nats = sum(math.log(value) * count for value, count in alone)
    monkeypatch.setattr(scoring, "PIECE_BYTES", 4 * VOCABULARY * 2)  # two places at once
    value, tokens = perplexity(llama, windows(passages, width=64, stride=32))
    assert tokens == 3 + 10 + 1
    assert value == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_only_an_answers_tokens_are_scored(llama: LoadedModel) -> None:
    tokens = text(30)
    value, count = perplexity(llama, windows([Passage(tokens, (BEGIN,), 27)], width=64, stride=32))
    with torch.no_grad():
        logits = llama.model(input_ids=torch.tensor([[BEGIN, *tokens]])).logits[0, 27:30]
    assert count == 3
    assert value == pytest.approx(
        math.exp(functional.cross_entropy(logits, torch.tensor(tokens[27:])).item()), rel=1e-5
    )


@given(
    lengths=st.lists(st.tuples(st.integers(0, 60), st.booleans(), st.integers(0, 20)), max_size=4),
    width=st.integers(2, 20),
    stride=st.integers(1, 20),
    most_tokens=st.integers(1, 60),
)
def test_every_token_that_can_be_scored_is_in_exactly_one_batch(
    lengths: list[tuple[int, bool, int]], width: int, stride: int, most_tokens: int
) -> None:
    passages = [Passage(tuple(range(1, n + 1)), (0,) if begins else (), min(first, n)) for n, begins, first in lengths]
    found = windows(passages, width=width, stride=min(stride, width - 1))
    came = sorted(token for each in found for token in each.tokens[each.first :])
    last_without_context = [n for n, begins, first in lengths if n and not begins and first == 0]
    expected = [token for each in passages for token in each.tokens[each.first :]]
    for _ in last_without_context:
        expected.remove(1)
    assert came == sorted(expected)
    assert sum(each.scored for each in passages) == len(came)
    assert all(1 <= each.first < len(each.tokens) <= width for each in found)
    together = list(batches(found, most_tokens=most_tokens, most_logits=most_tokens))
    assert sorted(each for batch in together for each in batch) == sorted(found)
    assert all(len(batch) * max(len(each.tokens) for each in batch) <= most_tokens for batch in together if batch[1:])


def distances(baseline: LoadedModel, model: LoadedModel, found: Sequence[Window], *, most: int = 10_000) -> Comparison:
    total = sum(each.scored for each in found)
    kept = Distributions(total, most=most, vocabulary=VOCABULARY)
    for log_probs, _ in scored(baseline, found):
        kept.take(log_probs)
    comparison = Comparison(kept)
    for log_probs, _ in scored(model, found):
        comparison.take(log_probs)
    kept.close()
    return comparison


def test_a_model_has_no_distance_from_itself(llama: LoadedModel) -> None:
    found = windows([Passage(text(120))], width=32, stride=16)
    result = distances(llama, llama, found).result
    assert result is not None
    assert (result.mean, result.p99, result.places) == (0.0, 0.0, 119)


@pytest.mark.parametrize("most", [1_000, 40, 1])
def test_divergence_is_that_of_a_direct_computation(llama: LoadedModel, other: LoadedModel, most: int) -> None:
    tokens = text(101)
    result = distances(llama, other, windows([Passage(tokens)], width=128, stride=64), most=most).result
    with torch.no_grad():
        expected, found = (
            each.model(input_ids=torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)
            for each in (llama, other)
        )
    places = (
        [place for place in range(100) if (place + 1) * most // 100 > place * most // 100] if most < 100 else range(100)
    )
    nats = functional.kl_div(found, expected, log_target=True, reduction="none").sum(-1)[list(places)]
    assert result is not None
    assert result.places == len(nats) == min(most, 100)
    assert result.mean == pytest.approx(nats.mean().item(), rel=1e-4)
    assert result.p99 == pytest.approx(nats.sort().values[math.ceil(0.99 * len(nats)) - 1].item(), rel=1e-4)
    assert result.mean > 1e-4


def test_impossible_tokens_add_nothing_to_the_divergence() -> None:
    possible = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert divergence(possible, possible).tolist() == [0.0]
    assert divergence(possible, torch.tensor([[0.25, 0.5, 0.25]]).log()).item() == pytest.approx(0.5 * math.log(2))


@given(total=st.integers(1, 200), most=st.integers(0, 220), pieces=st.lists(st.integers(0, 50), min_size=1))
def test_the_places_that_are_compared_are_as_many_as_wanted_however_they_come(
    total: int, most: int, pieces: list[int]
) -> None:
    kept = Distributions(total, most=most, vocabulary=2)
    begin, found = 0, []
    for piece in [*pieces, total]:
        taken = min(piece, total - begin)
        found += [begin + each for each in kept.places(begin, taken)]
        begin += taken
    kept.close()
    assert len(found) == min(total, most)
    assert found == kept.places(0, total)


def test_a_token_that_the_model_holds_impossible_makes_the_perplexity_infinite() -> None:
    result = Perplexity()
    result.take(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]))
    assert result.value == math.inf


def test_a_change_is_the_mean_of_the_tokens_own_with_its_standard_error() -> None:
    before, after, single = Perplexity(), Perplexity(), Perplexity()
    for result, nats in ((before, [1.0, 2.0, 3.0]), (after, [1.5, 2.0, 4.0]), (single, [1.0])):
        for each in nats:
            result.take(torch.tensor([[-each, 0.0]]), torch.tensor([0]))
    change = after.change(before)
    assert change.nats == pytest.approx(0.5)
    assert change.standard_error == pytest.approx(0.5 / math.sqrt(3))
    assert single.change(single).standard_error is None


def test_padding_changes_nothing_of_what_is_scored(llama: LoadedModel) -> None:
    [short, long] = windows([Passage(text(10)), Passage(text(60))], width=64, stride=32)
    alone = torch.cat([log_probs for log_probs, _ in scored(llama, [short])])
    together = torch.cat([log_probs for log_probs, _ in scored(llama, [short, long])])
    torch.testing.assert_close(together[-9:], alone, rtol=1e-5, atol=1e-5)
    assert llama.pad_token_id != END_TOKEN
