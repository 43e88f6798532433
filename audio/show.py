"""Sounds in TensorBoard: players, and for spectrograms pictures."""

from typing import Any

from torch import Tensor

from mmdiff.callbacks.samples import Show


class ShowAudio(Show):
    """Logs waveforms (N, C, T) as sounds that play, spectrograms (N, 1, T, F) as pictures with time to the right.

    A waveform louder than full scale is clipped, never normalised: the file's level is the model's.
    """

    def __call__(self, experiment: Any, tag: str, data: Tensor, rate: float, captions: list[str], step: int) -> None:
        for i, clip in enumerate(data.float().cpu()):
            if clip.ndim == 2:
                experiment.add_audio(f"{tag}/{i}", clip.mean(dim=0).clamp(-1, 1), step, sample_rate=round(rate))
            else:
                low, high = clip.min(), clip.max()
                picture = (
                    ((clip - low) / (high - low).clamp(min=1e-6)).transpose(1, 2).flip(1)
                )  # (1, F, T), low notes below
                experiment.add_image(f"{tag}/{i}", picture, step)
        experiment.add_text(f"{tag}/captions", "\n\n".join(captions), step)
