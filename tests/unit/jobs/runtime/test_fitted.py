"""Lines of `status`, `workers` and `plan` in a narrow terminal."""

from __future__ import annotations

from batchmill.jobs.runtime.fitted import fitted


def shown(line: str, *, width: int | None = 40) -> list[str]:
    return list(fitted([line], indent=13, width=width))


def test_a_long_line_is_broken_between_words_and_goes_on_indented() -> None:
    line = "  requests   320 = 318 succeeded + 2 failed + 0 cancelled + 0 pending"
    assert shown(line) == [
        "  requests   320 = 318 succeeded + 2",
        "             failed + 0 cancelled + 0",
        "             pending",
    ]
    assert shown(line, width=None) == [line]
    assert shown(line, width=80) == [line]


def test_a_command_stays_whole() -> None:
    line = "  waiting    start a worker that holds it: batchmill up -m echo --adapter sql=PATH_OR_ID"
    assert shown(line) == [
        "  waiting    start a worker that holds",
        "             it:",
        "             batchmill up -m echo --adapter sql=PATH_OR_ID",
    ]


def test_what_has_no_room_stays_as_it_is() -> None:
    assert shown(f"  file       {'a' * 50}") == ["  file", f"             {'a' * 50}"]
