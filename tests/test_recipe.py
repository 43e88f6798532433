"""The recipe of a training: compiled, in half precision, with less memory, clipped, from old weights, by config."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdiff.__main__ import main
from mmdiff.autoencoder_module import AutoencoderModule
from mmdiff.backbones import DiT1D, SpatioTemporalDiT, UNet
from mmdiff.callbacks import EMA, Compile, Recompute
from mmdiff.checkpoint import AtomicCheckpointIO
from mmdiff.density import LogNormal
from mmdiff.export import export_model
from mmdiff.io import load, save
from mmdiff.model import DiffusionModel
from mmdiff.module import DiffusionModule
from mmdiff.parameters import ParameterGroups
from mmdiff.post_hoc import Profile
from mmdiff.precond import EDM
from tests.conftest import ROOT
from tests.small_autoencoder import adversarial, loader, network, trainer

CALLBACKS = """
    - {class_path: mmdiff.callbacks.EMA, init_args: {decay: {class_path: mmdiff.callbacks.PowerFunction, init_args: {width: 0.05}}, keep_every: 2}}
    - {class_path: mmdiff.callbacks.EMA, init_args: {decay: {class_path: mmdiff.callbacks.PowerFunction, init_args: {width: 0.1}}, keep_every: 2}}
    - {class_path: mmdiff.callbacks.EMA, init_args: {decay: 0.9}}
    - {class_path: mmdiff.callbacks.Compile, init_args: {modules: ["model.denoiser.backbone.grow.*"], backend: aot_eager}}
    - {class_path: mmdiff.callbacks.Recompute, init_args: {modules: ["model.denoiser.backbone.down.*"]}}
    - {class_path: tests.test_recipe.Recorder}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {dirpath: run, filename: x, enable_version_counter: false}
"""  # noqa: E501
RECIPE = f"""
model:
  init_args:
    scheduler: {{class_path: mmdiff.schedules.Cosine, init_args: {{steps: 16, warmup: 4, floor: 0.1}}}}
    groups: {{rates: {{"model.conditioner.*": 0.5}}}}
trainer:
  max_steps: 16
  precision: bf16-mixed
  accumulate_grad_batches: 2
  val_check_interval: 32
  limit_val_batches: 1
  enable_progress_bar: false
  default_root_dir: run
  logger: false
  callbacks: {CALLBACKS}
"""
FINE = """
model:
  init_args:
    start_from: model
    groups: {frozen: ["model.denoiser.backbone.down.*"], rates: {"model.conditioner.*": 0.1}}
trainer: {max_steps: 3, precision: 32-true, accumulate_grad_batches: 1, default_root_dir: fine}
"""


class Recorder(pl.Callback):
    """The raw weights after every step, in a file of the working folder at the end."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step:
            self.steps[trainer.global_step] = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.save(self.steps, Path(trainer.default_root_dir) / "steps.pt")


@pytest.mark.parametrize("kind", [pytest.param("video", marks=pytest.mark.slow), "audio"])
def test_the_whole_recipe_by_config_then_any_average_then_fine_tuning_from_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both kinds: python -m pytest --slow tests/test_recipe.py"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mmdiff"])
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "fine.yaml").write_text(FINE)
    fit = ["fit", "-c", str(ROOT / "configs" / "tiny" / f"{kind}.yaml"), "-c", "recipe.yaml"]
    trust = ["--trust-config-imports", "tests"]
    assert main([*fit, *trust]) == 0
    steps = torch.load("run/steps.pt")
    state = torch.load("run/x.ckpt", weights_only=True)
    assert set(state["state_dict"]) >= set(steps[16])  # plain names, though compiled
    assert not any("_orig_mod" in name for name in state["state_dict"])
    assert len(list(Path("run/averages").iterdir())) == 16
    rates = {group["name"]: group["lr"] for group in state["optimizer_states"][0]["param_groups"]}
    assert rates == {name: pytest.approx(0.0002 * (0.5 if "x0.5" in name else 1)) for name in rates}
    assert len(rates) == 4

    # Any width, near the average of the weights that each step left; a width of the run exactly.
    for width, tolerance in ((0.08, 0.01), (0.1, 2e-6)):
        capsys.readouterr()
        assert main(["export", "model", "--checkpoint", "run/x.ckpt", "--ema", f"width={width}", "--float32"]) == 0
        said = capsys.readouterr().out
        assert ("width=0.08 from 16 averages of width=0.05, width=0.1, off by " in said) == (width == 0.08)
        shares = Profile(width, 16).shares(1, 16)
        for name, p in load("model").named_parameters():
            path = [weights[f"model.{name}"].double() for weights in steps.values()]
            exact = torch.stack(path).movedim(0, -1) @ shares
            moved = float((path[-1] - path[0]).norm())
            assert float((p.detach() - exact).norm()) <= tolerance * moved + 1e-6, name

    # Fine-tuning: what is frozen stays, the rest moves from the average.
    before = {name: p.detach().clone() for name, p in load("model").named_parameters()}
    assert main([*fit, "-c", "fine.yaml", *trust]) == 0
    fine = torch.load("fine/steps.pt")[3]
    for name, p in before.items():
        frozen = name.startswith("denoiser.backbone.down.")
        assert torch.equal(fine[f"model.{name}"], p) == frozen, name


def test_an_average_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    config = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}}
    state = {"config": {"model": {"init_args": {"model": config}}}, "state_dict": {}, "callbacks": {}}
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="ema='width=0.1' is not in the checkpoint, which has no average"):
        export_model(tmp_path / "x.ckpt", tmp_path / "m", ema="width=0.1")
    kept = {"name": "width=0.1", "updates": 100, "kept": [50, 100], "average": {"model.weight": torch.ones(1, 1)}}
    torch.save({**state, "callbacks": {"EMA[width=0.1]": kept}}, tmp_path / "x.ckpt")
    for ema, message in (
        ("decay=0.9", "has width=0.1; of those any other width=W can be made"),
        ("width=x", "ema='width=x' is not in the checkpoint"),
        ("width=0.5", "width=0.5 must be above 0 and at most 0.2887"),
        ("width=0.02", "from 1 averages of width=0.1, off by 77.*%, and more than 5 % is too far: .*keep_every"),
    ):
        with pytest.raises(ValueError, match=message):
            export_model(tmp_path / "x.ckpt", tmp_path / "m", ema=ema)
    with pytest.raises(ValueError, match="ema=width=0.1 is asked for together with the raw weights"):
        export_model(tmp_path / "x.ckpt", tmp_path / "m", ema="width=0.1", raw=True)


def unet1d() -> nn.Module:
    return UNet(1, 1, channels=8, multipliers=(1, 2), factors=[[2]], attend=[[], [[0]]], head_channels=4)


def unet3d() -> nn.Module:
    return UNet(3, 1, channels=8, multipliers=(1, 2), factors=[[1, 2, 2]], head_channels=4)


def dit1d() -> nn.Module:
    return DiT1D(1, width=16, depth=2, head_channels=8)


def dit3d() -> nn.Module:
    return SpatioTemporalDiT(1, width=16, depth=2, head_channels=8)


BACKBONES = [unet1d, unet3d, dit1d, dit3d]


def clips(net: Any, count: int = 4) -> DataLoader[Any]:
    shape = (4, 4, 4) if net in (unet3d, dit3d) else (16,)
    x = torch.randn(count, 1, *shape, generator=torch.Generator().manual_seed(2))
    return DataLoader([{"x": item} for item in x], batch_size=2)  # type: ignore[arg-type]


def diffusion(net: Any, **settings: Any) -> DiffusionModule:
    torch.manual_seed(1)
    return DiffusionModule(DiffusionModel(net(), EDM()), LogNormal(), **settings)


def wave(**settings: Any) -> AutoencoderModule:
    torch.manual_seed(1)
    return AutoencoderModule(network(), adversarial=adversarial(start=0), **settings)


MAKE = [lambda: diffusion(unet1d), lambda: diffusion(dit1d), wave]


class Losses(pl.Callback):
    """What was logged after every batch."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(module: pl.LightningModule, data: Any, **settings: Any) -> tuple[pl.Trainer, list[dict[str, float]]]:
    losses = Losses()
    callbacks = [losses, *settings.pop("callbacks", [])]
    run = trainer(callbacks=callbacks, **{"max_epochs": 2, "limit_val_batches": 0, **settings})
    run.fit(module, data, ckpt_path=settings.pop("ckpt_path", None))
    return run, losses.logged


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def expect_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("net", "pattern"),
    [(dit1d, "model.denoiser.backbone.blocks.*"), (dit3d, "model.denoiser.backbone")],
    ids=["blocks", "whole"],
)
def test_a_compiled_network_trains_alike_and_its_checkpoint_is_plain(net: Any, pattern: str, tmp_path: Path) -> None:
    plain, compiled = diffusion(net), diffusion(net)
    fit(plain, clips(net))
    callbacks = [Compile([pattern], backend="aot_eager"), EMA(0.9)]
    run, _ = fit(compiled, clips(net), callbacks=callbacks, plugins=[AtomicCheckpointIO()])
    assert any(part._compiled_call_impl is not None for part in compiled.modules())
    expect_close(weights(compiled), weights(plain), 1e-5)
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)
    plain.load_state_dict(saved["state_dict"])
    assert set(saved["callbacks"]["EMA[decay=0.9]"]["average"]) == set(weights(plain))


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKE, ids=["unet", "dit", "autoencoder"])
def test_inductor_trains_alike(make: Any) -> None:
    """Minutes of compiling: python -m pytest --slow tests/test_recipe.py -k inductor"""
    data = loader(4) if make is wave else clips(unet1d)
    patterns = ["model.encoder", "model.decoder"] if make is wave else ["model.denoiser.backbone"]
    plain, compiled = make(), make()
    fit(plain, data, max_epochs=1)
    fit(compiled, data, max_epochs=1, callbacks=[Compile(patterns)])
    expect_close(weights(compiled), weights(plain), 1e-4)


def stored(module: Any, batch: dict[str, Tensor]) -> int:
    """Bytes that a forward pass of the training keeps for the gradients, beside the weights."""
    sizes: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in own:
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        module.model.denoiser(batch["x"], torch.ones(len(batch["x"]))).sum()
    return sum(sizes.values())


@pytest.mark.parametrize("net", BACKBONES)
def test_what_runs_again_for_its_gradients_gives_the_same_ones_in_less_memory(net: Any) -> None:
    plain, again = diffusion(net), diffusion(net)
    fit(plain, clips(net))
    patterns = ["*.blocks.*"] if net in (dit1d, dit3d) else ["*.down.*", "*.up.*", "*.middle.*"]
    callback = Recompute(patterns)
    fit(again, clips(net), callbacks=[callback])
    expect_close(weights(again), weights(plain), 1e-6)
    batch = next(iter(clips(net)))
    before = stored(again, batch)
    callback.setup(trainer(), again, "fit")
    assert stored(again, batch) < 0.6 * before
    callback.teardown(trainer(), again, "fit")
    assert stored(again, batch) == before


def test_an_autoencoder_runs_parts_again_too() -> None:
    plain, again = wave(), wave()
    fit(plain, loader(4))
    fit(again, loader(4), callbacks=[Recompute(["model.encoder.*", "model.decoder.*"])])
    expect_close(weights(again), weights(plain), 1e-6)


@pytest.mark.parametrize("callback", [Compile, Recompute])
def test_a_pattern_for_no_part_is_refused(callback: Any) -> None:
    with pytest.raises(
        ValueError, match=r"none has a name that matches 'model.denoiser.nothing'; names begin with one of"
    ):
        fit(diffusion(unet1d), clips(unet1d), callbacks=[callback(["model.denoiser.nothing"])])
    with pytest.raises(ValueError, match=r"modules=\[\] names no part"):
        callback([])


@pytest.mark.parametrize("net", BACKBONES)
def test_mixed_precision_keeps_weights_in_float32_and_the_loss_near(net: Any) -> None:
    full, half = diffusion(net), diffusion(net)
    _, wanted = fit(full, clips(net), max_epochs=4)
    _, found = fit(half, clips(net), max_epochs=4, precision="bf16-mixed")
    for a, b in zip(wanted, found, strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=0.02)
    assert found[-1]["train/loss"] != wanted[-1]["train/loss"]
    assert all(p.dtype == torch.float32 for p in half.parameters())


def test_an_autoencoder_and_its_discriminator_train_in_mixed_precision() -> None:
    full, half = wave(), wave()
    _, wanted = fit(full, loader(8))
    _, found = fit(half, loader(8), precision="bf16-mixed")
    for a, b in zip(wanted, found, strict=True):
        assert b["train/l1"] == pytest.approx(a["train/l1"], rel=0.02)
    assert all(p.dtype == torch.float32 for p in half.parameters())


def fp16(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3))


@pytest.mark.parametrize("make", MAKE, ids=["unet", "dit", "autoencoder"])
def test_float16_leaves_out_steps_that_overflow_and_its_scale_is_resumed(make: Any, tmp_path: Path) -> None:
    data, start = loader(8) if make is wave else clips(unet1d, 8), weights(make())
    module = make()
    run, _ = fit(module, data, max_steps=1, plugins=[fp16(2.0**30), AtomicCheckpointIO()])
    assert run.precision_plugin.scaler.get_scale() < 2.0**30  # type: ignore[union-attr]
    expect_close(weights(module), start, 0.0)
    module = make()
    run, _ = fit(module, data, max_epochs=2, plugins=[fp16(2.0**8), AtomicCheckpointIO()])
    assert all(p.isfinite().all() for p in module.parameters())
    assert any(not torch.equal(p, start[name]) for name, p in module.named_parameters())
    scaler = run.precision_plugin.scaler.state_dict()  # type: ignore[union-attr]
    assert scaler["scale"] > 2.0**8
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = trainer(plugins=[fp16(2.0**4), AtomicCheckpointIO()], max_epochs=2, limit_val_batches=0)
    again.fit(make(), data, ckpt_path=tmp_path / "x.ckpt")
    assert again.precision_plugin.scaler.state_dict() == scaler  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["diffusion", "autoencoder"])
def test_the_gradient_is_clipped_by_its_norm_and_the_log_says_so(kind: str) -> None:
    norms: list[float] = []

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        held = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([gradient.norm() for gradient in held]).norm()))

    class Stepped(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.optimizers[0].register_step_post_hook(after)

    for limit, share in ((1e-3, 1.0), (1e6, 0.0)):
        norms.clear()
        if kind == "diffusion":
            _, logged = fit(diffusion(dit1d), clips(dit1d), gradient_clip_val=limit, callbacks=[Stepped()])
        else:
            torch.manual_seed(1)
            _, logged = fit(AutoencoderModule(network(), clip=limit), loader(4), callbacks=[Stepped()])
        assert all(entry["train/clipped"] == share for entry in logged)
        for entry, norm in zip(logged, norms, strict=True):
            assert norm == pytest.approx(min(limit, entry["train/grad_norm"]), rel=1e-3)
    assert len(norms) >= 4


def test_an_autoencoder_is_fine_tuned_from_an_exported_one_with_parts_frozen_or_slow(tmp_path: Path) -> None:
    trained = wave()
    fit(trained, loader(8))
    tree = {
        "class_path": "mmdiff.autoencoder.ConvKL",
        "init_args": {"channels": 1, "latent_channels": 2, "steps": [[2], [2]], "width": 4,
                      "bottleneck": {"class_path": "mmdiff.bottleneck.Tanh"}},
    }  # fmt: skip
    save(trained.model, tree, tmp_path / "m", dtype=None)
    torch.manual_seed(7)
    groups = ParameterGroups(frozen=["model.encoder.*"], rates={"model.decoder.*": 1e-3})
    fine = AutoencoderModule(
        network(), start_from=str(tmp_path / "m"), groups=groups, optimizer=lambda p: torch.optim.SGD(p, lr=1.0)
    )
    before = weights(trained.model)
    expect_close(weights(fine.model), before, 0.0)
    fit(fine, loader(4), max_steps=1)
    for name, p in fine.model.named_parameters():
        step = float((p.detach() - before[name]).norm())
        assert (step == 0) == name.startswith("encoder."), name
        assert step <= 1.001e-3  # the clipped gradient at a thousandth of the rate
    with pytest.raises(ValueError, match="has no weights of this ConvKL"):
        AutoencoderModule(type(network())(1, 2, [[2]], width=4), start_from=str(tmp_path / "m"))
