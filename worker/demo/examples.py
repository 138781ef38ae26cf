"""Writes the example prompt files for the demo model: `python -m batchmill.worker.demo.examples FOLDER`.

Owns which request shapes the examples show; the questions come from the corpus, held out where training has a
held-out part, so that answers can be checked by eye. The same code always writes the same bytes.
"""

import argparse
import json
import random
from pathlib import Path

from batchmill.worker.demo import corpus

LINES = 320
PLAIN_LINES = 24
MODEL = "demo"


def chat_messages(question: str, choose: random.Random) -> list[dict[str, str]]:
    """A conversation that ends with the question, now and then after a system message."""
    messages = [{"role": "user", "content": question}]
    if choose.random() < 0.3:
        messages.insert(0, {"role": "system", "content": choose.choice(corpus.SYSTEM_MESSAGES)})
    return messages


def sampling(choose: random.Random) -> dict[str, object]:
    """Sampling parameters: greedy for most requests, some of every other kind."""
    token_limit = choose.choice((32, 48, 64))
    shapes: tuple[dict[str, object], ...] = (
        {"max_tokens": token_limit, "temperature": 0},
        {"max_tokens": token_limit, "temperature": 0},
        {"max_tokens": token_limit},
        {"temperature": 0.7, "top_p": 0.9, "seed": choose.randrange(1000), "max_tokens": token_limit},
        {"temperature": 0.7, "top_k": 20, "seed": choose.randrange(1000), "max_tokens": token_limit},
        {"temperature": 0.5, "min_p": 0.1, "seed": choose.randrange(1000), "max_tokens": 64},
        {"temperature": 0, "repetition_penalty": 1.05, "max_tokens": token_limit},
        {"temperature": 0, "stop": ["\n", ","], "max_tokens": 64},
    )
    return choose.choice(shapes)


def openai_line(number: int, question: str, choose: random.Random) -> dict[str, object]:
    """A line as the OpenAI Batch API takes it."""
    body = {"model": MODEL, "messages": chat_messages(question, choose), "max_tokens": 48, "temperature": 0}
    return {"custom_id": f"demo-{number:03d}", "method": "POST", "url": "/v1/chat/completions", "body": body}


def request_line(number: int, question: str, choose: random.Random) -> dict[str, object]:
    """One request in one of the shapes; two thirds of them say their id."""
    shape = number % 3
    if shape == 0:
        return openai_line(number, question, choose)
    line: dict[str, object] = {"custom_id": f"demo-{number:03d}"} if choose.random() < 0.5 else {}
    if shape == 1:
        line["messages"] = chat_messages(question, choose)
    else:
        line["prompt"] = question
    return line | sampling(choose)


def questions(count: int, choose: random.Random) -> list[corpus.Exercise]:
    """More than half are sums, eight are out of its reach, the rest are the other kinds in equal parts."""
    part = count // 7
    chosen = corpus.held_out_examples("addition", count - 3 * part - 8, seed=7)
    chosen += corpus.held_out_examples("other", 8, seed=7)
    for kind in ("spelling", "sorting", "facts"):
        chosen += choose.sample(corpus.held_out_examples(kind, 2 * part, seed=7), part)
    choose.shuffle(chosen)
    return chosen


def write_examples(folder: Path) -> None:
    """Write prompts.jsonl (requests of every shape) and prompts.txt (one plain prompt a line)."""
    choose = random.Random(20)
    prompts = [example.question for example in questions(LINES, choose)]
    lines = [json.dumps(request_line(number, question, choose)) for number, question in enumerate(prompts)]
    folder.mkdir(parents=True, exist_ok=True)
    terse = [example.question for example in questions(8 * PLAIN_LINES, choose) if example.terse]
    for name, texts in (("prompts.jsonl", lines), ("prompts.txt", terse[:PLAIN_LINES])):
        (folder / name).write_text("\n".join(texts) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the example prompt files of batchmill's demo model.")
    parser.add_argument("folder", type=Path, help="where to write prompts.jsonl and prompts.txt")
    write_examples(parser.parse_args().folder)


if __name__ == "__main__":
    main()
