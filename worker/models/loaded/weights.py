"""The bytes of a loaded model's weights on each device."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn


def bytes_by_device(model: nn.Module) -> Counter[torch.device]:
    """Counts the bytes of its tensors, the scales of quantized ones too and shared ones once; not offloaded ones."""
    held = (each for each in model.state_dict(keep_vars=True).values() if isinstance(each, Tensor))
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in held if not each.is_meta}
    totals: Counter[torch.device] = Counter()
    for each in storages.values():
        totals[each.device] += each.nbytes()
    return totals
