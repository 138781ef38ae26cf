"""Which quantization to take by what was measured, in plain sentences.

Owns the rule: of what loses little, the one with the smallest weights, and among equals of these the one that loses
least. It knows nothing but a report.
"""

from __future__ import annotations

from jobs.sizes import size
from worker.evaluate.measurement import Measurement, Report

#: What counts as little: perplexity up to this part above the baseline's, a mean divergence from it up to so many
#: nats, and up to this part of all answers fewer that are right.
LITTLE_PERPLEXITY = 0.05
LITTLE_DIVERGENCE = 0.1
LITTLE_ACCURACY = 0.02
#: Weights up to so many times as large are as small, so that quality decides.
_AS_SMALL = 1.05
#: So many times as fast is worth a word.
_MUCH_FASTER = 1.2
#: Fewer tokens than this tell little.
_FEW_TOKENS = 2_000


def advice(report: Report) -> str:
    """One plain sentence, and one more where speed speaks for another choice or the data were few."""
    reference = report.reference or min(report.measured, key=lambda each: each.perplexity, default=None)
    if reference is None:
        return "Nothing could be measured."
    if len(report.measured) == 1:
        return f"Only {_name(reference)} could be measured: there is nothing to compare it with."
    good = [each for each in report.measured if each is reference or not _costs(each, reference)]
    smallest = min(each.weights_bytes for each in good)
    small = [each for each in good if each.weights_bytes <= _AS_SMALL * smallest]
    taken = min(small, key=_loss)
    said = [_taken(taken, reference) if taken is not reference else _kept(report, reference)]
    fastest = max(good, key=_speed)
    if _speed(fastest) > _MUCH_FASTER * _speed(taken):
        where = "" if fastest in small else f"Where its {size(fastest.weights_bytes)} fit, "
        said.append(f"{where}{_name(fastest)} {_times(fastest, taken)} as {_name(taken)}.")
    if report.method is not None and report.method.tokens < _FEW_TOKENS:
        said.append(f"Only {report.method.tokens:,} tokens were measured: more text would make this surer.")
    return " ".join(said)


def _costs(each: Measurement, reference: Measurement) -> list[str]:
    """What it loses more of than little, said in a few words; nothing if all is little."""
    found = []
    if each.perplexity > (1 + LITTLE_PERPLEXITY) * reference.perplexity:
        found.append(_perplexity(each, reference))
    if each.divergence is not None and each.divergence.mean > LITTLE_DIVERGENCE:
        found.append(f"mean KL {each.divergence.mean:.2g}")
    if each.accuracy is not None and reference.accuracy is not None:
        lost = reference.accuracy.share - each.accuracy.share
        # One answer is less than the figure can tell.
        if lost > max(LITTLE_ACCURACY, 1 / reference.accuracy.answers):
            found.append(f"{each.accuracy.right} of {each.accuracy.answers} answers right")
    return found


def _loss(each: Measurement) -> tuple[float, float]:
    """The distance from the baseline where it is known, else the perplexity, which chance moves more."""
    return (each.divergence.mean if each.divergence is not None else 0.0), each.perplexity


def _taken(taken: Measurement, reference: Measurement) -> str:
    costs = [_perplexity(taken, reference)]
    if taken.accuracy is not None and reference.accuracy is not None:
        answers = taken.accuracy
        costs.append(f"{answers.right} of {answers.answers} answers are right ({reference.accuracy.right} with it)")
    speed = f", and it {_times(taken, reference)}" if _speed(taken) and _speed(reference) else ""
    weights = f"{size(taken.weights_bytes)} instead of {size(reference.weights_bytes)}"
    return (
        f"Take {_name(taken)}: its weights take {weights}, and it loses little against {_name(reference)}: "
        f"{', '.join(costs)}{speed}."
    )


def _kept(report: Report, reference: Measurement) -> str:
    smaller = [each for each in report.measured if each.weights_bytes < reference.weights_bytes]
    smaller = [each for each in smaller if _costs(each, reference)]
    if not smaller:
        return f"Take {_name(reference)}: nothing that was measured is much smaller."
    lost = "; ".join(f"{_name(each)}: {', '.join(_costs(each, reference))}" for each in smaller)
    return f"Take {_name(reference)}: all that is smaller loses much against it ({lost})."


def _perplexity(each: Measurement, reference: Measurement) -> str:
    change = each.perplexity / reference.perplexity - 1
    return f"perplexity {change:+.1%}"


def _times(one: Measurement, other: Measurement) -> str:
    factor = _speed(one) / _speed(other)
    if 0.95 < factor < 1.05:
        return "generates as fast"
    return f"generates {factor:.1f} times as fast" if factor > 1 else f"generates at {factor:.0%} of the speed"


def _speed(each: Measurement) -> float:
    return each.tokens_per_second or 0.0


def _name(each: Measurement) -> str:
    return each.spec.quantization.canonical
