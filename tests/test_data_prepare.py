"""`mmdiff data prepare`: the same shards whoever does the work, nothing lost or twice, each drop with a reason."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmdiff.__main__ import main as mmdiff
from mmdiff.data.commands import FAILED
from mmdiff.data.commands import main as data_command
from mmdiff.data.prepare import Recipe
from mmdiff.data.prepare_engines import Engine, Job, Local, Ray, Run
from mmdiff.data.sources import load_source
from tests.prepare_cases import make_clips, run, shards
from video.curation import VideoMedium
from video.files import EXTENSIONS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def sixty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("sixty"), 60)


@pytest.fixture(scope="module")
def expected(sixty: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    run(sixty, out, shard_clips=25)
    return shards(out)


@dataclass(frozen=True)
class Ending(Engine):
    """A process that is ended after so many jobs, and notes which ones it did."""

    after: int
    done: list[str]

    @contextmanager
    def opened(self) -> Iterator[Run]:
        yield self._run

    def _run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Any]]:
        for place, job in enumerate(jobs):
            if len(self.done) >= self.after:
                raise KeyboardInterrupt
            self.done.append(job())
            yield place, self.done[-1]


def test_untouched_clips_are_copied_byte_for_byte_with_their_captions(sixty: Path, tmp_path: Path) -> None:
    report = run(sixty, tmp_path / "out", shard_clips=25)
    assert [shard["clips"] for shard in report["shards"]] == [25, 25, 10]
    assert report["clips"] == {
        "cut": 60, "kept": 60, "dropped": {}, "duplicates": 0, "changes": {}, "splits": {"train": 60}
    }  # fmt: skip
    found = load_source(tmp_path / "out", EXTENSIONS, val_share=0).splits["train"]
    assert [item.key for item in found] == [f"c{seed:05d}" for seed in range(60)]
    for seed in (0, 31, 59):
        assert found[seed].captions == [f"clip number {seed}", f"no. {seed}"]
        assert found[seed].read() == (sixty / f"c{seed:05d}.mp4").read_bytes()
        assert (found[seed].meta["num_frames"], found[seed].meta["fps"], found[seed].meta["width"]) == (8, 8, 32)
    index = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert [(row["key"], row["shard"]) for row in index[24:26]] == [
        ("c00024", "train-000000.tar"), ("c00025", "train-000001.tar")
    ]  # fmt: skip
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as archive:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in archive} == {(0, 0, "", 0o644)}
    assert not (tmp_path / "out" / ".work").exists()


@pytest.mark.parametrize("where", ["another place", "another order of files", "a shard of it"])
def test_shards_depend_on_the_content_alone(where: str, sixty: Path, expected: dict[str, str], tmp_path: Path) -> None:
    copy = tmp_path / "moved"
    copy.mkdir()
    files = sorted(sixty.iterdir(), reverse=where != "another place")
    for file in files:
        (copy / file.name).write_bytes(file.read_bytes())
        os.utime(copy / file.name, (1, 1))
    if where == "a shard of it":
        run(copy, tmp_path / "first", shard_clips=100)
        run(tmp_path / "first", tmp_path / "second", shard_clips=100)
        run(tmp_path / "first", tmp_path / "third", shard_clips=100)
        assert shards(tmp_path / "second") == shards(tmp_path / "third")
    else:
        run(copy, tmp_path / "out", shard_clips=25)
        assert shards(tmp_path / "out") == expected


def test_an_ended_run_goes_on_where_it_was(sixty: Path, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(sixty, out, Ending(23, first), shard_clips=25)
    assert not list(out.glob("*.tar"))
    ages = {name: (out / ".work" / name).stat().st_mtime_ns for name in first}
    assert len(ages) == 23
    again: list[Any] = []
    with pytest.raises(KeyboardInterrupt):  # all items, and one of three shards
        run(sixty, out, Ending(61, again), shard_clips=25)
    assert {name: (out / ".work" / name).stat().st_mtime_ns for name in first} == ages, "finished items were done again"
    (shard,) = out.glob("*.tar")
    age = shard.stat().st_mtime_ns
    run(sixty, out, shard_clips=25)
    assert shard.stat().st_mtime_ns == age, "a finished shard was written again"
    assert shards(out) == expected


def test_changed_bytes_captions_and_settings_are_new_work(sixty: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in sorted(sixty.iterdir())[:6]:  # three clips
        (source / file.name).write_bytes(file.read_bytes())
    out = tmp_path / "out"
    names: list[Any] = []
    run(source, out, Ending(100, names), keep_work=True)
    (source / "c00001.txt").write_text("another caption")
    (source / "c00002.mp4").write_bytes((sixty / "c00009.mp4").read_bytes())
    again: list[Any] = []
    run(source, out, Ending(100, again), keep_work=True)
    assert [a == b for a, b in zip(names[:3], again[:3], strict=True)] == [True, False, False]
    found = load_source(out, EXTENSIONS, val_share=0).splits["train"]
    assert found[1].captions == ["another caption"]
    assert found[2].read() == (sixty / "c00009.mp4").read_bytes()
    with pytest.raises(ValueError, match="holds a preparation with another recipe; give another folder"):
        run(source, out, recipe=Recipe(VideoMedium(), most_s=0.5))


def test_processes_give_the_same_shards_although_one_is_killed(
    sixty: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    out, killed = tmp_path / "out", []
    stop = threading.Event()

    def kill_one() -> None:
        while not stop.is_set() and not killed:
            time.sleep(0.02)
            if len(list((out / ".work").glob("??/*.tar"))) >= 5:
                for process in children(os.getpid()):
                    if b"spawn_main" in (Path("/proc") / str(process) / "cmdline").read_bytes():
                        os.kill(process, signal.SIGKILL)
                        killed.append(process)
                        return

    thread = threading.Thread(target=kill_one)
    thread.start()
    run(sixty, out, Local(2), shard_clips=25)
    stop.set()
    thread.join()
    assert len(killed) == 1, "no worker was killed"
    assert shards(out) == expected


def children(process: int) -> list[int]:
    """Ids of the processes below this one."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == process:
            found += [int(stat.parent.name), *children(int(stat.parent.name))]
    return found


@dataclass(frozen=True)
class Deadly(VideoMedium):
    """A medium whose reader dies over one file."""

    def pieces(self, source: Any, name: str) -> Any:
        if name.endswith("c00001.mp4"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().pieces(source, name)


@pytest.mark.slow
def test_a_file_that_kills_its_reader_is_counted_and_costs_no_other(sixty: Path, tmp_path: Path) -> None:
    report = run(sixty, tmp_path / "out", Local(2), Recipe(Deadly()))
    assert report["items"]["bad"] == {"kills its reader": 1}
    assert report["bad"][0].startswith("c00001.mp4: its reader died")
    assert report["clips"]["kept"] == 59


def killing_one(source: Path, out: Path, engine: str, after: int, *options: str) -> None:
    """Runs the command with two workers and kills one of them as soon as `after` items are done."""
    command = [sys.executable, "-m", "mmdiff", "data", "prepare", "--source", str(source), "--out", str(out)]
    command += ["--media", "video", "--workers", "2", "--engine", engine, *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        killed = 0
        while not killed and process.poll() is None:
            time.sleep(0.05)
            if len(list((out / ".work").glob("??/*.tar"))) >= after:
                for child in children(process.pid):
                    line = (Path("/proc") / str(child) / "cmdline").read_bytes()
                    if not killed and (b"ray::Map" in line or b"spawn_main" in line):
                        os.kill(child, signal.SIGKILL)
                        killed = child
        said = process.communicate()[0]
    assert process.returncode == 0, said
    assert killed, "no worker was killed"


def test_ray_gives_the_same_shards_although_a_worker_is_killed(
    sixty: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    killing_one(sixty, tmp_path / "out", "ray", 5, "--shard-clips", "25")
    assert shards(tmp_path / "out") == expected


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", ["ray", "local"])
def test_of_ten_thousand_clips_nothing_is_lost_or_twice_although_a_worker_is_killed(
    engine: str, tmp_path: Path
) -> None:
    """python -m pytest tests/test_data_prepare.py -m slow; MMDIFF_CLIPS=1000 for fewer."""
    if engine == "ray":
        pytest.importorskip("ray")
    count = int(os.environ.get("MMDIFF_CLIPS", "10000"))
    source, out = make_clips(tmp_path / "source", count, frames=2), tmp_path / "out"
    killing_one(source, out, engine, count // 10, "--keep-copies")
    found = load_source(out, EXTENSIONS, val_share=0).splits["train"]
    assert [item.key for item in found] == [f"c{seed:05d}" for seed in range(count)]
    assert all(item.read() == (source / f"{item.key}.mp4").read_bytes() for item in found)
    report = json.loads((out / "prepared.json").read_text())
    assert report["clips"]["kept"] == report["items"]["all"] == count
    assert not list(out.glob(".*"))


# -- the command


def test_the_command_reads_yaml_and_options(sixty: Path, expected: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    config = tmp_path / "prepare.yaml"
    config.write_text(
        f"prepare:\n  source: {sixty}\n  out: {tmp_path / 'wrong'}\n  media: video\n  shard_clips: 25\n"
        "  keep: {duration: [0.5, null]}\n"
    )
    arguments = [str(config), "--out", str(tmp_path / "out"), "--engine", "local", "--workers", "1"]
    assert data_command(["prepare", *arguments, "--keep", "motion=0.01:"]) == 0
    said = capsys.readouterr().out
    assert "items      60, bad 0" in said
    assert "60 cut, 0 near copies dropped, 60 kept" in said
    made = shards(tmp_path / "out")
    assert {name: made[name] for name in made if name.endswith(".tar")} == {
        name: sha for name, sha in expected.items() if name.endswith(".tar")
    }
    report = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert report["recipe"]["keep"] == {"duration": [0.5, None], "motion": [0.01, None]}


def test_too_many_bad_items_are_status_3_and_the_shards_are_there(sixty: Path, tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, data in (("good", (sixty / "c00001.mp4").read_bytes()), ("text", b"this is no video" * 99)):
        (source / f"{name}.mp4").write_bytes(data)
        (source / f"{name}.txt").write_text(name)
    arguments = ["--source", str(source), "--out", str(tmp_path / "out"), "--media", "video", "--engine", "local"]
    assert data_command(["prepare", *arguments, "--workers", "1"]) == FAILED
    assert "fails: 50.0% of the items are bad" in capsys.readouterr().out
    assert (tmp_path / "out" / "train-000000.tar").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--media": "smell"}, "media 'smell' is unknown; there are "),
        ({"--keep": "beauty=1:"}, "keep='beauty' is no measure of these settings; there are duration, motion"),
        ({"--keep": "motion=3:1"}, "keep motion=3:1 keeps nothing"),
        ({"--allow": "blck"}, "allow='blck' is no fault; there are black, frozen, silent, single frame"),
        ({"--keep": "motion=high"}, "keep motion=high is not LEAST:MOST"),
        ({"--set": "size=[8,8]"}, "size=\\(8, 8\\), resize=None: give both or none"),
        ({"--set": "fps"}, "--set fps is not NAME=VALUE"),
        ({"--set": "sise=4"}, "sise"),
        ({"--set": "scene_threshold=3"}, "scene_threshold=3.* outside \\(0, 1\\)"),
        ({"--longest": "0"}, "longest_s=0.0 is not above 0"),
        ({"--shard-clips": "0"}, "shard_clips=0 is below 1"),
        ({"--workers": "0"}, "--workers 0 is below 1"),
        ({"--limit": "-1"}, "--limit -1 is below 1"),
        ({"--val-share": "2"}, "val_share=2.0 is outside"),
        ({"--address": "auto"}, "--address is of a Ray cluster"),
        ({"--source": "no/such/folder"}, "no/such/folder.* does not exist"),
        ({"--out": None}, "no out; give --out"),
    ],
)
def test_wrong_arguments_end_in_one_line(change: dict[str, str | None], said: str, sixty: Path, tmp_path: Path) -> None:
    options: dict[str, str | None] = {
        "--source": str(sixty), "--out": str(tmp_path / "out"), "--media": "video", "--engine": "local",
        "--workers": "1",
    }  # fmt: skip
    arguments = [word for pair in {**options, **change}.items() if pair[1] is not None for word in pair]
    with pytest.raises(ValueError, match=said):
        data_command(["prepare", *map(str, arguments)])
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize("line", ["allow: silent", "keep: duration", "media: [video]"])
def test_a_yaml_of_another_form_ends_in_one_line(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {"source": "a", "out": "b", "media": "video", **yaml.safe_load(line)}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"prepare": tree}))
    assert mmdiff(["data", "prepare", str(tmp_path / "c.yaml")]) == 2
    assert re.search("allow is a list|is no name, as video", capsys.readouterr().err)


def test_a_folder_with_shards_of_another_maker_is_left_alone(sixty: Path, tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match="holds train-000000.tar, which no preparation made"):
        run(sixty, tmp_path)
    assert (tmp_path / "train-000000.tar").read_bytes() == b"precious"


def test_nothing_left_is_an_error_that_says_why(sixty: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is left of 60 items: 0 bad, 60 duration"):
        run(sixty, tmp_path / "out", recipe=Recipe(VideoMedium(), {"duration": (9.0, None)}))


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'mmdiff\[ray\]'"), Ray(1).opened():
        pass


def test_every_setting_of_the_medium_is_in_the_key() -> None:
    plain = Recipe(VideoMedium())
    others = [
        replace(plain, medium=VideoMedium(**settings))  # type: ignore[arg-type]
        for settings in ({"fps": 4.0}, {"crf": 20}, {"scene_threshold": 0.3}, {"size": (8, 8), "resize": "fit"})
    ]
    others += [replace(plain, most_s=1.0), replace(plain, allow=("black",)), replace(plain, keep={"motion": (0, 1)})]
    assert len({recipe.key() for recipe in [plain, *others]}) == 8
