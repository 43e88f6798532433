"""The networks in somebody else's project: their own LightningModule, another folder, nothing else of ours."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PROJECT = '''
import sys

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from mmdiff.backbones import UNet


class Mine(pl.LightningModule):
    """Their own rectified flow, in five lines."""

    def __init__(self) -> None:
        super().__init__()
        self.net = UNet(axes=3, in_channels=3, channels=8, multipliers=[1, 2],
                        attend=[[], [[0, 1, 2]]], head_channels=8)

    def training_step(self, x, index):
        noise, t = torch.randn_like(x), torch.rand(len(x))
        t_wide = t[:, None, None, None, None]
        return (self.net((1 - t_wide) * x + t_wide * noise, t) - (noise - x)).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


module = Mine()
before = [p.detach().clone() for p in module.parameters()]
trainer = pl.Trainer(
    max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(module, DataLoader(torch.randn(2, 3, 4, 8, 8), batch_size=2))
assert trainer.global_step == 1
assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters()))
ours = {name for name in sys.modules if name.split(".")[0] in ("mmdiff", "video", "audio")}
extra = {name for name in ours - {"mmdiff"} if not name.startswith(("mmdiff.backbones", "mmdiff.nn"))}
assert not extra, extra
print("trained")
'''

IMPORTS = """
import sys

import einops
import torch

before = set(sys.modules)
import mmdiff.backbones

new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(sorted(new - {"torch", "einops"}))
"""


def run(code: str, folder: Path) -> str:
    """What `code` prints, run from `folder` as a user would."""
    file = folder / "train.py"
    file.write_text(code)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if not installed():
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, str(file)], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def installed() -> bool:
    try:
        importlib.metadata.distribution("mmdiff")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_a_foreign_project_trains_our_network(tmp_path: Path) -> None:
    assert run(PROJECT, tmp_path) == "trained"


def test_backbones_load_torch_einops_and_nothing_else(tmp_path: Path) -> None:
    assert run(IMPORTS, tmp_path) == "['mmdiff']"
