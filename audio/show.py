"""Sounds in files that play and in TensorBoard, with pictures of their spectrograms."""

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from mmdiff.callbacks.samples import Show

from .files import spectrogram_picture, write_audio


class ShowAudio(Show):
    """Waveforms (N, C, T) as sounds that play, spectrograms (N, 1, T, F) as pictures with time to the right.

    Beside the wav file of a waveform lies a picture of its spectrogram.
    A waveform louder than full scale is clipped, never normalised: the file's level is the model's.
    """

    def __call__(self, experiment: Any, tag: str, data: Tensor, rate: float, captions: list[str], step: int) -> None:
        for i, clip in enumerate(data.float().cpu()):
            if clip.ndim == 2:
                experiment.add_audio(f"{tag}/{i}", clip.mean(dim=0).clamp(-1, 1), step, sample_rate=round(rate))
            else:
                experiment.add_image(f"{tag}/{i}", picture(clip), step)
        experiment.add_text(f"{tag}/captions", "\n\n".join(captions), step)

    def files(self, stem: Path, clip: Tensor, rate: float) -> list[Path]:
        clip, image = clip.float().cpu(), stem.with_name(f"{stem.name}.png")
        if clip.ndim > 2:
            Image.fromarray((picture(clip)[0] * 255).round().byte().numpy()).save(image)
            return [image]
        sound, clip = stem.with_name(f"{stem.name}.wav"), clip.clamp(-1, 1)
        write_audio(sound, clip, round(rate))
        spectrogram_picture(image, clip, round(rate))
        return [sound, image]


def picture(spectrogram: Tensor) -> Tensor:
    """(1, T, F) -> (1, F, T) in [0, 1], low notes below."""
    low, high = spectrogram.min(), spectrogram.max()
    return ((spectrogram - low) / (high - low).clamp(min=1e-6)).transpose(1, 2).flip(1)
