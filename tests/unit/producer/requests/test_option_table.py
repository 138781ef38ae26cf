"""The table of the sampler's options: complete, the same in the help and in the documentation, true to the fallback."""

from __future__ import annotations

import re
from dataclasses import fields

import click
import pytest
from click.testing import CliRunner

from batchmill.jobs.requests.generation import SamplingParams
from batchmill.producer.cli.submit import run, submit
from batchmill.producer.requests.checks import BadLine
from batchmill.producer.requests.option_table import (
    FLAG_GROUPS,
    FLAGS,
    MAX_INT32,
    OPTIONS,
    SamplingOption,
    markdown_table,
)
from batchmill.producer.requests.options import CHAT_SAMPLING, PROMPT_SAMPLING

NAMES = {each.name for each in fields(SamplingParams)}


def rows() -> list[list[str]]:
    """The cells of the Markdown table below its head."""
    head, line, *found = markdown_table().splitlines()
    assert (head, line) == ("| Key | Flag | Values | Default | Meaning |", "| --- | --- | --- | --- | --- |")
    return [each.removeprefix("| ").removesuffix(" |").split(" | ") for each in found]


def help_of(command: click.Command) -> str:
    return " ".join(CliRunner().invoke(command, ["--help"]).output.split())


def test_each_field_of_the_parameters_is_one_option() -> None:
    assert len(OPTIONS) == len(NAMES)
    assert {each.name for each in OPTIONS} == NAMES


def test_the_documentation_has_each_option_once_with_its_other_names() -> None:
    keys = [re.findall(r"`(\w+)`", cells[0]) for cells in rows()]
    assert [names[0] for names in keys] == [each.name for each in OPTIONS]
    assert sorted(key for names in keys for key in names) == sorted(CHAT_SAMPLING.keys() - {"echo"})


def test_a_row_says_everything_in_one_line() -> None:
    for option, cells in zip(OPTIONS, rows(), strict=True):
        assert len(cells) == 5, option.name
        assert all(cell for place, cell in enumerate(cells) if place != 1), option.name
        assert cells[1] == (f"`{option.flag_name}`" if option.flag is not None else "")


@pytest.mark.parametrize("command", [submit, run], ids=lambda command: command.name)
def test_the_help_of_every_flag_is_that_of_the_table(command: click.Command) -> None:
    text = help_of(command)
    for option, _ in FLAGS:
        assert f" {option.flag_name} " in text
        assert option.flag_help in text


@pytest.mark.parametrize("command", [submit, run], ids=lambda command: command.name)
def test_the_flags_stand_below_the_groups_of_the_table(command: click.Command) -> None:
    groups = {title: command.groups[title] for title in FLAG_GROUPS}  # type: ignore[attr-defined]
    for option, flag in FLAGS:
        assert [title for title, names in groups.items() if option.name in names] == [flag.group]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_a_default_is_said_once(option: SamplingOption) -> None:
    """That of the fallback is not written a second time, and any other is said."""
    fallback = getattr(SamplingParams.fallback(), option.name)
    assert (fallback is None) == bool(option.default)
    if fallback is not None:
        assert option.flag_help.endswith(f"(default {fallback}).")


@pytest.mark.parametrize(
    "option", [each for each in OPTIONS if each.values.words.startswith("a number")], ids=lambda each: each.name
)
def test_the_words_about_a_number_are_its_bounds(option: SamplingOption) -> None:
    low, *high = (float(each) for each in re.findall(r"-?[\d.]+", option.values.words))
    assert option.values.check(high[0]) == high[0]
    for bad in (low - 1, high[0] + 1):
        with pytest.raises(BadLine):
            option.values.check(bad)


@pytest.mark.parametrize(
    "option", [each for each in OPTIONS if each.values.words.startswith("an integer from")], ids=lambda each: each.name
)
def test_the_words_about_an_integer_are_its_bounds(option: SamplingOption) -> None:
    low, *high = (int(each) for each in re.findall(r"\d+", option.values.words.partition(";")[0]))
    highest = high[0] if high else MAX_INT32
    assert (option.values.check(low) or 0, option.values.check(highest)) == (low, highest)
    with pytest.raises(BadLine):
        option.values.check(highest + 1)


def test_a_flag_takes_a_top_p_of_zero_as_a_line_does() -> None:
    context = submit.make_context("submit", ["prompts.jsonl", "-m", "echo", "--top-p", "0"])
    assert context.params["top_p"] == 0.0


def test_a_prompt_has_a_check_of_its_own_where_a_row_says_so() -> None:
    differing = {key for key in CHAT_SAMPLING if CHAT_SAMPLING[key] is not PROMPT_SAMPLING[key]}
    assert differing == {each.name for each in OPTIONS if each.beside_prompt is not None} == {"logprobs"}
    assert CHAT_SAMPLING.keys() == PROMPT_SAMPLING.keys()
