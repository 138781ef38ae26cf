"""Strategies of hypothesis for ModelSpecs of every kind."""

from __future__ import annotations

from hypothesis import strategies as st

from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def quantization_of(kind: Kind) -> st.SearchStrategy[Quantization]:
    written = {
        "compute_dtype": st.sampled_from(["bfloat16", "float16", "float32"]),
        "double_quant": st.sampled_from(["true", "false"]),
        "skip_modules": st.lists(st.sampled_from(["lm_head", "a.b", "layers.0"]), min_size=1).map("+".join),
        "threshold": st.floats(0, 1e6).map(str),
        "fp32_cpu_offload": st.sampled_from(["true", "false"]),
        "dtype": st.sampled_from(["bfloat16", "float16", "float32"]),
    }
    options = Quantization(kind).options
    pairs = st.fixed_dictionaries({}, optional={name: written[name] for name in options})
    text = pairs.flatmap(lambda each: st.permutations([f"{name}={value}" for name, value in each.items()]))
    return text.map(lambda each: Quantization.parse(f"{kind}:{','.join(each)}" if each else kind.value))


quantizations = st.sampled_from(Kind).flatmap(quantization_of)
specs = st.builds(ModelSpec, texts, st.none() | texts, quantizations)
