"""Guidance: functions from denoisers to a denoiser, so that samplers need not know of it.

Each is a frozen dataclass, named in YAML as `guidance: {class_path: mmdiff.guidance.APG, init_args: {scale: 4}}` of a
`Generate` stage, and nests where it takes a `guidance` of its own; a plain number there is `Cfg` of that scale.
Everywhere scale 1 is the conditional estimate, 0 the unconditional one, and above 1 guides; a rule that has no such
end refuses it or says so.
"""

from .adaptive import APG, CfgPP, CfgZero
from .limits import Classifier, Interval, Rescale, Threshold
from .rules import Autoguidance, Bind, Cfg, Compose, Guidance, OverTime, as_guidance, cfg, compose
from .together import together

__all__ = [
    "APG",
    "Autoguidance",
    "Bind",
    "Cfg",
    "CfgPP",
    "CfgZero",
    "Classifier",
    "Compose",
    "Guidance",
    "Interval",
    "OverTime",
    "Rescale",
    "Threshold",
    "as_guidance",
    "cfg",
    "compose",
    "together",
]
