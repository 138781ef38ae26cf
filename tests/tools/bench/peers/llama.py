"""llama.cpp as a contestant: up to 64 sequences in one context, prompts and single tokens in shared batches.

Driven by its low-level interface as llama-batched-bench and its server do it: what has ended makes room at once. Its
tokens are chosen here, greedily. Its threads spin while they wait for each other, so that any other load on the
machine slows it down many times; GOMP_SPINCOUNT=1000 in the environment bounds that.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tests.tools.bench.contestant import EXACT, Answers, Contestant, longest_first
from tests.tools.bench.peers.gguf_file import gguf_file, write
from tests.tools.bench.workloads import Workload

_ROWS = 64
_BATCH_TOKENS = 4096


class Setting(NamedTuple):
    """`unified`: one cache for all sequences, or one for each. `step_tokens`: what it computes at once."""

    flash_attention: bool
    unified: bool
    step_tokens: int

    def __str__(self) -> str:
        attention = "flash" if self.flash_attention else "plain"
        return f"{attention}, {'one cache' if self.unified else 'caches'}, {self.step_tokens} tokens"


#: With one cache, its flash attention skips what the mask hides below 64 tokens alone.
_SETTINGS = [
    Setting(True, False, 512),
    Setting(True, False, 2048),
    Setting(False, False, 512),
    Setting(True, True, 32),
]


class LlamaCpp(Contestant):
    name: ClassVar[str] = "llama.cpp"
    needs: ClassVar[tuple[str, ...]] = ("llama_cpp", "gguf")
    formats: ClassVar[Mapping[str, str]] = {"nf4": "Q4_0", "int8": "Q8_0", "none": "BF16", EXACT: "F32"}

    @classmethod
    def prepare(cls, folder: Path, weights: str) -> None:
        write(folder, weights)

    def load(self, folder: Path, weights: str, threads: int) -> None:
        import llama_cpp

        self._api = llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(gguf_file(folder, weights)).encode(), parameters)
        if not self._model:
            raise RuntimeError("llama.cpp could not load the model")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._threads = threads
        self._context: Any = None

    def settings(self, workload: Workload) -> Sequence[Any]:
        return _SETTINGS

    def ready(self, workload: Workload, setting: Setting) -> None:
        api = self._api
        if self._context is not None:
            api.llama_free(self._context)
        parameters = api.llama_context_default_params()
        # The prefix that all prompts share has a sequence of its own. A cache is made of pieces of 256 tokens.
        parameters.n_seq_max = _ROWS + bool(workload.shared_tokens)
        parameters.n_ctx = parameters.n_seq_max * (-(-workload.longest_tokens // 256) * 256)
        parameters.n_batch, parameters.n_ubatch = _BATCH_TOKENS, setting.step_tokens
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.flash_attn_type = int(setting.flash_attention)
        parameters.kv_unified = setting.unified
        parameters.no_perf = True
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp made no context for {setting}")

    def run(self, workload: Workload, setting: Setting) -> Answers:
        return Answers.of(_Loop(self._api, self._context, self._vocabulary, workload).run())


class _Batch:
    """The arrays of one llama_batch."""

    def __init__(self, api: Any) -> None:
        size = _BATCH_TOKENS
        self.tokens, self.positions, self.sequences = (np.zeros(size, np.int32) for _ in range(3))
        self.wanted = np.zeros(size, np.int8)
        self._one = np.ones(size, np.int32)
        self.used = 0

        def pointer(array: np.ndarray, kind: Any) -> Any:
            return array.ctypes.data_as(ctypes.POINTER(kind))

        number = ctypes.c_int32
        starts = (ctypes.POINTER(number) * size)()
        for place in range(size):
            starts[place] = ctypes.cast(self.sequences.ctypes.data + 4 * place, ctypes.POINTER(number))
        self._starts = starts
        self.foreign = api.llama_batch(
            n_tokens=0,
            token=pointer(self.tokens, number),
            pos=pointer(self.positions, number),
            n_seq_id=pointer(self._one, number),
            seq_id=ctypes.cast(starts, ctypes.POINTER(ctypes.POINTER(number))),
            logits=pointer(self.wanted, ctypes.c_int8),
        )

    def put(self, tokens: Sequence[int], position: int, sequence: int) -> None:
        """The next tokens of a sequence, of which the last is to be answered."""
        begin, end = self.used, self.used + len(tokens)
        self.tokens[begin:end] = tokens
        self.positions[begin:end] = np.arange(position, position + len(tokens))
        self.sequences[begin:end] = sequence
        self.wanted[begin:end] = 0
        self.wanted[end - 1] = 1
        self.used = end


@dataclass(slots=True)
class _Row:
    """A request that has a sequence: the part of the prompt that is its own, and how much is in the cache."""

    place: int
    own: Sequence[int]
    length: int = 0
    answer: list[int] = field(default_factory=list)


class _Loop:
    """One run over a workload."""

    def __init__(self, api: Any, context: Any, vocabulary: int, workload: Workload) -> None:
        self._api, self._context, self._vocabulary = api, context, vocabulary
        self._memory = api.llama_get_memory(context)
        self._asks, self._shared = workload.asks, workload.shared_tokens
        self._waiting = deque(longest_first(workload.asks))
        self._batch = _Batch(api)
        self._rows: dict[int, _Row] = {}
        self._answers: dict[int, list[int]] = {}

    def run(self) -> list[list[int]]:
        if self._shared:
            self._batch.put(self._asks[0].tokens[: self._shared], 0, _ROWS)
            self._decode()
        while self._waiting or self._rows:
            order = self._fill()
            for sequence, token in zip(order, self._decode(), strict=True):
                self._take(sequence, token)
        return [self._answers[place] for place in range(len(self._asks))]

    def _fill(self) -> list[int]:
        """A token of each row, and as many prompts as there is room for; the sequences in the order of the batch.

        They are in the order of their numbers, since llama.cpp computes only neighbours together.
        """
        used = len(self._rows)
        free = [sequence for sequence in range(_ROWS) if sequence not in self._rows]
        for sequence in free:
            own = self._asks[self._waiting[0]].tokens[self._shared :] if self._waiting else ()
            if not own or used + len(own) > _BATCH_TOKENS:
                break
            used += len(own)
            self._rows[sequence] = _Row(self._waiting.popleft(), own)
        for sequence, row in sorted(self._rows.items()):
            if row.answer:
                self._batch.put(row.answer[-1:], row.length, sequence)
                row.length += 1
            else:
                if self._shared:
                    self._api.llama_memory_seq_cp(self._memory, _ROWS, sequence, -1, -1)
                self._batch.put(row.own, self._shared, sequence)
                row.length = self._shared + len(row.own)
        return sorted(self._rows)

    def _decode(self) -> list[int]:
        """The next token of each sequence of the batch."""
        batch, api = self._batch, self._api
        batch.foreign.n_tokens = batch.used
        answers = int(batch.wanted[: batch.used].sum())
        status = api.llama_decode(self._context, batch.foreign)
        batch.used = 0
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        logits = np.ctypeslib.as_array(api.llama_get_logits(self._context), (answers, self._vocabulary))
        tokens: list[int] = logits.argmax(axis=1).tolist()
        return tokens

    def _take(self, sequence: int, token: int) -> None:
        row = self._rows[sequence]
        row.answer.append(token)
        if len(row.answer) == self._asks[row.place].answer_tokens:
            self._answers[row.place] = row.answer
            del self._rows[sequence]
            self._api.llama_memory_seq_rm(self._memory, sequence, -1, -1)
