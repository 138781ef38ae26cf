"""Compiles a grammar for the first time, in a process that may be lost.

The library bounds what its lexer and its parser do, but not how deep it descends through a schema's references, nor
how long and how large some schemas become: one can overflow the stack, take hours, or take all memory. So every
grammar is compiled in a process of its own first, whose stack, memory and time are bounded. This file is that
process when it is run, and its owner when it is imported; it loads no torch.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import threading
import weakref

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

#: The limits of a trial. Its stack is half of a thread's usual one, so that a grammar that passes here passes there.
TRIAL_SECONDS = 5
TRIAL_BYTES = 256 * 2**20
TRIAL_STACK_BYTES = 4 * 2**20
#: States that one grammar's lexer may reach, of about 2 kB each: it stands between a regex and the memory.
MAX_LEXER_STATES = 50_000
NOT_ALLOWED = "it does not allow what it has to"
TOO_MUCH = f"compiling it takes more than {TRIAL_SECONDS} seconds, {TRIAL_BYTES // 2**20} MiB or the stack; simplify it"


class Trial:
    """The process that tries grammars, started when the first is to be tried and again after it was lost."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def reason_against(self, grammar: str, beginning: str = "") -> str | None:
        """Returns the reason why this grammar cannot be taken, None if it can.

        Takes about a millisecond, TRIAL_SECONDS at most. `beginning`: the start of an answer that it has to allow.
        """
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([grammar, beginning]) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._stop()
            return TOO_MUCH
        reason: str = json.loads(line)
        return reason or None

    def _started(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
        )
        self._stop = weakref.finalize(self, _stop, process)
        return process


def compiled(library: LLTokenizer, grammar: str) -> LLMatcher:
    """Makes a matcher at the start of a grammar; its `get_error` gives the reason where the grammar is in vain."""
    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    start = LLMatcher(library, grammar, log_level=0, limits=limits)
    # A grammar that allows nothing, or too much at once, is found out by its first mask.
    first = start.deep_copy()
    first.compute_bitmask()
    return first if first.is_error() else start


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _serve() -> None:
    library = LLTokenizer("byte")
    for line in sys.stdin:
        # The end of this process tells the waiting worker that the trial took too long.
        signal.alarm(TRIAL_SECONDS)
        grammar, beginning = json.loads(line)
        start, tokens = compiled(library, grammar), [*beginning.encode()]
        reason = start.get_error()
        if not reason and start.validate_tokens(tokens) < len(tokens):
            reason = NOT_ALLOWED
        signal.alarm(0)
        sys.stdout.write(json.dumps(reason) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    # Signals to a whole group are for the worker, which goes on for a while; the end of stdin ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (TRIAL_BYTES, TRIAL_BYTES))
    threading.stack_size(TRIAL_STACK_BYTES)
    serving = threading.Thread(target=_serve)
    serving.start()
    serving.join()
