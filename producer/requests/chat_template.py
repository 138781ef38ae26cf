"""Chats for a model folder without a chat template: refused when they are submitted, where the folder is here."""

from __future__ import annotations

import json
from collections.abc import Iterable

from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.generation import GenerationRequest
from batchmill.jobs.requests.request import JobOptions, Request


def lacks_chat_template(spec: ModelSpec) -> bool:
    """True for a folder here whose files hold no chat template."""
    folder = spec.folder
    if folder is None or not folder.is_dir():
        return False
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json", "chat_templates")):
        return False
    config = folder / "tokenizer_config.json"
    try:
        written = json.loads(config.read_text(encoding="utf-8")) if config.exists() else None
    except ValueError:
        return True
    except OSError:
        return False  # the workers may be allowed to read it, and say so if not
    return not (isinstance(written, dict) and written.get("chat_template"))


def refuse_chat_options(options: JobOptions, spec: ModelSpec) -> None:
    """Raises UsageError for flags that are for chats alone."""
    flags, lacking = options.to_json(), f"the model folder {spec.model} has no chat template"
    if "system" in flags:
        raise UsageError(f"--system makes chats, and {lacking}")
    if "chat_template_kwargs" in flags:
        raise UsageError(f"--chat-template-kwargs is for a chat template, and {lacking}")


def refuse_messages(numbered: Iterable[tuple[int, Request]], spec: ModelSpec) -> None:
    """Raises UsageError for the first of these requests, by their lines, that is a chat."""
    for number, request in numbered:
        if isinstance(request, GenerationRequest) and request.messages is not None:
            raise UsageError(
                f"line {number} has messages, and the model folder {spec.model} has no chat template: "
                "add chat_template.jinja to it, or submit plain prompts"
            )
