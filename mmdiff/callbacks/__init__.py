"""Callbacks for training with Lightning."""

from .ema import EMA
from .likelihood import BitsPerDim
from .samples import Samples, Show

__all__ = ["EMA", "BitsPerDim", "Samples", "Show"]
