"""Clips in files that play, and in TensorBoard as pictures that move."""

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from mmdiff.callbacks.samples import Show

from .files import write_video


class ShowVideo(Show):
    """Clips (N, 3, T, H, W) in [-1, 1]: an mp4 of each, and in TensorBoard, which plays GIF, all side by side as one.

    `SummaryWriter.add_video` is not used: with current moviepy it drops the video silently.
    """

    def __call__(self, experiment: Any, tag: str, data: Tensor, rate: float, captions: list[str], step: int) -> None:
        frames = torch.cat(list(data.clamp(-1, 1)), dim=-1)  # (3, T, H, N W)
        pixels = ((frames + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()
        pictures = [Image.fromarray(frame) for frame in pixels]
        file = io.BytesIO()
        pictures[0].save(
            file, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / rate), loop=0, disposal=2
        )
        height, width = pixels.shape[1:3]
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.getvalue())
        experiment._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
        experiment.add_text(f"{tag}/captions", "\n\n".join(captions), step)

    def files(self, stem: Path, clip: Tensor, rate: float) -> list[Path]:
        path = stem.with_name(f"{stem.name}.mp4")
        write_video(path, clip.float().clamp(-1, 1).cpu(), rate)
        return [path]
