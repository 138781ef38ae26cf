"""The flags of `run`, `up` and `worker` about a worker's engine and the placement of its model.

Owns their names and help texts; the settings check their values. It knows no command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchmill.jobs.errors import UsageError

_LONGEST_LABEL = 200


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag and its help."""

    name: str
    #: The field of Settings that the flag gives.
    setting: str
    #: The values that may follow it, None for a switch.
    values: str | None
    help: str


QUANTIZATION_HELP = "nf4 (default), fp4, int8, none or checkpoint; options follow a colon: nf4:double_quant=false."
ENGINE_FLAGS = (
    Flag("--engine", "engine", "auto|continuous|generate", "auto (default) is continuous if the model allows it."),
    Flag("--max-rows", "engine_rows", "N", "Maximum number of requests processed at once."),
    Flag("--context", "context_tokens", "N", "Maximum number of tokens in a prompt and its answer together."),
    Flag("--gpu-memory-fraction", "gpu_memory_fraction", "F", "Fraction of GPU memory to use (default 0.9)."),
    Flag(
        "--dequantize",
        "dequantize",
        "auto|never|always",
        "Keep full-precision copies of 4-bit weights for large batches; auto (default): if memory allows.",
    ),
    Flag("--deterministic", "deterministic", None, "Make answers independent of other requests; slower."),
)
#: These flags give no setting: `setting` is the name of the worker's own parameter.
PLACEMENT_FLAGS = (
    Flag("--max-memory", "max_memory", "DEVICE=SIZE,...", "Maximum memory for weights: cuda:0=20GiB,cpu=60GiB."),
    Flag("--device-map", "device_map", "FILE", "JSON file that maps modules to devices, instead of an even split."),
    Flag("--offload", "offload", "cpu|disk", "Offload weights that do not fit on the device; slow."),
    Flag("--offload-folder", "offload_folder", "DIR", "Folder for the weights that --offload disk writes."),
)
DEVICE_HELP = "auto (default), cpu, cuda, cuda:N or a GPU's UUID; cuda:0+cuda:1 splits the model over both."
FLAG_OF_SETTING = {each.setting: each.name for each in ENGINE_FLAGS}


def check_label(name: str | None) -> None:
    """Raises UsageError for a --name, of a job or a worker, that is too long for any list."""
    if name is not None and len(name) > _LONGEST_LABEL:
        raise UsageError(f"--name has {len(name):,} characters; give it at most {_LONGEST_LABEL}")
