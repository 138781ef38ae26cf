"""Quantization: the form in which a model's weights are held, parsed from `-q` into one canonical spelling.

Owns the kinds, the options that each takes, and their contradictions. It knows no device: worker.models.load says
whether one honours an option.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

from batchmill.jobs.errors import UsageError

#: LLM.int8()'s own threshold: columns of the input with larger values are computed in 16 bits.
INT8_THRESHOLD = 6.0
_DTYPES = ("bfloat16", "float16", "float32")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
#: Between the modules of one option, since a comma is between options.
_MODULES_SEPARATOR = "+"


class Kind(StrEnum):
    """The way in which weights are quantized while they are loaded."""

    NF4 = "nf4"  #: bitsandbytes' 4-bit NormalFloat
    FP4 = "fp4"  #: bitsandbytes' 4-bit float
    INT8 = "int8"  #: LLM.int8()
    NONE = "none"  #: nothing
    CHECKPOINT = "checkpoint"  #: they are quantized already, as the model's folder says


Value = bool | float | str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Option:
    """One option of a kind."""

    #: The value where the option is not written; such a value is never spelled.
    default: Value | None
    parse: Callable[[str], Value]
    spell: Callable[[Value], str]


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError("true or false")
    return text == "true"


def _threshold(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("a number, 0 or larger") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError("a number, 0 or larger")
    return value + 0.0  # a zero without a sign


def _dtype(text: str) -> str:
    if text not in _DTYPES:
        raise ValueError(" or ".join((", ".join(_DTYPES[:-1]), _DTYPES[-1])))
    return text


def _modules(text: str) -> tuple[str, ...]:
    names = text.split(_MODULES_SEPARATOR)
    if not all(map(_MODULE.fullmatch, names)):
        raise ValueError(f"names of modules with {_MODULES_SEPARATOR} between them, such as lm_head+model.layers.0")
    return tuple(sorted(set(names)))


def _spell_flag(value: Value) -> str:
    return "true" if value else "false"


def _spell_number(value: Value) -> str:
    return repr(value).removesuffix(".0")


def _spell_modules(value: Value) -> str:
    assert isinstance(value, tuple)
    return _MODULES_SEPARATOR.join(value)


_DOUBLE_QUANT = _Option(True, _flag, _spell_flag)
_SKIP_MODULES = _Option((), _modules, _spell_modules)
_FOUR_BIT = {
    "compute_dtype": _Option(_DTYPES[0], _dtype, str),
    "double_quant": _DOUBLE_QUANT,
    "skip_modules": _SKIP_MODULES,
}
_OPTIONS: Mapping[Kind, Mapping[str, _Option]] = {
    Kind.NF4: _FOUR_BIT,
    Kind.FP4: _FOUR_BIT,
    Kind.INT8: {
        "fp32_cpu_offload": _Option(False, _flag, _spell_flag),
        "skip_modules": _SKIP_MODULES,
        "threshold": _Option(INT8_THRESHOLD, _threshold, _spell_number),
    },
    Kind.NONE: {"dtype": _Option(None, _dtype, str)},
    Kind.CHECKPOINT: {},
}


@dataclass(frozen=True, slots=True)
class Quantization:
    """A kind and the options that differ from its defaults. Equal ones are equal and spell the same."""

    kind: Kind = Kind.NF4
    _written: tuple[tuple[str, Value], ...] = field(default=())

    @classmethod
    def parse(cls, text: str) -> Quantization:
        """The quantization of `nf4` or `nf4:compute_dtype=float16,double_quant=false`.

        Raises UsageError, which names it, for an unknown kind or option, and for an option written twice.
        """
        name, colon, rest = text.partition(":")
        try:
            kind = Kind(name)
        except ValueError:
            raise UsageError(f"unknown quantization {name!r}; choose one of {', '.join(Kind)}") from None
        if colon and not rest:
            raise UsageError(f"-q {text}: no options are written after the colon")
        return cls(kind, tuple(sorted(_values(kind, rest).items())))

    @property
    def canonical(self) -> str:
        """The one spelling: the kind, and in alphabetical order the options that are not as by default."""
        options = _OPTIONS[self.kind]
        spelled = ",".join(f"{name}={options[name].spell(value)}" for name, value in self._written)
        return f"{self.kind.value}:{spelled}" if spelled else self.kind.value

    @property
    def options(self) -> Mapping[str, Value | None]:
        """Every option that this kind takes: as written, or else by default."""
        defaults = {name: option.default for name, option in _OPTIONS[self.kind].items()}
        return MappingProxyType(defaults | dict(self._written))

    @property
    def four_bit(self) -> bool:
        return self.kind in (Kind.NF4, Kind.FP4)

    @property
    def compute_dtype(self) -> str:
        """The dtype in which a 4-bit kind multiplies. bfloat16 stands for the device's best dtype of 16 bits."""
        return self._text("compute_dtype")

    @property
    def double_quant(self) -> bool:
        """True where the scales of a 4-bit kind are quantized too."""
        return self.options["double_quant"] is True

    @property
    def dtype(self) -> str | None:
        """The dtype of weights that are not quantized; None leaves the choice to the device."""
        return self._text("dtype") if self.options["dtype"] is not None else None

    @property
    def threshold(self) -> float:
        """The threshold of LLM.int8(); 0 for none."""
        value = self.options["threshold"]
        assert isinstance(value, float)
        return value

    @property
    def fp32_cpu_offload(self) -> bool:
        """True where layers that stay on the CPU are kept in float32 beside those in int8."""
        return self.options["fp32_cpu_offload"] is True

    @property
    def skip_modules(self) -> tuple[str, ...]:
        """Modules that are not quantized, besides those that never are."""
        value = self.options.get("skip_modules") or ()
        assert isinstance(value, tuple)
        return value

    def _text(self, name: str) -> str:
        value = self.options[name]
        assert isinstance(value, str)
        return value

    def __str__(self) -> str:
        return self.canonical


#: The default.
NF4 = Quantization()


def _values(kind: Kind, text: str) -> dict[str, Value]:
    """The options of `a=b,c=d` that differ from the defaults of this kind."""
    values: dict[str, Value] = {}
    for name, written in _pairs(kind, text):
        option = _option(kind, name)
        try:
            value = option.parse(written)
        except ValueError as error:
            raise UsageError(f"-q {kind}: {name} takes {error}, not {written!r}") from None
        if name in values:
            raise UsageError(f"-q {kind}: {name} is written twice")
        values[name] = value
    return {name: value for name, value in values.items() if value != _OPTIONS[kind][name].default}


def _pairs(kind: Kind, text: str) -> Iterator[tuple[str, str]]:
    for pair in text.split(",") if text else ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"-q {kind}: {pair!r} is no option; write NAME=VALUE, such as {_example(kind)}")
        yield name, value


def _option(kind: Kind, name: str) -> _Option:
    known = _OPTIONS[kind]
    if name in known:
        return known[name]
    takers = [each.value for each in Kind if name in _OPTIONS[each]]
    if takers:
        raise UsageError(f"-q {kind} takes no {name}, which goes with {', '.join(takers)}; {_takes(kind)}")
    raise UsageError(f"-q {kind} has no option {name!r}; {_takes(kind)}")


def _takes(kind: Kind) -> str:
    names = ", ".join(_OPTIONS[kind])
    return f"{kind} takes {names}" if names else f"{kind} takes no options"


def _example(kind: Kind) -> str:
    return {Kind.INT8: "threshold=0", Kind.NONE: "dtype=float16"}.get(kind, "double_quant=false")
