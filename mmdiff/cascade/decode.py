"""The stage that leaves the space of a model: latents to pixels, a mel spectrogram to a waveform.

B batch, C channels, T time.
"""

from dataclasses import dataclass

import torch

from mmdiff.autoencoder import Autoencoder
from mmdiff.conditioning import Batch
from mmdiff.editing import Edit
from mmdiff.sampling import Noise

from .stage import Clip, Progress, Shape, Stage, reduced


@dataclass(frozen=True)
class Decode(Stage):
    """Decodes the clip before with an autoencoder.

    chunk: latent steps that are decoded at a time, of one clip after the other, by autoencoders that can decode a
    stream; the result is that of the whole up to rounding, in the memory of a chunk. Others decode each clip whole.
    """

    autoencoder: Autoencoder
    chunk: int = 8

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be 1 or more latent steps")

    def needs(self, shape: Shape, rate: float) -> tuple[Shape, float]:
        return reduced(self.autoencoder, shape, rate)

    def way_back(self) -> Autoencoder:
        return self.autoencoder

    @torch.inference_mode()
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
        if start is None:
            raise ValueError("a decoding stage needs the clip of a stage before it; put one first in the cascade")
        clips = []
        for done, latents in enumerate(start.data.split(1), start=1):
            parts = [*self.autoencoder.decode_stream(latents.split(self.chunk, dim=2))]
            clips.append(torch.cat(parts, dim=2)[:, :, : shape[1]])  # a last latent may stand for fewer steps
            if progress is not None:
                progress(done, len(start.data))
        data = torch.cat(clips)
        return Clip(data if edit is None else edit.paste(data), rate)
