"""The keys of an adapter's configuration: those that are served, those that change no answer, and those refused.

An unknown key is refused unless it is empty, so that nothing an adapter was trained with is dropped silently. This
module knows the names of peft's LoraConfig, and loads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchmill.worker.models.vetting import Refusal

#: Keys that name the layers to change, and the scale of their products.
_SERVED = frozenset(
    {
        "r", "lora_alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "rank_pattern", "alpha_pattern", "use_rslora", "lora_bias",
    }
)  # fmt: skip
#: Keys that matter while training, that are known here from elsewhere, or that belong to a key that is itself refused.
_WITHOUT_EFFECT = frozenset(
    {
        "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
        "inference_mode", "lora_dropout", "fan_in_fan_out", "init_lora_weights", "loftq_config", "eva_config",
        "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config",
    }
)  # fmt: skip
#: Values of init_lora_weights that leave the base model's weights as they are.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
_MERGE = "merge it into its base with peft's merge_and_unload, and serve the result as a model"
_EXPLAINED = {
    "use_dora": "it is a DoRA adapter, which scales the base's weights too",
    "modules_to_save": "it replaces whole modules of the base (modules_to_save)",
    "trainable_token_indices": "it replaces embeddings of the base (trainable_token_indices)",
    "target_parameters": "it changes parameters that are no layers of their own (target_parameters)",
    "layer_replication": "it repeats layers of the base (layer_replication)",
}


def lora_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of peft's LoraConfig. Raises Refusal for a configuration that cannot be served rightly."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise Refusal(f"its adapter_config.json has peft_type {str(kind)[:50]!r}, and only LORA is served")
    beginning = config.get("init_lora_weights", True)
    if not any(beginning is each or (isinstance(each, str) and beginning == each) for each in _BEGINNINGS):
        raise Refusal(
            f"it was trained over changed weights of the base (init_lora_weights {str(beginning)[:50]!r}): "
            "convert it with peft's path_initial_model_for_weight_conversion"
        )
    if config.get("bias", "none") != "none":
        raise Refusal(f"it replaces biases of the base (bias {str(config['bias'])[:50]!r}): {_MERGE}")
    for key, value in config.items():
        if value and key not in _SERVED | _WITHOUT_EFFECT | {"bias"}:
            why = _EXPLAINED.get(key, f"its adapter_config.json sets {key[:100]}, which is not served")
            raise Refusal(f"{why}: {_MERGE}")
    return {key: value for key, value in config.items() if key in _SERVED and value is not None}
