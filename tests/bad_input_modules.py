"""Runs the data modules over a folder of bad files, in a process of its own: IN OUT.

Prints a JSON line for each modality: items, how many were given and how many are bad, by kind, what `bad_items.json`
holds, and the keys of clips that are not those of their own file.
"""

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from audio.data import ClipDataModule as SoundModule
from mmdiff.data.clips import ClipDataModule
from video.data import ClipDataModule as VideoModule


class Nothing(pl.LightningModule):
    """Takes note of the clips."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, torch.Tensor] = {}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen |= dict(zip(batch["key"], batch["x"], strict=True))
        return self.weight * 0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def account(data: ClipDataModule, run: Path) -> dict[str, Any]:
    """Of one epoch of training, with the clips compared to those of their own files."""
    model = Nothing()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=run,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    dataset, bad = data.datasets["train"], data.bad["train"]
    replaced = []
    for place, item in enumerate(dataset.items):
        if item.key in model.seen and not torch.equal(dataset[0, place]["x"], model.seen[item.key]):
            replaced.append(item.key)
    (written,) = run.rglob("bad_items.json")
    return {
        "items": len(dataset), "given": len(model.seen), "bad": len(bad.found), "by_kind": bad.by_kind(),
        "replaced": replaced, "written": json.loads(written.read_text())["train"]["by_kind"],
    }  # fmt: skip


def main(source: Path, out: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    common: dict[str, Any] = {"batch_size": 4, "val_share": 0.0, "max_bad_share": 1.0, "caption": "none"}
    video = {"frames": 4, "size": (16, 16), "resize": "cover", "short": "pad", "num_workers": 2}
    sound = {"sample_rate": 8000, "samples": 4000, "short": "pad"}
    for make, settings in ((VideoModule, video), (SoundModule, sound)):
        folder = out / make.__module__
        folder.mkdir()
        for path in sorted(source.iterdir()):
            if path.suffix.lower() in make.extensions:
                shutil.copy(path, folder / f"{path.name.replace('.', '_')}{path.suffix}")  # keys are unique
        print(json.dumps(account(make(str(folder), **settings, **common), out / f"{make.__module__}_run")))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
