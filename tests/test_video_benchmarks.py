"""Benchmarks of video cascades: what they conclude, on renders, on networks that predict nothing, on tiny trainings."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import backbones_compared as compared
from benchmarks import cascade_sweeps as sweeps
from benchmarks.backbones_compared import RECIPES, Recipe, Row, Scale
from benchmarks.judge import Judge, Verdict, table
from mmdiff.autoencoder import ConvKL, Pool
from mmdiff.cascade import Cascade, Clip, Decode, Generate
from mmdiff.conditioning import Join, LowRes, Text
from mmdiff.config import build, dump_config, read_config
from mmdiff.footprint import parsed
from mmdiff.io import save
from mmdiff.model import DiffusionModel
from mmdiff.pipeline import write_cascade
from mmdiff.precond import EDM
from mmdiff.sampling import Ancestral
from mmdiff.sigmas import Karras
from mmdiff.text import ByteTransformer
from video.metrics import WORDS, WORLD

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (3, 4, 8, 8)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(40, seed=3)


class Counted(nn.Module):
    """A backbone that predicts nothing and counts its calls, by clips."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.clips = 0

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any = None) -> Tensor:
        self.clips += len(x)
        return self.weight * x


def base() -> Generate:
    text = Text(ByteTransformer(width=8, depth=1, max_words=32))
    return Generate(DiffusionModel(Counted(), EDM(), text).eval(), Karras(0.02, 80), Ancestral(), steps=4)


def upsampler(noise: float = 0.3) -> Generate:
    lowres = LowRes(Pool([1, 2, 2]), noise=noise, level=min(noise, 0.05))
    model = DiffusionModel(Counted(), EDM(), Join([lowres])).eval()
    return Generate(model, Karras(0.02, 80), Ancestral(), steps=2)


def cascade() -> Cascade:
    return Cascade({"base": base(), "up": upsampler()}, SHAPE, 8.0)


def calls(stage: Any) -> int:
    return int(stage.model.denoiser.backbone.clips)


# The judge


def test_renders_of_the_prompts_are_right_in_every_word_and_those_of_others_are_not(judge: Judge) -> None:
    like = Clip(torch.empty(1, 3, 16, 32, 32), 8.0)
    real = judge.ceiling(like)
    assert real.right == dict.fromkeys((*WORDS, "all"), 40)
    assert (real.mean, real.share("all")) == (1.0, 1.0)
    others = judge(Clip(judge.renders(0, like).roll(1, 0), 8.0))
    assert others.right["all"] < 8
    assert 0.2 < others.mean < 0.8
    assert others.distance == pytest.approx(real.distance, rel=1e-6), "the distance depends on the order of the clips"
    noise = judge(Clip(torch.rand(40, 3, 16, 32, 32) * 2 - 1, 8.0))
    assert noise.distance_low > real.distance_high
    assert noise.right["all"] == 0


def test_prompts_are_of_scenes_that_training_never_draws(judge: Judge) -> None:
    trained = read_config(ROOT / "configs" / "video" / "world.yaml")["data"]["init_args"]["world"]
    assert vars(WORLD) == vars(build({"class_path": "mmdiff.world.World", "init_args": trained}))
    keys = {repr(scene) for scene in judge.scenes(0)}
    assert not keys & {repr(judge.world.scene(i, judge.seed)) for i in range(200)}
    assert not keys & {repr(scene) for scene in judge.scenes(40)}
    assert len(judge.prompts) == 40


def test_a_judge_names_what_it_cannot_judge(judge: Judge) -> None:
    with pytest.raises(ValueError, match="count=39 clips are too few: the interval of a distance needs 40"):
        Judge(39)
    with pytest.raises(ValueError, match="2 clips for 40 prompts; make one for each"):
        judge(Clip(torch.zeros(2, 3, 16, 32, 32), 8.0))


def test_a_verdict_s_cells_are_those_worked_out_by_hand() -> None:
    right = {**dict.fromkeys(WORDS, 30), "size": 60, "all": 20}
    verdict = Verdict(60, right, 0.1234, -0.01, 0.2)
    assert verdict.mean == pytest.approx((5 * 30 + 60) / 360)
    assert verdict.cells() == ["58", "33 (23 to 46)", "0.123 (0 to 0.2)"]  # Wilson of 20 of 60, by hand
    assert table([["a", "b"], ["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


# Sweeps of a cascade


def test_a_sweep_runs_the_stages_before_once_and_each_value_on_the_same_noise(judge: Judge) -> None:
    whole = cascade()
    rows = list(sweeps.sweep(whole, judge, "up", "up", sweeps.with_steps, [1, 3, 1], None))
    assert [row.steps for row in rows] == [1, 3, 1]
    assert calls(whole.stages["base"]) == 40 * 4
    assert calls(whole.stages["up"]) == 40 * (1 + 3 + 1)
    assert rows[0].verdict == rows[2].verdict
    assert rows[0].verdict != rows[1].verdict
    assert all(row.seconds > 0 for row in rows)


def test_guidance_is_swept_on_the_first_stage_alone(judge: Judge) -> None:
    whole = cascade()
    assert sweeps.chosen(whole, sweeps.SWEEPS["guidance"], None, None) == ("base", "base")
    (plain, guided) = sweeps.sweep(whole, judge, "base", "base", sweeps.with_guidance, [1, 2], None)
    assert calls(whole.stages["base"]) == 40 * 4 * (1 + 2), "guidance 2 asks for both predictions"
    assert calls(whole.stages["up"]) == 0
    assert plain.value == "1"
    assert guided.value == "2"


def test_noise_is_swept_on_the_last_upsampler_beside_one_trained_without(judge: Judge) -> None:
    whole, beside = cascade(), Cascade({"base": base(), "up": upsampler(noise=0.0)}, SHAPE, 8.0)
    assert sweeps.chosen(whole, sweeps.SWEEPS["noise"], None, None) == ("up", "up")
    rows = list(sweeps.sweep(whole, judge, "up", "up", sweeps.with_noise, [0.0, 0.3], beside))
    assert [row.value for row in rows] == ["0", "0.3", "without"]
    assert calls(beside.stages["up"]) == 40 * 2
    assert whole.stages["up"].lowres().level == 0.05, "the sweep changed the pipeline's own stage"  # type: ignore[attr-defined]
    changed = sweeps.with_noise(upsampler(), 0.2)
    assert changed.lowres().level == 0.2  # type: ignore[union-attr]


def test_a_latent_stage_is_judged_after_its_decoding() -> None:
    autoencoder = ConvKL(3, 4, [[1, 2, 2]], width=4)
    latent = replace(base(), model=DiffusionModel(Counted(), EDM(), autoencoder=autoencoder).eval())
    whole = Cascade({"base": latent, "decode": Decode(autoencoder), "up": upsampler()}, SHAPE, 8.0)
    assert sweeps.chosen(whole, sweeps.SWEEPS["steps"], None, None) == ("base", "decode")
    assert sweeps.chosen(whole, sweeps.SWEEPS["noise"], None, None) == ("up", "up")


def test_what_cannot_be_swept_is_named(judge: Judge) -> None:
    whole = cascade()
    with pytest.raises(ValueError, match="there is no stage 'none'; the cascade has base, up"):
        sweeps.chosen(whole, sweeps.SWEEPS["steps"], "none", None)
    with pytest.raises(ValueError, match="--until base comes before the stage up"):
        next(sweeps.sweep(whole, judge, "up", "base", sweeps.with_steps, [1], None))
    with pytest.raises(ValueError, match=r"level 0.5 is outside 0..0.3, which the stage was trained with"):
        sweeps.with_noise(upsampler(), 0.5)
    with pytest.raises(ValueError, match="has no low-resolution clip"):
        sweeps.with_noise(base(), 0.1)
    with pytest.raises(ValueError, match="no stage of base has a low-resolution clip"):
        sweeps.chosen(Cascade({"base": base()}, SHAPE, 8.0), sweeps.SWEEPS["noise"], None, None)


def saved_pipeline(folder: Path) -> Path:
    """A base of four steps of a UNet without training, for clips of 4 frames of 8x8."""
    encoder = {"class_path": "mmdiff.text.ByteTransformer", "init_args": {"width": 8, "depth": 1, "max_words": 32}}
    backbone = {
        "axes": 3, "in_channels": 3, "channels": 4, "multipliers": [1], "head_channels": 4, "attend": [[[0]]],
        "cross": [True], "tokens_width": 8, "vector_width": 8,
    }  # fmt: skip
    model = {
        "class_path": "mmdiff.model.DiffusionModel",
        "init_args": {
            "backbone": {"class_path": "mmdiff.backbones.UNet", "init_args": backbone},
            "precond": {"class_path": "mmdiff.precond.EDM"},
            "conditioner": {"class_path": "mmdiff.conditioning.Text", "init_args": {"encoder": encoder}},
        },
    }
    save(build(model), model, folder / "base")
    stage = {
        "class_path": "mmdiff.cascade.Generate",
        "init_args": {"model": "base", "sigmas": {"class_path": "mmdiff.sigmas.Karras"},
                      "sampler": {"class_path": "mmdiff.sampling.Ancestral"}, "steps": 4},
    }  # fmt: skip
    write_cascade(folder, {"shape": [*SHAPE], "rate": 8, "stages": {"base": stage}})
    return folder


def test_the_commands_write_a_table_its_numbers_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline, out = str(saved_pipeline(tmp_path / "p")), tmp_path / "out"
    common = ["--count", "40", "--threads", str(torch.get_num_threads()), "--out", str(out)]
    assert sweeps.main(["steps", pipeline, "--values", "1", "2", *common]) == 0
    printed = capsys.readouterr().out
    assert (out / "steps.md").read_text() in printed
    found = json.loads((out / "steps.json").read_text())
    assert [row["steps"] for row in found["rows"]] == [1, 2]
    assert (found["stage"], found["until"], found["real"]["count"]) == ("base", "base", 40)
    assert (out / "steps.png").stat().st_size > 5000
    assert sweeps.main(["speed", pipeline, *common]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (out / "speed.md").read_text().splitlines()]
    assert rows[2][:3] == ["base", "4x8x8 at 8/s", "4"]
    assert float(rows[2][3]) == pytest.approx(float(rows[3][3]), abs=0.011)


# Backbones compared

TINY = Scale(
    frames=4, size=(8, 8), batch_size=4, unet={"channels": 8, "head_channels": 8, "factors": [[1, 2, 2], [1, 1, 1]],
    "patch": [1, 2, 2]}, dit={"width": 16, "depth": 1, "head_channels": 8}, widths=(4, 8), autoencoder=4,
)  # fmt: skip


def check_recipe(recipe: Recipe, folder: Path) -> None:
    """That its layers come to the backbone, the space and the objective that it says, at the benchmark's scale."""
    (folder / "small.yaml").write_text(dump_config(recipe.differences(Scale(), 77, folder, seed=0)))
    _, given, _ = parsed("+".join(map(str, [*recipe.layers(), folder / "small.yaml"])))
    arguments = given.as_dict()["model"]["init_args"]
    model = arguments["model"]["init_args"]
    backbone = model["backbone"]["init_args"]
    kinds = [model[part]["class_path"].rsplit(".", 1)[1] for part in ("backbone", "precond")]
    assert kinds[0] == ("SpatioTemporalDiT" if recipe.dit else "UNet")
    assert kinds[1].lower() == recipe.objective
    assert backbone["in_channels"] == (8 if recipe.latent else 3)
    assert backbone["patch"] == ([1, 1, 1] if recipe.latent else [1, 4, 4]), "as many positions in both spaces"
    assert arguments["scheduler"]["init_args"]["steps"] == 77
    if recipe.objective == "edm":
        assert model["precond"]["init_args"]["sigma_data"] == (1.0 if recipe.latent else 0.6)


@pytest.mark.parametrize("place", [4, 9], ids=lambda place: RECIPES[place].name)
def test_a_recipe_is_what_its_name_says(place: int, tmp_path: Path) -> None:
    check_recipe(RECIPES[place], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_is_what_its_name_says(recipe: Recipe, tmp_path: Path) -> None:
    assert len({other.name for other in RECIPES}) == 2 * 2 * 3
    check_recipe(recipe, tmp_path)


def check_equal_operations(rows: list[Row], tflop: float) -> None:
    for row in rows:
        assert row.steps * row.gflop == pytest.approx(1000 * tflop, abs=row.gflop / 2), row.name
        assert row.train_s > 0
        assert row.clip_s > 0


@pytest.mark.filterwarnings("ignore")
def test_rows_have_equal_operations_and_a_run_that_ended_goes_on(
    tmp_path: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [Recipe(False, False, "flow"), Recipe(True, False, "v")]
    (first,) = compared.compare(recipes[:1], tmp_path, judge, 1e-3, TINY)
    trained = []
    train = compared.train
    monkeypatch.setattr(compared, "train", lambda recipe, *rest: trained.append(recipe) or train(recipe, *rest))
    rows = compared.compare(recipes, tmp_path, judge, 1e-3, TINY)
    assert trained == recipes[1:], "a row that was there was made again"
    assert rows[0] == first
    check_equal_operations(rows, 1e-3)
    assert len(rows[1].cells()) == len(compared.TITLES)
    with pytest.raises(ValueError, match="was made with .* name another folder"):
        compared.compare(recipes, tmp_path, judge, 2e-3, TINY)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_rows_of_latents_share_one_autoencoder(tmp_path: Path, judge: Judge) -> None:
    recipes = [Recipe(dit, True, objective) for dit, objective in itertools.product((False, True), ("edm", "v"))]
    scale = replace(TINY, unet={**TINY.unet, "patch": [1, 1, 1], "factors": [[1, 1, 1], [1, 1, 1]]})
    check_equal_operations(compared.compare(recipes, tmp_path, judge, 1e-3, scale), 1e-3)
    assert (tmp_path / "autoencoder" / "model.safetensors").is_file()
    assert len(list(tmp_path.rglob("model.safetensors"))) == 1


def test_a_wrong_number_of_operations_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--tflop 0.0 must be above 0"):
        compared.main([str(tmp_path), "--tflop", "0"])
