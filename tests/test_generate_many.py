"""mmdiff generate: every prompt exactly once, whoever works and whatever is killed; what it says of wrong values.

All: python -m pytest --slow tests/test_generate_many.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import soundfile

from mmdiff.__main__ import guarded
from mmdiff.generate_many import main
from mmdiff.pipeline import write_cascade
from tests.test_data_prepare import children
from tests.test_generate import TEXT, generate, model_tree, save_trained

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("films")
    save_trained(model_tree(3, 3, TEXT, tokens_width=16, vector_width=16), folder / "base")
    write_cascade(folder, {"shape": [3, 4, 16, 16], "rate": 8, "stages": {"base": generate("base", guidance=2.0)}})
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    save_trained(model_tree(1, 1, TEXT, tokens_width=16, vector_width=16), folder / "base")
    write_cascade(folder, {"shape": [1, 400], "rate": 8000, "stages": {"base": generate("base")}})
    return folder


def prompts(folder: Path, count: int) -> Path:
    """A file of prompts, the last of which is the first again."""
    file = folder / "prompts.txt"
    file.write_text("\n".join([f"clip number {i}" for i in range(count - 1)] + ["clip number 0"]) + "\n\n", "utf-8")
    return file


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "generated.jsonl").read_text("utf-8").splitlines()]


def check_each_once(out: Path, count: int, suffix: str) -> None:
    """A clip with its record for each prompt, in order, and no other file."""
    found = records(out)
    told = [f"clip number {i}" for i in [*range(count - 1), 0]]
    assert [record["prompt"] for record in found] == told
    assert [record["place"] for record in found] == list(range(count))
    assert all(len(record["files"]) == 1 and record["files"][0].endswith(suffix) for record in found)
    names = {name for record in found for name in (record["files"][0], Path(record["files"][0]).stem + ".json")}
    assert {path.name for path in out.iterdir()} == {*names, "generate.json", "generated.jsonl"}
    assert len(names) == 2 * count


def test_videos_are_made_and_what_is_missing_is_made_again(films: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    words = ["--prompts", str(prompts(tmp_path, 5)), "--pipeline", str(films), "--out", str(out), "--batch-size", "2"]
    assert main(words) == 0
    assert capsys.readouterr().out.strip() == str(out / "generated.jsonl")
    check_each_once(out, 5, ".mp4")
    clips = [out / record["files"][0] for record in records(out)]
    with av.open(str(clips[1])) as container:
        frames = [frame.to_ndarray() for frame in container.decode(video=0)]
    assert len(frames) == 4
    before = {clip: (clip.read_bytes(), clip.stat().st_mtime_ns) for clip in clips}
    assert before[clips[0]][0] == before[clips[4]][0]  # the same prompt and seed
    assert before[clips[0]][0] != before[clips[1]][0]

    clips[1].unlink()
    clips[3].with_suffix(".json").write_text('{"torn')
    (out / ".000002-left.mp4.x.tmp").write_bytes(b"of a worker that was killed")
    assert main(words) == 0
    check_each_once(out, 5, ".mp4")
    assert all(clip.read_bytes() == content for clip, (content, _) in before.items())
    again = [clip for clip, (_, time_ns) in before.items() if clip.stat().st_mtime_ns != time_ns]
    assert again == [clips[1], clips[3]]


def test_sounds_of_several_seeds_and_a_prompt_that_cannot_be(sounds: Path, tmp_path: Path, capsys: Any) -> None:
    file, out = tmp_path / "p.txt", tmp_path / "out"
    file.write_text("one\n" + "word " * 97 + "\ntwo\n", "utf-8")
    words = ["--prompts", str(file), "--pipeline", str(sounds), "--out", str(out), "--count", "2", "--duration", "0.1"]
    assert guarded("generate", main, words) == 2
    said = capsys.readouterr().err
    assert "2 of 6 clips could not be made, the first of 'word word" in said
    assert "97 words and marks, more than max_words=96" in said
    found = records(out)
    assert [(record["prompt"], record["seed"]) for record in found] == [("one", 0), ("one", 1), ("two", 0), ("two", 1)]
    assert {soundfile.info(out / record["files"][0]).frames for record in found} == {800}
    assert len({(out / record["files"][0]).read_bytes() for record in found}) == 4


def killing(words: list[str], out: Path, chosen: Callable[[bytes], bool]) -> int:
    """Starts the command and kills the first process that is chosen by its command line, once 3 clips are there."""
    command = [sys.executable, "-m", "mmdiff", "generate", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        killed = 0
        while not killed and process.poll() is None:
            time.sleep(0.02)
            if out.is_dir() and len(list(out.glob("*.json"))) >= 4:
                for child in [*children(process.pid), process.pid]:
                    if not killed and chosen((Path("/proc") / str(child) / "cmdline").read_bytes()):
                        os.kill(child, signal.SIGKILL)
                        killed = child
        said = process.communicate()
    assert killed, said
    assert killed == process.pid or process.returncode == 0, said
    return process.returncode


def check_kill(pipeline: Path, folder: Path, engine: str, *options: str) -> None:
    out = folder / "out"
    words = ["--prompts", str(prompts(folder, 120)), "--pipeline", str(pipeline), "--out", str(out)]
    words += ["--engine", engine, "--workers", "2", "--batch-size", "2", *options]
    killing(words, out, lambda line: b"ray::Map" in line or b"spawn_main" in line)
    check_each_once(out, 120, ".wav")


def test_ray_makes_every_prompt_once_although_a_worker_is_killed(sounds: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    check_kill(sounds, tmp_path, "ray")


@pytest.mark.slow
def test_processes_make_every_prompt_once_although_one_is_killed(sounds: Path, tmp_path: Path) -> None:
    check_kill(sounds, tmp_path, "local")


@pytest.mark.slow
def test_a_command_that_was_killed_goes_on(sounds: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [
        "--prompts",
        str(prompts(tmp_path, 120)),
        "--pipeline",
        str(sounds),
        "--out",
        str(out),
        "--batch-size",
        "1",
    ]
    assert killing(words, out, lambda line: b"generate" in line) == -signal.SIGKILL
    there = {path.name for path in out.glob("*.wav")}
    assert 0 < len(there) < 120
    assert main(words) == 0
    check_each_once(out, 120, ".wav")


@pytest.mark.slow
def test_a_cluster_is_reached_by_its_address(sounds: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    program = (
        "import os, sys, ray; os.environ['RAY_USAGE_STATS_ENABLED'] = '0'\n"
        "context = ray.init(address='local', num_cpus=2, include_dashboard=False)\n"
        "print(context.address_info['gcs_address'], flush=True)\n"
        "sys.stdin.read()\n"
    )
    secret = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=secret
    ) as head:
        assert head.stdout is not None
        address = head.stdout.readline().strip()
        words = ["--prompts", str(prompts(tmp_path, 6)), "--pipeline", str(sounds), "--out", str(tmp_path / "out")]
        done = subprocess.run(
            [sys.executable, "-m", "mmdiff", "generate", *words, "--address", address, "--batch-size", "2"],
            cwd=ROOT, env=secret, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        head.communicate("", timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    check_each_once(tmp_path / "out", 6, ".wav")


def test_a_folder_holds_one_generation(sounds: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    words = ["--prompts", str(prompts(tmp_path, 2)), "--pipeline", str(sounds), "--out", str(out)]
    assert main(words) == 0
    for more, named in ((["--steps", "2"], "steps"), (["--count", "2"], "prompts"), (["--preview"], "preview")):
        assert guarded("generate", main, [*words, *more]) == 2
        assert f"holds clips made with other {named}; give another folder" in capsys.readouterr().err
    (out / "generate.json").unlink()
    assert guarded("generate", main, words) == 2
    assert "holds clips that no generate.json tells of" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["--media", "smell"], "--media smell is not installed; there are"),
    ([], "give --pipeline FOLDER, or --media (audio, video) for the shipped one"),
    (["--pipeline", "SOUNDS", "--media", "video"], "makes clips of shape [1, 400], which are no video"),
    (["--pipeline", "SOUNDS", "--workers", "0"], "--workers 0 is below 1"),
    (["--pipeline", "SOUNDS", "--gpus", "1"], "--gpus shares GPUs out among the workers of Ray; add --engine ray"),
    (["--pipeline", "SOUNDS", "--gpus", "-1", "--engine", "ray"], "--gpus -1 is below 0"),
    (["--pipeline", "SOUNDS", "--duration", "9"], "which this pipeline can make; choose another --duration"),
])  # fmt: skip
def test_wrong_options_are_one_line(words: list[str], message: str, sounds: Path, tmp_path: Path, capsys: Any) -> None:
    words = [str(sounds) if word == "SOUNDS" else word for word in words]
    assert (
        guarded("generate", main, ["--prompts", str(prompts(tmp_path, 2)), "--out", str(tmp_path / "out"), *words]) == 2
    )
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("0*"))
