"""What an autoencoder makes of clips, beside the clips."""

from typing import Any

import lightning.pytorch as pl

from ..cascade import Clip
from .samples import Show, ShowClips


class Reconstructions(ShowClips):
    """Clips of the first validation batch and their reconstructions, while an `AutoencoderModule` trains.

    count: clips. every: validations between them. What the module's `front` has encoded is decoded by it, so that the
    reconstruction of a spectrogram can be heard. See `ShowClips` for where the clips go.
    """

    def __init__(self, show: Show, count: int = 4, every: int = 1) -> None:
        super().__init__(show, count, every)

    def made(self, pl_module: pl.LightningModule, batch: dict[str, Any]) -> Clip:
        module: Any = pl_module
        made = module.model.reconstruct(module.data(batch)).x
        return Clip(made if module.front is None else module.front.decode(made), float(batch["rate"][0]))

    def given(self, pl_module: pl.LightningModule, batch: dict[str, Any]) -> Clip:
        return Clip(batch["x"], float(batch["rate"][0]))
