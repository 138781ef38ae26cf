"""Rates of devices: from data sheets, or measured on the spot."""

from __future__ import annotations

import time

import torch

from batchmill.worker.plan.hardware import known_rates, this_cpu


def test_rates_are_those_of_a_data_sheet_by_the_whole_name_or_not_at_all() -> None:
    assert known_rates("NVIDIA H200").bytes_per_second == 4.8e12  # type: ignore[union-attr]
    assert known_rates("NVIDIA L40S").operations_per_second[torch.bfloat16] == 362e12  # type: ignore[union-attr]
    assert known_rates("NVIDIA L40").operations_per_second[torch.bfloat16] == 181e12  # type: ignore[union-attr]
    assert known_rates("Tesla V100-SXM2-32GB").bytes_per_second == 900e9  # type: ignore[union-attr]
    assert known_rates("NVIDIA L400") is None
    assert known_rates("") is None


def test_a_cpu_is_measured_on_the_spot_in_less_than_seconds() -> None:
    began = time.process_time()
    rates = this_cpu().rates
    assert time.process_time() - began < 5, "a fraction of a second on an idle machine"
    assert rates is not None
    assert 1e8 < rates.bytes_per_second < 1e13
    assert all(1e8 < each < 1e15 for each in rates.operations_per_second.values())
