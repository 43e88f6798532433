"""Edits of a clip by a model that was never trained for them: functions of a denoiser, whatever the modality."""

from .chunks import Chunks
from .edit import Edit
from .extend import extend
from .known import Repaint, infill, inpaint, known_steps, outpaint
from .start import invert, noised, sdedit
from .window import Window, cut, window

__all__ = [
    "Chunks",
    "Edit",
    "Repaint",
    "Window",
    "cut",
    "extend",
    "infill",
    "inpaint",
    "invert",
    "known_steps",
    "noised",
    "outpaint",
    "sdedit",
    "window",
]
