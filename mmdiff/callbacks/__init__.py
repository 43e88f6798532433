"""Callbacks for training with Lightning."""

from .ema import EMA
from .samples import Samples, Show

__all__ = ["EMA", "Samples", "Show"]
