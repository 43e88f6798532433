"""Callbacks for training with Lightning."""

from .blocks import Compile, Recompute
from .checkpoints import Checkpoints
from .doctor import Doctor
from .ema import EMA, PowerFunction
from .exact import ExactResume
from .finite import FiniteSteps
from .history import History
from .likelihood import BitsPerDim
from .monitor import Monitor
from .noise_levels import LossByNoiseLevel
from .reconstructions import Reconstructions
from .run_record import RunRecord
from .samples import Samples, Show, ShowClips

__all__ = [
    "EMA",
    "BitsPerDim",
    "Checkpoints",
    "Compile",
    "Doctor",
    "ExactResume",
    "FiniteSteps",
    "History",
    "LossByNoiseLevel",
    "Monitor",
    "PowerFunction",
    "Recompute",
    "Reconstructions",
    "RunRecord",
    "Samples",
    "Show",
    "ShowClips",
]
