"""Paths of the checkout."""

from __future__ import annotations

from pathlib import Path

#: The top of the checkout.
ROOT = Path(__file__).parents[2]
