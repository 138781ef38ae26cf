"""A transformers model as a function from tokens to logits, over the engine's own cache.

Owns the shapes of a step, and the trial of a model before it is served: its logits must be the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from batchmill.jobs.models.quantization import Kind
from batchmill.worker.devices.upload import upload
from batchmill.worker.engine.continuous.attention.backends import AttentionBackend, StepBounds
from batchmill.worker.engine.continuous.attention.cache import Cache, CacheShape
from batchmill.worker.engine.continuous.attention.flash import PAGE_TOKENS
from batchmill.worker.engine.continuous.attention.interface import attention_function
from batchmill.worker.engine.continuous.attention.trial import error_of
from batchmill.worker.engine.continuous.execution.graphs import DecodeGraphs
from batchmill.worker.engine.continuous.scheduling.slots import Slots
from batchmill.worker.engine.continuous.scheduling.step import Copy, Piece, Row
from batchmill.worker.engine.continuous.support import Unsupported, finds_outliers
from batchmill.worker.engine.lora import BASE, Lora, OtherTokens
from batchmill.worker.models.load import LoadedModel
from batchmill.worker.models.loaded.trial import sound_tokens

_TRIAL_TOKENS = 12
#: On a CPU, steps in 16 bits are padded to a multiple of so many tokens, from _EVEN_FROM_TOKENS on: oneDNN compiles a
#: product for each number of tokens, and keeps up to a thousand. Beside 45 million parameters this saves 100 MiB, and
#: takes the same time.
_EVEN_TOKENS, _EVEN_FROM_TOKENS = 8, 32
#: Fixed steps are padded to a multiple of so many rows: among 5 to 11, two threads round a row by its place.
_FIXED_ROWS = 16
#: Tokens of each of two prompts that are tried beside one another.
_COMPANY_TOKENS = 3
#: The largest distance of the trial's logits from the model's own, as a part of their largest: in float32, and where a
#: quantization or a shorter float rounds by the shape of a batch.
_TRIAL_TOLERANCE, _ROUGH_TOLERANCE = 1e-3, 0.1


class Decoder:
    """One model with its cache of `slots.tokens` places. Raises Unsupported.

    `lora`: the adapters that its rows may name.
    `fixed`: a forward always decodes `bounds.rows` rows, so that its shapes do not depend on how many there are.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        shape: CacheShape,
        slots: Slots,
        backend: AttentionBackend,
        bounds: StepBounds,
        *,
        lora: Lora,
        fixed: bool = False,
    ) -> None:
        # Padding tokens write to scratch places behind the slots.
        self._cache = Cache(shape, slots.tokens + PAGE_TOKENS, loaded.device, heads_first=not backend.pages)
        self._model = loaded.model
        self._lora = lora
        self._device = loaded.device
        self.rows, self._fixed = bounds.rows, fixed
        self._unused = slots.tokens
        self._evened = loaded.device.type == "cpu" and shape.dtype.itemsize < torch.float32.itemsize
        self._graphs: DecodeGraphs | None = None
        self._attention = backend.build(self._cache, bounds, fixed)
        # A graph would replay the copies of weights that wait elsewhere from where they were when it was captured;
        # and a search for outlier columns waits for the device, which no graph can.
        if backend.graphs and not loaded.layout.offloaded and not finds_outliers(loaded.model):
            self._graphs = DecodeGraphs(self._decoded, rows=bounds.rows, device=loaded.device)
        if wrong := error_of(self._attention, shape, slots, bounds, loaded.device):
            raise Unsupported(f"of the {backend.name} attention on this device, {wrong}")
        _try(self, loaded, slots)
        for number in lora.numbers.values():
            _try_adapter(self, loaded, slots, lora, number)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values."""
        return self._cache.nbytes

    @property
    def attention_seconds(self) -> float:
        """Seconds spent in attention so far, by the CPU's clock."""
        return self._attention.seconds

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copies within the cache, before the step is computed."""
        self._cache.copy(copies)

    def logits(self, pieces: Sequence[Piece[Any]]) -> torch.Tensor:
        """The next token's logits, (rows, vocabulary), for each piece that ends at its row's newest token."""
        tokens = [token for row, begin, end in pieces for token in row.tokens[begin:end]]
        positions = [place for _, begin, end in pieces for place in range(begin, end)]
        if len(tokens) == len(pieces) and all(piece.sampled for piece in pieces):
            return self._decode(pieces, tokens, positions)
        ends = accumulate(end - begin for _, begin, end in pieces)
        last = [end - 1 for end, piece in zip(ends, pieces, strict=True) if piece.sampled]
        more = self._missing(len(tokens))
        self._attention.plan(pieces, unused=[self._unused] * more)
        adapted = any(piece.row.adapter for piece in pieces)
        owners = [row.adapter for row, begin, end in pieces for _ in range(begin, end)] if adapted else []
        with self._lora.applied(self._lora.assign(owners + [BASE] * more if adapted else [], last)):
            return self._forward(self._row(tokens + [0] * more), self._row(positions + [0] * more), self._row(last)[0])

    def following(self, pieces: Sequence[Piece[Any]], newest: torch.Tensor) -> torch.Tensor:
        """The next logits after one token of each row that only the device knows yet: `newest`, (rows,)."""
        return self._decode(pieces, newest, [piece.begin for piece in pieces])

    def _decode(
        self, pieces: Sequence[Piece[Any]], tokens: torch.Tensor | list[int], positions: list[int]
    ) -> torch.Tensor:
        """Computes one token of each row, and of padding rows behind them where the step's shape needs some.

        A graph holds the launches of the model alone, so a step with adapters runs without.
        """
        rows = len(pieces)
        owners = [piece.row.adapter for piece in pieces]
        graphs = None if any(owners) else self._graphs
        more = graphs.padded(rows) - rows if graphs else self._missing(rows)
        if self._fixed:
            more = self.rows + -self.rows % _FIXED_ROWS - rows
        row = torch.zeros(rows + more, dtype=torch.long, device=self._device)
        row[:rows] = tokens if isinstance(tokens, torch.Tensor) else torch.tensor(tokens)
        places = self._row(positions + [0] * more)
        self._attention.plan(pieces, unused=[self._unused] * more)
        with self._lora.applied(self._lora.assign(owners + [BASE] * more)):
            compute = self._decoded if graphs is None else graphs.run
            return compute(row[None], places)[:rows]

    def _missing(self, tokens: int) -> int:
        """Counts the padding tokens of a step of so many, so that steps come in few sizes."""
        return -tokens % _EVEN_TOKENS if self._evened and tokens >= _EVEN_FROM_TOKENS else 0

    def _decoded(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._forward(tokens, positions, 0)

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor | int) -> torch.Tensor:
        """`keep`: the places whose logits are computed, 0 for all."""
        with attention_function(self._model, self._attention):
            output = self._model(input_ids=tokens, position_ids=positions, logits_to_keep=keep, use_cache=False)
        logits: torch.Tensor = output.logits[0]
        return logits

    def _row(self, numbers: Sequence[int]) -> torch.Tensor:
        # Uploaded without waiting for the step in flight; torch.tensor would wait for it on a GPU.
        return upload(np.array([numbers], dtype=np.int64), self._device)


@torch.inference_mode()
def _try(decoder: Decoder, loaded: LoadedModel, slots: Slots) -> None:
    """Computes a prompt in three pieces, and compares with the model's own forward."""
    sound = sound_tokens(loaded.model, loaded.vocabulary, loaded.device)
    tokens = [sound[7 * place % len(sound)] for place in range(_TRIAL_TOKENS)]
    own = loaded.model(input_ids=torch.tensor([tokens], device=loaded.device), use_cache=False).logits[0].float()
    row = Row(list(tokens), _TRIAL_TOKENS, share=False)
    row.slot = slots.take(_TRIAL_TOKENS)
    in_pieces = []
    for begin, end in ((0, 7), (7, 11), (11, 12)):
        row.tokens = tokens[:end]
        in_pieces.append(decoder.logits([Piece(row, begin, end)])[0].float())
    slots.give(row.held)
    distance = _distance(torch.stack(in_pieces), own[[6, 10, 11]])
    if not distance <= _tolerance(loaded):
        raise Unsupported(f"its answers change when a prompt is read in pieces (by {distance:.1%})")


@torch.inference_mode()
def _try_adapter(decoder: Decoder, loaded: LoadedModel, slots: Slots, lora: Lora, number: int) -> None:
    """Computes a prompt with this adapter beside the same one without, and compares with each alone."""
    sound = sound_tokens(loaded.model, loaded.vocabulary, loaded.device)
    tokens = [sound[5 * place % len(sound)] for place in range(_COMPANY_TOKENS)]
    rows = [Row(list(tokens), len(tokens), share=False, adapter=each) for each in (number, BASE)[: decoder.rows]]
    alone = []
    for row in rows:
        row.slot = slots.take(len(tokens))
        with lora.applied(lora.assign_all(row.adapter)):
            forward = loaded.model(input_ids=torch.tensor([tokens], device=loaded.device), use_cache=False)
        alone.append(forward.logits[0, -1].float())
    try:
        together = decoder.logits([Piece(row, 0, len(tokens)) for row in rows if row.slot is not None]).float()
    except OtherTokens as error:
        raise Unsupported(f"an adapter changes a layer that {error}") from error
    for row in rows:
        if row.slot is not None:
            slots.give(row.slot)
    distance = max(_distance(one, other) for one, other in zip(together, alone, strict=False))
    if not distance <= _tolerance(loaded):
        raise Unsupported(f"answers with an adapter change beside others without (by {distance:.1%})")


def _distance(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest distance of logits from the wanted ones, as a part of the largest of these."""
    smallest = torch.finfo(wanted.dtype).tiny  # of a model that answers some tokens by zeros alone
    return float((logits - wanted).abs().max() / wanted.abs().max().clamp(min=smallest))


def _tolerance(loaded: LoadedModel) -> float:
    exact = loaded.spec.quantization.kind is Kind.NONE and loaded.model.dtype is torch.float32
    return _TRIAL_TOLERANCE if exact else _ROUGH_TOLERANCE
