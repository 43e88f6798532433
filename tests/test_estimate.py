"""`mmdiff estimate` and the counting of operations under it, against counts made by hand."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from mmdiff import estimate
from mmdiff.autoencoder_module import AutoencoderModule
from mmdiff.config import build, read_config
from mmdiff.flops import count_flops
from mmdiff.footprint import changes, first_batch, instantiate, layers, measure, parsed, parts, sampling_flops
from mmdiff.module import DiffusionModule
from mmdiff.rehearsal import STEPS, rehearsal, shortened

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "configs" / "tiny"
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "overfit" not in path.parts]
FOUND: dict[str, Any] = {
    "config": "configs/tiny/x.yaml", "parameters": {"backbone": 1_500_000, "conditioner": 500_000},
    "trainable": 1_500_000, "batch": [8, 3, 8, 16, 16], "batches": 1, "training_gflop": 12.34, "sampling_gflop": 0.5,
    "peak_bytes": 100 * 2**20, "step_s": 0.25,
}  # fmt: skip


def based_on(path: Path) -> Path | None:
    """The config of which this one holds only the differences: the first that its second line names."""
    command = [word for line in path.read_text().splitlines()[:3] if "mmdiff fit" in line for word in line.split()]
    names = [after for word, after in pairwise(command) if word == "-c"]
    return ROOT / names[0] if len(names) > 1 and ROOT / names[0] != path else None


def trained() -> list[str]:
    """Every training config, a variant after its base."""
    paths = [path for path in CONFIGS if "model" in read_config(path)]
    return [str(path) if (base := based_on(path)) is None else f"{base}+{path}" for path in paths]


def short(config: str) -> str:
    return "+".join(str(Path(name).relative_to(ROOT / "configs")) for name in config.split("+"))


# Counting


def test_operations_of_a_tiny_network_are_those_counted_by_hand() -> None:
    """Linear 8 to 16 and back over 5 rows: 2 * 5 * 8 * 16 each, forward, and twice that backward, less the first's."""
    network, x = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)), torch.randn(5, 8)
    product = 2 * 5 * 8 * 16
    assert count_flops(lambda: network(x)) == 2 * product
    assert (
        count_flops(lambda: network(x).sum().backward()) == 2 * product + 4 * product - product
    )  # x needs no gradient


@pytest.mark.parametrize(("conv", "shape", "forward"), [
    (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 10), 2 * 2 * 10 * 3 * 4 * 6),
    (nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 5, 5), 2 * 2 * 25 * 9 * (4 // 2) * 8),
    (nn.Conv3d(3, 4, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)), (1, 3, 2, 8, 8), 2 * 2 * 16 * 9 * 3 * 4),
    (nn.ConvTranspose1d(4, 8, 4, stride=2, padding=1), (2, 4, 5), 2 * 2 * 5 * 4 * 4 * 8),
])  # fmt: skip
def test_operations_of_convolutions(conv: nn.Module, shape: tuple[int, ...], forward: int) -> None:
    x = torch.randn(shape, requires_grad=True)
    assert count_flops(lambda: conv(x)) == forward
    assert count_flops(lambda: conv(x).sum().backward()) == 3 * forward


@pytest.mark.parametrize("masked", [False, True])
def test_operations_of_attention_on_a_cpu(masked: bool) -> None:
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (7, 5, 5))
    mask = torch.ones(7, 5).bool() if masked else None
    product = 2 * 2 * 3 * 7 * 5 * 8
    attend = lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert count_flops(attend) == 2 * product
    assert count_flops(lambda: attend().sum().backward()) == (2 + 5) * product  # 4 gradients and the scores again


def test_operations_in_inference_mode_and_of_partial_gradients_count() -> None:
    layer, x = nn.Linear(8, 16), torch.randn(4, 8)
    product = 2 * 4 * 8 * 16

    @torch.inference_mode()
    def infer() -> None:
        layer(x)

    assert count_flops(infer) == product
    assert count_flops(lambda: torch.autograd.grad(layer(x).sum(), layer.weight)) == 2 * product


# Footprint


def test_parameters_are_exact_by_part() -> None:
    module, *_ = instantiate(str(TINY / "video.yaml"))
    assert isinstance(module, DiffusionModule)
    model = build(read_config(TINY / "video.yaml")["model"]["init_args"]["model"])
    count = lambda part: sum(p.numel() for p in part.parameters())
    assert parts(module) == {"backbone": count(model.denoiser.backbone), "conditioner": count(model.conditioner)}
    assert sum(parts(module).values()) == count(module)


def test_a_parameter_that_parts_share_counts_once() -> None:
    module = nn.Module()
    module.a, module.b = nn.Linear(4, 4), nn.Linear(4, 4)
    module.b.weight = module.a.weight
    module.scale = nn.Parameter(torch.ones(3))
    assert parts(module) == {"a": 20, "b": 4, "other": 3}


def test_a_sampling_step_is_one_call_for_one_clip() -> None:
    module, data, _ = instantiate(str(TINY / "video.yaml"))
    batch = first_batch(data, "tiny")
    assert isinstance(module, DiffusionModule)
    x = batch["x"][:1]
    cond = module.model.condition({name: value[:1] for name, value in batch.items()})
    alone = count_flops(lambda: module.model.denoiser.backbone(x, torch.zeros(1), cond))
    assert sampling_flops(module, batch) == alone > 0


def test_layers_and_batch_size() -> None:
    assert layers("a.yaml+b/c.yaml") == [Path("a.yaml"), Path("b/c.yaml")]
    _, data, trainer = instantiate(str(TINY / "video.yaml"), batch_size=3)
    assert first_batch(data, "tiny")["x"].shape == (3, 3, 8, 16, 16)
    assert trainer["gradient_clip_val"] == 1.0


def test_a_variant_whose_autoencoder_is_not_trained_gets_one(tmp_path: Path) -> None:
    config = f"{TINY / 'video.yaml'}+{TINY / 'video_latent.yaml'}"
    module, *_ = instantiate(config, folder=tmp_path)
    assert parts(module).keys() == {"backbone", "conditioner", "autoencoder"}
    with pytest.raises(ValueError, match=r"video_latent.yaml: no such model folder: runs/tiny/autoencoder$"):
        instantiate(config)


@pytest.mark.parametrize(("text", "message"), [
    ("model: {init_args: {seed: 1}}", "holds only differences in model; give it with its base, as BASE.yaml.bad.yaml"),
    ("shape: [1]", "has no model; estimate takes the configs of"),
    ("model: {class_path: os.system}\ndata: {class_path: video.render.WorldDataModule}", "not allowed"),
    ("model: {class_path: mmdiff.module.DiffusionModule}\ndata: {class_path: video.render.Nothing}", "Nothing"),
    ("model: [", "is not YAML"),
])  # fmt: skip
def test_configs_that_no_training_could_use_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        measure(str(path), tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        measure(str(tmp_path / "none.yaml"), tmp_path)


def test_a_batch_size_that_the_data_has_no_argument_for_is_named(tmp_path: Path) -> None:
    config = (TINY / "video.yaml").read_text().replace("WorldDataModule", "LightningDataModule")
    path = tmp_path / "c.yaml"
    path.write_text(config.replace("video.render", "lightning.pytorch").replace("init_args: {count", "other: {count"))
    with pytest.raises(ValueError, match="batch"):
        instantiate(str(path), batch_size=3)


def test_absent_data_is_one_line(tmp_path: Path) -> None:
    tree = (ROOT / "configs" / "audio" / "digits.yaml").read_text().replace("../shared/data/fsdd", str(tmp_path / "no"))
    path = tmp_path / "digits.yaml"
    path.write_text(tree)
    with pytest.raises(ValueError, match="no batch of its data: .*no"):
        _, data, _ = instantiate(str(path))
        first_batch(data, str(path))


# The command


def test_operations_of_a_training_step_are_those_of_its_loss(tmp_path: Path) -> None:
    config = str(TINY / "video_autoencoder.yaml")
    found = measure(config, tmp_path, batch_size=2)
    assert found.batch == (2, 3, 4, 16, 16)
    module, data, _ = instantiate(config, batch_size=2)
    assert isinstance(module, AutoencoderModule)
    x = first_batch(data, "tiny")["x"]
    step = count_flops(lambda: (module.model.reconstruct(x).x - x).abs().mean().backward())
    assert found.training_gflop == step / 1e9
    assert found.trainable == found.total == sum(p.numel() for p in module.parameters())


@pytest.mark.slow
def test_the_command_measures_a_config_and_memory_grows_with_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(TINY / "video_autoencoder.yaml")
    assert estimate.main([config, "--json"]) == 0
    (small,) = json.loads(capsys.readouterr().out)
    large = estimate.footprint(config, batch_size=64)
    module, *_ = instantiate(config)
    assert isinstance(module, AutoencoderModule)
    assert sum(small["parameters"].values()) == sum(p.numel() for p in module.parameters())
    assert (small["batch"], large["batch"]) == ([8, 3, 4, 16, 16], [64, 3, 4, 16, 16])
    assert large["training_gflop"] == pytest.approx(8 * small["training_gflop"])
    assert large["sampling_gflop"] == small["sampling_gflop"]
    assert large["peak_bytes"] > small["peak_bytes"] + 8 * 2**20
    assert small["step_s"] > 0


def test_the_report_and_the_table_say_the_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "footprint", lambda config, batch_size, trusted: {**FOUND, "config": config})
    assert estimate.main(["configs/a.yaml", "configs/b.yaml", "--table"]) == 0
    header, rule, first, second = capsys.readouterr().out.splitlines()
    assert header.count("|") == rule.count("|") == first.count("|")
    assert first == "| a.yaml | 8x3x8x16x16 | 2.00 | 12.3 | 0.50 | 100 | 0.25 |"
    assert second.startswith("| b.yaml |")
    assert estimate.main(["a.yaml"]) == 0
    words = capsys.readouterr().out
    for part in (
        "2,000,000, trained 1,500,000",
        "1,500,000",
        "12.34 GFLOP",
        "100 MiB",
        "0.250 s a step, 4.2 min for 1,000",
    ):
        assert part in words


def test_one_bad_config_of_many_is_a_line_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def footprint(config: str, batch_size: int | None, trusted: list[str]) -> dict[str, Any]:
        if config == "bad.yaml":
            raise ValueError("bad.yaml has no model")
        return FOUND

    monkeypatch.setattr(estimate, "footprint", footprint)
    assert estimate.main(["bad.yaml", "good.yaml", "--table"]) == 2
    out = capsys.readouterr()
    assert out.err == "mmdiff estimate: error: bad.yaml has no model\n"
    assert out.out.count("\n") == 3
    with pytest.raises(ValueError, match="bad.yaml has no model"):
        estimate.main(["bad.yaml"])


@pytest.mark.parametrize(("args", "message"), [
    (["a.yaml", "--table", "--json"], "two forms"), (["a.yaml", "--batch-size", "0"], "--batch-size 0"), ([], "CONFIG"),
])  # fmt: skip
def test_options_that_cannot_be_are_named(args: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate.main(args)


def test_a_process_that_fails_says_why_in_one_line() -> None:
    with pytest.raises(ValueError, match="^no such file: none.yaml"):
        estimate.footprint("none.yaml")


# Peak memory


def peak_of_a_run(config: str, folder: Path, steps: int, *settings: str) -> int:
    """Bytes that `mmdiff fit` had in memory at its peak, as its parent reads them when it has ended."""
    words = [word for layer in layers(config) for word in ("-c", str(layer))]
    trainer: dict[str, object] = {
        "max_steps": steps,
        "val_check_interval": steps // 2,
        "default_root_dir": folder,
        "accelerator": "cpu",
    }
    trainer |= {"enable_progress_bar": "false"}
    words += [word for name, value in trainer.items() for word in (f"--trainer.{name}", str(value))]
    _, peak = estimate.spent(["mmdiff", "fit", *words, *settings])
    return peak


def test_peak_memory_is_within_a_tenth_of_what_the_run_then_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = str(TINY / "video_autoencoder.yaml")
    found = estimate.footprint(config, batch_size=48)
    assert not list(tmp_path.iterdir()), "the estimate left files behind"
    taken = peak_of_a_run(config, tmp_path, 8, "--data.init_args.batch_size", "48")
    assert found["peak_bytes"] == pytest.approx(taken, rel=0.1)


def test_a_peak_is_that_of_the_process_and_not_of_the_one_that_measures() -> None:
    """This one has torch in memory, hundreds of MiB."""
    line, peak = estimate.spent(["platform"])
    assert line
    assert 2 * 2**20 < peak < 64 * 2**20


def test_a_rehearsal_writes_nothing_where_the_run_would(tmp_path: Path) -> None:
    config = str(TINY / "video.yaml")
    _, given, trainer = parsed(config)
    words = rehearsal(layers(config), trainer, changes(given, 3, tmp_path), tmp_path, ["own"])
    assert words[:3] == ["fit", "-c", config]
    assert words[-2:] == ["--trust-config-imports", "own"]
    tree = read_config(words[4])
    assert tree["data"]["init_args"] == {"batch_size": 3}
    assert tree["trainer"]["default_root_dir"] == str(tmp_path)
    kinds = [one["class_path"].rpartition(".")[2] for one in tree["trainer"]["callbacks"]]
    assert kinds == ["EMA", "Samples", "LearningRateMonitor", "ModelCheckpoint", "Watch"]
    assert "runs/tiny" not in Path(words[4]).read_text()


@pytest.mark.parametrize(("limit", "expected"), [(None, 1), (16, 1), (0, 0), (0.25, 0.25), (1.0, 1)])
def test_a_rehearsal_validates_once_where_the_run_does(limit: float | None, expected: float, tmp_path: Path) -> None:
    found = shortened({"limit_val_batches": limit, "accumulate_grad_batches": 3}, tmp_path)
    assert found["limit_val_batches"] == expected
    assert found["val_check_interval"] == 3 * STEPS


def test_a_cache_of_latents_is_rehearsed_with_a_few_in_another_folder(tmp_path: Path) -> None:
    config = "+".join(str(TINY / f"{name}.yaml") for name in ("video", "video_latent", "video_latent_cached"))
    _, given, _ = parsed(config)
    made = changes(given, 24, tmp_path)
    weights = made["model"]["init_args"]["autoencoder_weights"]
    assert Path(weights).is_dir()
    data = made["data"]["init_args"]
    assert data == {"autoencoder": weights, "folder": str(tmp_path / "latents"), "data": data["data"]}
    assert data["data"]["init_args"] == {"batch_size": 24, "limit": 24}
    assert changes(given, None, tmp_path)["data"]["init_args"]["data"]["init_args"] == {"limit": 16}


def test_discriminators_that_start_later_are_measured_from_the_start(tmp_path: Path) -> None:
    module, *_ = instantiate(
        f"{TINY / 'video_autoencoder.yaml'}+{TINY / 'video_autoencoder_gan.yaml'}", folder=tmp_path
    )
    assert isinstance(module, AutoencoderModule)
    assert module.adversarial is not None
    assert module.adversarial.start == 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("config", trained(), ids=short)
def test_every_config_is_measured_and_its_peak_is_what_the_run_then_takes(
    config: str, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its autoencoder is not trained, the run has the untrained one too."""
    (tmp_path / "work").mkdir()
    (tmp_path / "shared").symlink_to(shared_data.parent)
    monkeypatch.chdir(tmp_path / "work")
    found = estimate.footprint(config)
    assert found["training_gflop"] > 2 * found["sampling_gflop"] > 0
    _, given, _ = parsed(config)
    over = tmp_path / "over.yaml"
    over.write_text(yaml.safe_dump(changes(given, None, tmp_path)))
    taken = peak_of_a_run(f"{config}+{over}", tmp_path, 12)
    assert found["peak_bytes"] == pytest.approx(taken, rel=0.1)
