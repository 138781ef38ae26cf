"""Models and adapters that the lines of a prompt file name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchmill.producer.files.prompt_file import PromptFile
from tests.support.prompt_files import COMPLETIONS, GOOD, HELLO, error, openai, requests, write


def test_a_line_may_name_any_spelling_of_the_model(tmp_path: Path) -> None:
    lines = b'{"prompt":"a","model":"./m"}\n{"prompt":"b","model":"/real/m"}\n{"prompt":"c"}'
    with PromptFile(write(tmp_path, lines), models=["./m", "/real/m"]) as prompts:
        assert len(list(prompts)) == 3
        assert prompts.model is None


def test_another_model_is_a_bad_line_and_says_what_to_do(problem: Callable[..., str]) -> None:
    text = problem(openai({"model": "gpt", "messages": [HELLO]}), models=["m", "/real/m"])
    assert text.startswith("model is 'gpt' and not '/real/m' or 'm'")
    assert "--ignore-line-model" in text


@pytest.mark.parametrize("models", [[], ["m"]])
def test_the_models_of_lines_can_be_ignored(tmp_path: Path, models: list[str]) -> None:
    lines = b'{"prompt":"a","model":"x"}\n{"prompt":"b","model":"y"}'
    with PromptFile(write(tmp_path, lines), models=models, ignore_line_model=True) as prompts:
        assert len(list(prompts)) == 2
        assert prompts.model is None


def test_without_a_model_the_first_one_named_is_the_files(tmp_path: Path) -> None:
    lines = b'{"prompt":"a"}\n{"prompt":"b","model":"m"}\n{"prompt":"c","model":"m"}\n'
    with PromptFile(write(tmp_path, lines)) as prompts:
        assert len(list(prompts)) == 3
        assert prompts.model == "m"
    caught = error(write(tmp_path, lines + b'{"prompt":"d","model":"n"}'))
    assert [":4: model is 'n' and not 'm'" in text for text in caught.problems] == [True]


def test_a_line_names_an_adapter_by_its_key_or_by_its_models(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "a", "adapter": "sql"},
        {"prompt": "b", "model": "sql"},
        {"messages": [HELLO], "adapter": "sql", "model": "m"},
        {"prompt": "d", "adapter": "x", "model": "x"},
        {"prompt": "e", "adapter": None, "model": "m"},
        openai({"model": "x", "messages": [HELLO], "max_tokens": 3}),
        openai({"prompt": "g", "adapter": "sql"}, COMPLETIONS, custom_id="g"),
    ]
    path = write(tmp_path, "\n".join(map(json.dumps, lines)).encode())
    named = [each.adapter for each in requests(path, models=["m"], adapters=["sql", "x"])]
    assert named == ["sql", "sql", "sql", "x", None, "x", "sql"]
    with PromptFile(path, adapters=["sql", "x", "unused"]) as prompts:
        assert len(list(prompts)) == 7
        assert (prompts.model, prompts.unnamed_adapters) == ("m", ["unused"])
    ignored = requests(path, models=["other"], adapters=["sql", "x"], ignore_line_model=True)
    assert [each.adapter for each in ignored] == named


@pytest.mark.parametrize(
    ("line", "adapters", "said"),
    [
        ({"adapter": "sql"}, [], "adapter is 'sql', an adapter that was not declared; --adapter NAME declares one"),
        ({"adapter": "sq"}, ["x", "sql"], "adapter is 'sq', none of the adapters 'sql', 'x'; --adapter NAME declares"),
        ({"adapter": 5}, ["x"], "adapter must be a string"),
        ({"adapter": ""}, ["x"], "adapter must be a string that is not empty"),
        ({"adapter": "x", "model": "sql"}, ["x", "sql"], "model is 'sql', and adapter is 'x'; name one of them"),
        ({"model": "sq"}, ["sql"], "model is 'sq' and not 'm' or 'sql'; -m MODEL --ignore-line-model"),
        ({"adapter": "x", "model": "n"}, ["x"], "model is 'n' and not 'm' or 'x'"),
    ],
)
def test_an_adapter_that_cannot_be_is_a_bad_line(
    problem: Callable[..., str], line: dict[str, Any], adapters: list[str], said: str
) -> None:
    assert problem({"prompt": "p"} | line, models=["m"], adapters=adapters).startswith(said)
    body = openai({"messages": [HELLO]} | line)
    assert said.split(";")[0].removeprefix("adapter ") in problem(body, models=["m"], adapters=adapters)


def test_without_any_model_the_file_has_none(tmp_path: Path) -> None:
    with PromptFile(write(tmp_path, GOOD)) as prompts:
        list(prompts)
        assert prompts.model is None
