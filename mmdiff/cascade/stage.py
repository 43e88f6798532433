"""What a stage of a cascade is: a clip of a shape and a rate from the prompt and the clip of the stage before.

B batch, C channels, T time. A clip's data is what its stage works on: pixels, a spectrogram, samples of a waveform.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mmdiff.autoencoder import Autoencoder
from mmdiff.conditioning import Batch
from mmdiff.editing import Edit
from mmdiff.sampling import Noise

Shape = tuple[int, ...]
Progress = Callable[[int, int], None]  # (steps done, steps in all)


@dataclass(frozen=True)
class Clip:
    """data (B, C, T, ...); rate: steps of T per second (frames per second, Hz)."""

    data: Tensor
    rate: float


class Stage(ABC):
    """One step of a cascade. `shape` is (C, T, ...) of the clip it makes."""

    @abstractmethod
    def needs(self, shape: Shape, rate: float) -> tuple[Shape, float] | None:
        """Shape and rate of the clip it must be given to make one of `shape` and `rate`; None: it starts from nothing.

        Raises ValueError where no clip would do.
        """

    @abstractmethod
    def __call__(
        self,
        prompt: Batch,
        start: Clip | None = None,
        *,
        shape: Shape,
        rate: float,
        noise: Noise,
        negative: Batch | None = None,
        progress: Progress | None = None,
        edit: Edit | None = None,
    ) -> Clip:
        """A clip of `shape` and `rate`, for each item of `prompt`, a batch as the conditioner reads it.

        start: clip of the stage before. noise: source of every random number. negative: prompts to guide away from.
        edit: a clip of `shape` to start from or to keep parts of; not given where there is none.
        """

    def way_back(self) -> Autoencoder | None:
        """What makes, of a clip like its own, the one it must be given; None where nothing does."""
        return None

    def back(self, edit: Edit) -> Edit:
        """An edit of the clip it makes, in the space of the clip it must be given. Raises ValueError where none is."""
        way = self.way_back()
        if way is None:
            raise ValueError(f"a {type(self).__name__} stage takes no edits: it has no way back to the stage before it")
        return edit.back(way)


def reduced(autoencoder: Autoencoder, shape: Shape, rate: float) -> tuple[Shape, float]:
    """Shape and rate of the latents of a clip of `shape` and `rate`."""
    return autoencoder.latent_shape(shape), rate / autoencoder.factors[0]


def batch_size(prompt: Batch) -> int:
    """Number of items a prompt describes."""
    return len(next(iter(prompt.values())))
