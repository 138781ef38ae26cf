"""Bad lines of a prompt file: numbered, in file order, and counted where there are many."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchmill.jobs.errors import PromptFileError
from batchmill.producer.files.prompt_file import PromptFile, PromptLine
from tests.support.prompt_files import GOOD, error, write


def test_every_bad_line_is_reported_with_its_number_in_file_order(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"prompt":1}\n\n' + GOOD + b'x\n{"prompt":"ok"}\r\n{}')
    caught = error(path)
    assert caught.exit_code == 2
    assert caught.count == 3
    assert [text.removeprefix(path).split(" ")[0] for text in caught.problems] == [":1:", ":4:", ":6:"]
    assert str(caught) == f"{path}: 3 bad lines"


def test_good_lines_are_yielded_though_a_bad_one_came_before(tmp_path: Path) -> None:
    path = write(tmp_path, b"\n" + GOOD + b"x\n" + GOOD)
    seen: list[PromptLine] = []
    with PromptFile(path) as prompts:
        seen.extend(prompts)
    assert [(line.number, line.request.index, line.size_bytes) for line in seen] == [(2, 0, 18), (4, 2, 18)]


def test_equal_errors_are_counted_after_the_fifth(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD + b"x\n" * 1_209 + b'{"prompt":1}\n{"prompt":[]}\n')
    caught = error(path)
    assert caught.problems == (
        *(f"{path}:{number}: not JSON: Expecting value at column 1" for number in range(2, 7)),
        "... and 1,204 more lines with this error",
        f"{path}:1211: prompt must be a string, not a number",
        f"{path}:1212: prompt must be a string, not a list",
    )
    assert (caught.count, str(caught)) == (1_211, f"{path}: 1,211 bad lines")


def test_only_the_first_hundred_bad_lines_are_named(tmp_path: Path) -> None:
    lines = [b'{"prompt":"x","%c%c":1}\n' % (97 + number // 25, 97 + number % 25) for number in range(250)]
    path = write(tmp_path, b"".join(lines))
    caught = error(path)
    assert len(caught.problems) == 100
    assert caught.problems[-1].startswith(f"{path}:100: ")
    assert str(caught) == f"{path}: 250 bad lines, of which 150 with other errors are not listed"


def test_the_caller_reports_lines_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD * 3)
    with PromptFile(path) as prompts:
        numbers = [line.number for line in prompts]
        prompts.raise_if_bad()
        prompts.report(numbers[2], "custom_id 'a' stands in line 2 too")
        prompts.report(numbers[0], "custom_id 'b' is taken")
        with pytest.raises(PromptFileError) as caught:
            prompts.raise_if_bad()
    assert caught.value.problems == (
        f"{path}:1: custom_id 'b' is taken",
        f"{path}:3: custom_id 'a' stands in line 2 too",
    )
