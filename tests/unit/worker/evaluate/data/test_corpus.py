"""The data of an evaluation: texts that are scored, questions that are asked, and bad data that is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from tokenizers import processors

from batchmill.jobs.errors import UsageError
from batchmill.worker.evaluate.data.corpus import MAX_LINE_BYTES, Corpus
from batchmill.worker.evaluate.data.passages import PROMPT_TOKENS, Passages
from batchmill.worker.evaluate.measures.accuracy import Match, check_answers
from batchmill.worker.models.load import LoadedModel
from tests.support.models.families import load_family

BEGIN = 0


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    """Its tokenizer makes one token of each byte, and begins a text with token 0."""
    return load_family("llama-grouped")


def corpus(folder: Path, *lines: object, name: str = "data.jsonl") -> Corpus:
    file = folder / name
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return Corpus.read(file, tokens=1_000)


def said(loaded: LoadedModel, tokens: tuple[int, ...]) -> str:
    return str(loaded.tokenizer.decode(tokens))


def test_running_text_is_one_passage_and_its_hash_that_of_the_whole_file(tmp_path: Path, llama: LoadedModel) -> None:
    raw = b"\xef\xbb\xbf" + "Grüße\n\nEnde".encode() * 200_000
    (tmp_path / "a.TXT").write_bytes(raw)
    read = Corpus.read(tmp_path / "a.TXT", tokens=50)
    assert (read.name, read.sha256) == ("a.TXT", hashlib.sha256(raw).hexdigest())
    [example] = read.examples
    assert example.text is not None
    assert example.text.startswith("Grüße\n\nEnde")
    assert len(example.text.encode()) < 1.1 * 2**20
    [passage] = Passages(read, llama).scored(50)
    assert (passage.begin, passage.first, passage.scored) == ((BEGIN,), 0, 50)


def test_json_lines_are_read_until_they_suffice(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "%s"}\n' % ("x" * 300_000) * 8 + "not JSON\n")
    assert len(Corpus.read(file, tokens=10).examples) == 4
    with pytest.raises(UsageError, match=r"data\.jsonl:9: is not JSON: Expecting value at column 1"):
        Corpus.read(file, tokens=1_000_000)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"', "is not JSON: Expecting ',' delimiter"),
        ("[1]", "is no JSON object"),
        ("{}", "holds no text"),
        ('{"custom_id": "a", "text": null}', "holds no text"),
        ('{"text": "a", "prompt": "b"}', "holds text and prompt"),
        ('{"text": "a", "answer": "b"}', "holds text and answer"),
        ('{"text": 1}', "text must be a string"),
        ('{"prompt": "a", "answer": 85}', "answer must be a string"),
        ('{"messages": []}', "messages must be"),
        ('{"messages": [{"role": "user"}]}', "messages must be"),
        ('{"messages": [{"content": "secret"}]}', "messages must be"),
        ('{"messages": [{"role": [], "content": "secret"}]}', "messages must be"),
        ('{"messages": [{"role": "assistant", "content": "secret", "tool_calls": [1]}]}', "messages with tool_calls"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_bad_line_is_named_and_not_quoted(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(UsageError) as raised:
        Corpus.read(file, tokens=100_000)
    assert str(raised.value).startswith(f"{file}:3: {said}")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.jsonl", b"\n\n", "holds no text"),
        ("a.txt", b"one\ntwo \xff", "a.txt:2: is not UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl:1: is not UTF-8"),
        ("a.txt", "one".encode("utf-16"), "a.txt: is UTF-16; text is read as UTF-8, so convert it: iconv -f UTF-16"),
        ("a.jsonl", b"\x1f\x8b\x08\n", "a.jsonl: is compressed by gzip"),
        ("a.jsonl", b"x" * (MAX_LINE_BYTES + 1), "a.jsonl:1: is longer than 16 MiB"),
    ],
)
def test_a_file_without_readable_text_is_refused(tmp_path: Path, name: str, raw: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UsageError, match=said):
        Corpus.read(tmp_path / name, tokens=100)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(UsageError, match="cannot be read"):
            Corpus.read(path, tokens=10)


def test_an_answer_is_scored_after_its_prompt_and_a_prompt_alone_as_text(tmp_path: Path, llama: LoadedModel) -> None:
    read = corpus(
        tmp_path,
        {"prompt": "2 + 3 =", "answer": "5"},
        {"prompt": "2 + 3 = ", "answer": "5"},
        {"messages": [{"role": "user", "content": "hi"}], "answer": "ho"},
        {"prompt": "abc"},
        {"prompt": "def", "answer": ""},
    )
    passages = Passages(read, llama).scored(1_000)
    assert [(said(llama, each.tokens[each.first :]), each.begin) for each in passages] == [
        (" 5", (BEGIN,)),
        ("5", (BEGIN,)),
        ("ho", (BEGIN,)),
        ("abc", (BEGIN,)),
        ("def", (BEGIN,)),
    ]
    assert said(llama, passages[2].tokens) == "[user]hi[assistant]ho"


def test_so_many_tokens_are_scored_and_no_more(tmp_path: Path, llama: LoadedModel) -> None:
    read = corpus(tmp_path, {"text": "abcde"}, {"text": "fghij"}, {"text": "klmno"})
    for most, expected in ((3, [3]), (5, [5]), (7, [5, 2]), (100, [5, 5, 5])):
        assert [each.scored for each in Passages(read, llama).scored(most)] == expected


def test_texts_that_are_too_short_are_refused(tmp_path: Path) -> None:
    llama = load_family("llama-grouped")
    llama.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(UsageError, match=r"data\.jsonl: none of its texts is long enough"):
        Passages(corpus(tmp_path, {"text": ""}, {"text": "a"}), llama).scored(9)


def test_what_a_chat_template_refuses_is_named_by_its_line(tmp_path: Path, llama: LoadedModel) -> None:
    read = corpus(tmp_path, {"text": "a"}, {"messages": [{"role": "tool", "content": "secret"}], "answer": "b"})
    with pytest.raises(UsageError, match=r"data\.jsonl:2: the chat template refused the messages") as raised:
        Passages(read, llama).scored(100)
    assert "secret" not in str(raised.value)


def test_the_datas_questions_are_asked_evenly_and_greedily(tmp_path: Path, llama: LoadedModel) -> None:
    lines = [{"prompt": f"{number} +", "answer": str(number)} for number in range(10)]
    read = corpus(tmp_path, {"text": "not asked"}, *lines)
    questions = Passages(read, llama).questions(4, max_tokens=5, context_tokens=None)
    assert [(each.request.prompt, each.answer) for each in questions] == [
        ("0 +", "0"), ("2 +", "2"), ("5 +", "5"), ("7 +", "7"),
    ]  # fmt: skip
    assert {(each.request.sampling.temperature, each.request.sampling.max_tokens) for each in questions} == {(0.0, 5)}
    assert [each.request.index for each in questions] == [0, 1, 2, 3]


def test_texts_without_questions_are_continued_from_places_in_them(tmp_path: Path, llama: LoadedModel) -> None:
    long = "".join(chr(33 + number % 90) for number in range(3 * PROMPT_TOKENS))
    read = corpus(tmp_path, {"text": "abcdef"}, {"text": long})
    questions = Passages(read, llama).questions(10, max_tokens=5, context_tokens=None)
    assert [each.request.prompt for each in questions] == [
        "abc",
        long[:PROMPT_TOKENS],
        long[PROMPT_TOKENS : 2 * PROMPT_TOKENS],
    ]
    assert {each.answer for each in questions} == {None}


def test_a_question_that_leaves_no_room_to_answer_is_left_out(tmp_path: Path, llama: LoadedModel) -> None:
    read = corpus(tmp_path, {"prompt": "abc"}, {"prompt": "abcdefghi"})
    questions = Passages(read, llama).questions(9, max_tokens=5, context_tokens=10)
    assert [(each.request.prompt, each.prompt_tokens) for each in questions] == [("abc", 4)]


def test_an_answer_that_is_no_regex_is_named_by_its_line(tmp_path: Path) -> None:
    read = corpus(tmp_path, {"prompt": "a", "answer": "a+"}, {"prompt": "b", "answer": "(b"})
    check_answers(read, Match.EXACT)
    with pytest.raises(UsageError, match=r"data\.jsonl:2: answer is no regex"):
        check_answers(read, Match.REGEX)
