"""The bad lines of one file: some are named, and every other one is counted."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from batchmill.producer.files.problems import MAX_NAMED, MAX_NAMED_OF_ERROR, Problems


def test_errors_that_differ_by_their_figures_are_equal() -> None:
    problems = Problems()
    for number in range(1, 8):
        problems.add(number, f"not UTF-8: byte {number} is 0x{number + 250:02x}")
    assert problems.lines("p")[4:] == ["p:5: not UTF-8: byte 5 is 0xff", "... and 2 more lines with this error"]


def test_errors_that_have_a_name_are_equal_by_it() -> None:
    problems = Problems()
    for number in range(1, 7):
        problems.add(number, f"duplicate {'x' * number}", "duplicate")
    assert problems.lines("p")[-1] == "... and 1 more line with this error"


def test_what_is_counted_stands_below_the_last_of_its_error() -> None:
    problems = Problems()
    for number in range(1, 13):
        problems.add(number, "odd" if number % 2 else "even")
    assert problems.lines("p")[8:] == [
        "p:9: odd", "... and 1 more line with this error", "p:10: even", "... and 1 more line with this error",
    ]  # fmt: skip


@given(st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz") | st.text("xyz", max_size=3), max_size=400))
def test_every_line_is_named_or_counted(errors: list[str]) -> None:
    problems = Problems()
    for number, what in enumerate(errors, start=1):
        problems.add(number, what)
    said = problems.lines("p")
    more = [int(found[1].replace(",", "")) for each in said if (found := re.match(r"\.\.\. and ([\d,]+) more", each))]
    named = [each for each in said if each.startswith("p:")]
    assert len(named) + sum(more) + problems.unsaid == problems.count == len(errors)
    assert len(named) <= MAX_NAMED
    for what in set(errors):
        assert sum(re.fullmatch(rf"p:\d+: {what}", each) is not None for each in named) <= MAX_NAMED_OF_ERROR
    if len(set(errors)) * MAX_NAMED_OF_ERROR <= MAX_NAMED:
        assert problems.unsaid == 0
