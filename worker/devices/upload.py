"""The upload of small arrays from the host to the device, which does not wait for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def upload(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """Returns the array on the device. On a CPU both share memory, so the array must not be changed afterwards."""
    return torch.from_numpy(array).to(device, non_blocking=True)
