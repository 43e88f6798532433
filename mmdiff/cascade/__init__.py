"""From a prompt to a clip: stages, each of which makes a clip from the prompt and the clip of the stage before."""

from .cascade import Cascade
from .decode import Decode
from .generate import Generate, droppable
from .stage import Clip, Progress, Shape, Stage, batch_size, reduced

__all__ = ["Cascade", "Clip", "Decode", "Generate", "Progress", "Shape", "Stage", "batch_size", "droppable", "reduced"]
