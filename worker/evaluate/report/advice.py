"""The advice on which quantization to take by what was measured, in plain sentences.

Owns the rule: of those that surely lose little in every column, the one with the smallest weights, and among equals of
these the one that loses least. A smaller one that may do is named with what speaks against it. It knows nothing but a
report; worker.evaluate.report.finding says how much is little.
"""

from __future__ import annotations

from batchmill.jobs.runtime.sizes import size
from batchmill.worker.evaluate.measures.measurement import Measurement, Report
from batchmill.worker.evaluate.report.finding import Certainty, Measured, findings, plural

#: Weights up to so many times as large are as small, so that quality decides.
_AS_SMALL = 1.05
#: A speed of at least so many times as much is mentioned.
_MUCH_FASTER = 1.2
#: Fewer tokens than this tell little.
_FEW_TOKENS = 2_000
#: Multiples of what was measured that are tried for whether they would be enough.
_MORE = tuple(2**power for power in range(1, 11))


def advice(report: Report) -> str:
    """Returns a few plain sentences: what to take, what else may do, what is faster, and whether the data were few."""
    reference = report.reference or min(report.measured, key=lambda each: each.perplexity, default=None)
    if reference is None:
        return "Nothing could be measured."
    if len(report.measured) == 1:
        return f"Only {_name(reference)} could be measured: there is nothing to compare it with."
    others = [each for each in report.measured if each is not reference]
    good = [reference, *(each for each in others if _is_sure(findings(each, reference)))]
    taken = _smallest(good)
    may_do = [each for each in others if each not in good and not _loses(each, reference) and _is_smaller(each, taken)]
    sentences = [_taken(taken, reference) if taken is not reference else _kept(others, may_do, reference)]
    if may_do:
        sentences.append(_may_do(_smallest(may_do), reference))
    fastest = max(good, key=_speed)
    if _speed(fastest) > _MUCH_FASTER * _speed(taken):
        where = f"Where its {size(fastest.weights_bytes)} fit, " if _is_smaller(taken, fastest) else ""
        sentences.append(f"{where}{_name(fastest)} {_times(fastest, taken)} as {_name(taken)}.")
    if report.method is not None and report.method.tokens < _FEW_TOKENS:
        sentences.append(f"Only {report.method.tokens:,} tokens were measured: more text would make this surer.")
    return " ".join(sentences)


def _smallest(rows: list[Measurement]) -> Measurement:
    """Picks the one that loses least, of those that are as small as the smallest."""
    least = min(each.weights_bytes for each in rows)
    return min((each for each in rows if each.weights_bytes <= _AS_SMALL * least), key=_loss)


def _is_smaller(one: Measurement, other: Measurement) -> bool:
    return _AS_SMALL * one.weights_bytes < other.weights_bytes


def _loss(each: Measurement) -> tuple[float, float]:
    """The distance from the baseline where it is known, else the perplexity, which chance moves more."""
    return (each.divergence.mean if each.divergence is not None else 0.0), each.perplexity


def _is_sure(columns: list[Measured]) -> bool:
    return all(each.verdict is Certainty.LITTLE for each in columns)


def _loses(each: Measurement, reference: Measurement) -> list[Measured]:
    """The columns in which it surely loses much."""
    columns = findings(each, reference)
    return [each for each in columns if each.verdict is Certainty.MUCH and not each.is_change]


def _taken(taken: Measurement, reference: Measurement) -> str:
    speed = f", and it {_times(taken, reference)}" if _speed(taken) and _speed(reference) else ""
    return (
        f"Take {_name(taken)}: its weights take {_weights(taken, reference)}, and it loses little against "
        f"{_name(reference)}: {_listed(findings(taken, reference))}{speed}{_peak(taken, reference)}."
    )


def _kept(others: list[Measurement], may_do: list[Measurement], reference: Measurement) -> str:
    if may_do:
        return f"Take {_name(reference)}: nothing smaller is shown to be nearly as good."
    smaller = [each for each in others if each.weights_bytes < reference.weights_bytes and _loses(each, reference)]
    if not smaller:
        return f"Take {_name(reference)}: nothing that was measured is much smaller."
    lost = "; ".join(f"{_name(each)}: {_listed(_loses(each, reference))}" for each in smaller)
    return f"Take {_name(reference)}: all that is smaller loses much against it ({lost})."


def _may_do(each: Measurement, reference: Measurement) -> str:
    """Says what speaks for a small one that is not known to lose little, and what would settle it."""
    by_verdict: dict[Certainty, list[Measured]] = {verdict: [] for verdict in Certainty}
    for one in findings(each, reference):
        by_verdict[one.verdict].append(one)
    little, changed, unknown = by_verdict[Certainty.LITTLE], by_verdict[Certainty.MUCH], by_verdict[Certainty.UNKNOWN]
    sentence = f"{_name(each)} may do, whose weights take {_weights(each, reference)}"
    if little:
        sentence += f": little is lost by {_listed(little)}"
    if changed:
        sentence += f", but its answers are others than {_name(reference)}'s ({_listed(changed)})"
    if not unknown:
        return f"{sentence}; take it if other wordings will do."
    return f"{sentence}. {_basis(unknown)} too few to tell about {_listed(unknown)}; {_more(unknown)}."


def _basis(unknown: list[Measured]) -> str:
    """The data that these rest on, as the beginning of a sentence."""
    answers = max((each.answers for each in unknown if each.answers is not None), default=None)
    scored = "the tokens that were scored" if any(each.answers is None for each in unknown) else ""
    if answers is None:
        return f"{scored.capitalize()} are"
    if scored:
        return f"{answers:,} {plural(answers)} and {scored} are"
    return f"{answers:,} {plural(answers)} {'is' if answers == 1 else 'are'}"


def _more(unknown: list[Measured]) -> str:
    """Says what to measure more of: as many answers as would tell, if they went on as they began."""
    of_answers = [each for each in unknown if each.answers is not None]
    parts = ["measure more text"] if len(of_answers) < len(unknown) else []
    if of_answers:
        answers = max(each.answers or 0 for each in of_answers)
        enough = next((times for times in _MORE if _would_tell(of_answers, times)), None)
        parts.append(
            "it is so close that more answers may not tell"
            if enough is None
            else f"--continuations {answers * enough}, on as many questions, would likely tell"
        )
    return ", and ".join(parts)


def _would_tell(columns: list[Measured], times: int) -> bool:
    return all(each.verdict_of(times) is not Certainty.UNKNOWN for each in columns)


def _listed(columns: list[Measured]) -> str:
    return ", ".join(map(str, columns))


def _weights(each: Measurement, reference: Measurement) -> str:
    return f"{size(each.weights_bytes)} instead of {size(reference.weights_bytes)}"


def _peak(each: Measurement, reference: Measurement) -> str:
    """Returns a remark where smaller weights did not make the whole smaller, else an empty text."""
    if each.peak_bytes <= _AS_SMALL * reference.peak_bytes:
        return ""
    return f", though its peak was {size(each.peak_bytes)} ({size(reference.peak_bytes)} with {_name(reference)})"


def _times(one: Measurement, other: Measurement) -> str:
    factor = _speed(one) / _speed(other)
    if 0.95 < factor < 1.05:
        return "generates as fast"
    return f"generates {factor:.1f} times as fast" if factor > 1 else f"generates at {factor:.0%} of the speed"


def _speed(each: Measurement) -> float:
    return each.tokens_per_second or 0.0


def _name(each: Measurement) -> str:
    return each.spec.quantization.canonical
