"""Every form that a data set can have gives the same items; what cannot be used is a named problem of its own."""

import csv
import http.server
import io
import json
import os
import pickle
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

import audio
from audio.files import write_audio
from mmdiff.data import remote
from mmdiff.data.captions import MAX_CHARACTERS
from mmdiff.data.items import Item, Problem
from mmdiff.data.media import DamagedError, UnreachableError
from mmdiff.data.sources import load_source

NAMES = ["a", "b", "c d", "ё"]
WAV = (".wav",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four sounds that differ, with two captions each."""
    root = tmp_path / "data"
    for number, name in enumerate(NAMES):
        write_audio(root / f"{name}.wav", torch.full((1, 400), number / 8), 8000)
        (root / f"{name}.txt").write_text(f"caption {number}\nanother {number}\n", "utf-8")
    return root


def shard(path: Path, folder: Path, names: list[str] = NAMES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name in names:
            for suffix in (".wav", ".txt"):
                archive.add(folder / f"{name}{suffix}", f"{name}{suffix}")
    return path


def rows(folder: Path) -> list[dict[str, object]]:
    return [
        {"file_name": f"{name}.wav", "captions": (folder / f"{name}.txt").read_text("utf-8").split("\n")[:2]}
        for name in NAMES
    ]


def contents(source: str | Path, **options: object) -> list[tuple[str, list[str], bytes]]:
    made = load_source(source, WAV, val_share=0, **options)
    items = [pickle.loads(pickle.dumps(item)) for item in made.splits["train"]]  # noqa: S301  as a spawned worker gets them
    found = [item.source() for item in items]
    data = [given if isinstance(given, bytes) else given.read_bytes() for given in found]
    return [(item.key, item.captions, one) for item, one in zip(items, data, strict=True)]


def problems(source: Path, split: str = "train") -> dict[str, str]:
    """kind of each problem by the file that it names."""
    return {line.where.split(":")[-1]: line.kind for line in load_source(source, WAV, val_share=0).problems[split]}


# forms


def test_every_form_gives_the_same_items(tmp_path: Path, folder: Path) -> None:
    expected = contents(folder)
    assert [(key, texts) for key, texts, _ in expected] == [
        (name, [f"caption {i}", f"another {i}"]) for i, name in enumerate(NAMES)
    ]
    one = shard(tmp_path / "one.tar", folder)
    shard(tmp_path / "parts" / "x-000.tar", folder, NAMES[:2])
    shard(tmp_path / "parts" / "x-001.tar", folder, NAMES[2:])
    (folder / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows(folder)))
    with open(folder / "list.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["caption", "file_name"])
        writer.writerows((text, row["file_name"]) for row in rows(folder) for text in row["captions"])
    assert contents(one) == expected
    assert contents(tmp_path / "parts") == expected
    assert contents(f"{tmp_path}/parts/x-{{000..001}}.tar") == expected
    assert contents(f"{tmp_path}/parts/x-00{{0,1}}.tar") == expected
    assert contents(f"{tmp_path}/parts/*.tar") == expected
    assert contents("-", stdin=io.BytesIO(one.read_bytes())) == expected
    assert contents(folder / "list.jsonl") == expected
    assert contents(folder / "list.csv") == expected, "rows of one file add their captions up"
    assert contents(one.rename(tmp_path / "one [a|{b}]*.tar")) == expected, "a file's own name is no pattern"


def test_parquet(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows(folder)), folder / "list.parquet")
    assert contents(folder / "list.parquet") == contents(folder)
    (folder / "list.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"list\.parquet: cannot be read as Parquet.*write it again"):
        load_source(folder / "list.parquet", WAV)


def test_hugging_face(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    table = [{"audio": {"bytes": (folder / str(row["file_name"])).read_bytes(), "path": None}, **row, "key": name}
             for row, name in zip(rows(folder), NAMES, strict=True)]  # fmt: skip
    table[3]["audio"] = {"bytes": None, "path": "/etc/hostname"}
    made = datasets.Dataset.from_list(table)
    made.save_to_disk(tmp_path / "plain")
    made.cast_column("audio", datasets.Audio()).save_to_disk(tmp_path / "typed")
    datasets.DatasetDict({"train": made.select([0, 1]), "validation": made.select([2])}).save_to_disk(tmp_path / "two")
    for name in ("plain", "typed"):
        items = load_source(tmp_path / name, WAV, val_share=0).splits["train"]
        assert [(item.key, item.captions) for item in items] == [(key, texts) for key, texts, _ in contents(folder)]
        assert [item.read() for item in items[:3]] == [data for *_, data in contents(folder)[:3]]
    with pytest.raises(UnreachableError, match=r"train:3: the dataset holds a file's name and not its bytes"):
        load_source(tmp_path / "plain", WAV, val_share=0).splits["train"][3].read()
    splits = load_source(tmp_path / "two", WAV).splits
    assert {name: [item.key for item in items] for name, items in splits.items()} == {
        "train": ["a", "b"], "val": ["c d"], "test": [],
    }  # fmt: skip
    made.remove_columns("audio").save_to_disk(tmp_path / "mute")
    with pytest.raises(ValueError, match="no column of media among"):
        load_source(tmp_path / "mute", WAV)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"needs datasets; pip install 'mmdiff\[tables\]'"):
        load_source("hf://someone/something", WAV)


def test_a_stream_is_shuffled_and_read_by_workers_like_a_file(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.BytesIO(shard(tmp_path / "one.tar", folder).read_bytes())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
    data = audio.ClipDataModule("-", sample_rate=8000, samples=400, batch_size=2, num_workers=1, val_share=0)
    data.setup()
    seen = [key for batch in data.train_dataloader() for key in batch["key"]]
    assert sorted(seen) == sorted(NAMES)
    two = audio.ClipDataModule("-")
    two.trainer = MagicMock(world_size=2)
    with pytest.raises(ValueError, match="standard input is for one process; save the tar"):
        two.setup()
    spool = data.datasets["train"].items[0].path
    assert spool.is_file()
    del data
    assert not spool.exists(), "its copy on the disk goes with it"


def test_patterns_say_what_is_wrong(tmp_path: Path, folder: Path) -> None:
    shard(tmp_path / "x-0.tar", folder)
    with pytest.raises(ValueError, match=r"x-1\.tar: cannot be read"):
        load_source(f"{tmp_path}/x-{{0..1}}.tar", WAV)
    with pytest.raises(ValueError, match="matches no file"):
        load_source(f"{tmp_path}/y-*.tar", WAV)
    with pytest.raises(ValueError, match="falls"):
        load_source(f"{tmp_path}/x-{{3..1}}.tar", WAV)
    with pytest.raises(ValueError, match=r"matches .*a\.wav, which is no \.tar"):
        load_source(f"{folder}/*.wav", WAV)
    for command in ("pipe:cat x.tar", "pipe:touch /tmp/run", "cat x.tar |"):
        with pytest.raises(ValueError, match="would run a command, which is refused"):
            load_source(command, WAV)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"is a file but not a \.tar shard or a table"):
        load_source(tmp_path / "notes.txt", WAV)


# other machines


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server that answers ranges, as the plain one does not."""

    ranges = True

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        data = (Path(self.directory) / self.path.lstrip("/")).read_bytes()
        asked = self.headers.get("Range")
        if asked and self.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last or len(data) - 1) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        else:
            part = data
            self.send_response(200)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = type("Handler", (Ranges,), {"directory": str(tmp_path)})
    made = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0),
        lambda *args: handler(*args, directory=str(tmp_path)),  # type: ignore[arg-type]
    )
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def test_shards_over_http(tmp_path: Path, folder: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    shard(tmp_path / "x-0.tar", folder, NAMES[:2])
    shard(tmp_path / "x-1.tar", folder, NAMES[2:])
    assert contents(f"{server}/x-{{0..1}}.tar") == contents(folder)
    items = load_source(f"{server}/x-0.tar", WAV, val_share=0).splits["train"]
    (tmp_path / "x-0.tar").unlink()
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    with pytest.raises(UnreachableError, match=r"x-0\.tar:a\.wav: cannot be fetched from http://127"):
        items[0].read()
    with pytest.raises(ValueError, match=r"x-7\.tar: cannot be opened"):
        load_source(f"{server}/x-7.tar", WAV)


def test_a_server_without_ranges_is_not_believed(
    tmp_path: Path, folder: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    shard(tmp_path / "x-0.tar", folder, NAMES[:2])
    items = load_source(f"{server}/x-0.tar", WAV, val_share=0).splits["train"]
    monkeypatch.setattr(Ranges, "ranges", False)
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    with pytest.raises((DamagedError, UnreachableError), match=r"x-0\.tar:b\.wav"):
        items[1].read()


def test_s3_is_read_by_fsspec_and_only_when_asked_for(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    with pytest.raises(ValueError, match=r"ftp is not read; give a local path, http, https, s3"):
        load_source("ftp://host/x.tar", WAV)
    with pytest.raises(ValueError, match=r"local::s3 is not read"):
        load_source("local::s3://bucket/x.tar", WAV)
    with pytest.raises(ValueError, match=r"end it in \.tar"):
        load_source("s3://bucket/folder", WAV)
    monkeypatch.setattr(remote.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs s3fs; pip install s3fs"):
        load_source("s3://bucket/x.tar", WAV)

    class Bucket(MemoryFileSystem):
        protocol = "s3"
        store: dict[str, object] = {}  # noqa: RUF012
        pseudo_dirs = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("s3://").strip("/")

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Bucket)
    data = shard(tmp_path / "x.tar", folder).read_bytes()
    Bucket().pipe("/bucket/train-0.tar", data)
    assert contents("s3://bucket/train-{0..0}.tar") == contents(folder)
    assert contents("s3://bucket/*.tar") == contents(folder)


def test_passing_faults_of_the_network_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class System:
        def cat_file(self, path: str, start: int, end: int) -> bytes:
            calls.append(start)
            if len(calls) < 3:
                raise TimeoutError("slow")
            return b"0123456789"[start:end]

    monkeypatch.setattr(remote, "_system", lambda url: (System(), url))
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    item = remote.RemoteItem("k", "x.tar:k", ["c"], {}, Path("x.tar"), 2, 3, url="s3://b/x.tar")
    assert item.source() == b"234"
    assert calls == [2, 2, 2]
    cut = remote.RemoteItem("k", "x.tar:k", ["c"], {}, Path("x.tar"), 8, 3, url="s3://b/x.tar")
    with pytest.raises(DamagedError, match="2 of 3 bytes"):
        cut.read()


# rows and captions that cannot be used


def test_rows_outside_of_the_root_are_refused_one_by_one(tmp_path: Path, folder: Path) -> None:
    write_audio(tmp_path / "secret.wav", torch.zeros(1, 10), 8000)
    (folder / "inside.wav").symlink_to(folder / "a.wav")
    (folder / "link.wav").symlink_to(tmp_path / "secret.wav")
    (folder / "round.wav").symlink_to(folder / "round.wav")
    outside = ["../secret.wav", str(tmp_path / "secret.wav"), "sub/../../secret.wav", "link.wav"]
    others = ["round.wav", "https://host/a.wav", "file:///etc/hostname", "a\0.wav", "gone.wav", ""]
    names = ["a.wav", *outside, *others, "a.txt", "inside.wav"]
    (folder / "list.jsonl").write_text("\n".join(json.dumps({"path": name, "caption": "x"}) for name in names))
    source = load_source(folder / "list.jsonl", WAV, val_share=0)
    assert [item.key for item in source.splits["train"]] == ["a", "inside"]
    kinds = {line.where.split(":", 2)[2]: line.kind for line in source.problems["train"]}
    assert kinds == {**dict.fromkeys([*outside, *others], "unreachable"), "a.txt": "not media"}
    reasons = {line.where.split(":", 2)[2]: line for line in source.problems["train"]}
    for name in outside:
        assert f"points outside of {folder.resolve()}; put the files below" in reasons[name]
    assert reasons["gone.wav"] == "list.jsonl:10:gone.wav: is not there; put the file back or delete the row"


@pytest.mark.parametrize(("suffix", "line"), [(".jsonl", 2), (".csv", 3)])
def test_a_row_that_cannot_be_read_is_a_problem_and_the_rest_goes_on(folder: Path, suffix: str, line: int) -> None:
    if suffix == ".jsonl":
        rows = [
            b'{"file_name": "a.wav", "caption": "fine"}',
            b'{"file_name": "b.wav", ',
            b'{"file_name": "b.wav", "caption": "\xff\xfe"}',
            b'{"file_name": "c d.wav", "caption": "' + b"x" * 1_000_000 + b'"}',
        ]
        kinds = {"2": "caption unreadable", "3": "caption not UTF-8", "c d.wav": "caption too large"}
    else:
        rows = [b"file_name,caption", b"a.wav,fine", b"b.wav,\xff\xfe", b"c d.wav," + b"x" * 1_000_000]
        kinds = {"b.wav": "caption not UTF-8", "4": "row unreadable"}
    rows.append('{"file_name": "ё.wav", "caption": "ж"}'.encode() if suffix == ".jsonl" else "ё.wav,ж".encode())
    (folder / f"list{suffix}").write_bytes(b"\n".join(rows))
    source = load_source(folder / f"list{suffix}", WAV, val_share=0)
    assert [(item.key, item.captions) for item in source.splits["train"]] == [("a", ["fine"]), ("ё", ["ж"])]
    assert problems(folder / f"list{suffix}") == kinds


def test_splits_of_a_table(folder: Path) -> None:
    table = [{"file_name": f"{name}.wav", "caption": "x", "split": split, "n": 1}
             for name, split in zip(NAMES, ("train", "validation", "test", "other"), strict=True)]  # fmt: skip
    (folder / "list.jsonl").write_text("\n".join(json.dumps(row) for row in table))
    source = load_source(folder / "list.jsonl", WAV)
    assert {name: [item.key for item in items] for name, items in source.splits.items()} == {
        "train": ["a"], "val": ["b"], "test": ["c d"],
    }  # fmt: skip
    assert source.splits["train"][0].meta == {"n": 1}
    assert [line.kind for line in source.problems["train"]] == ["unknown split"]
    (folder / "list.jsonl").write_text('{"name": "a.wav"}')
    with pytest.raises(ValueError, match="its rows have no column file_name, path, file"):
        load_source(folder / "list.jsonl", WAV)


def test_captions_that_cannot_be_used_are_named_problems(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"caf\xe9")
    (folder / "b.txt").write_text("x" * 1_000_000)
    (folder / "c d.txt").unlink()
    (folder / "c d.json").write_text("[" * 100_000)
    assert problems(folder) == {
        "a.wav": "caption not UTF-8", "b.wav": "caption too large", "c d.wav": "caption unreadable",
    }  # fmt: skip
    (folder / "b.txt").write_text("x" * MAX_CHARACTERS)
    (folder / "a.txt").write_text("")
    (folder / "c d.json").write_text('{"caption": "\\ud800"}')
    assert problems(folder) == {"a.wav": "no caption", "c d.wav": "caption not UTF-8"}
    (folder / "c d.json").write_bytes(b'{"x": "' + b"y" * (1 << 20) + b'"}')
    assert problems(folder)["c d.wav"] == "caption too large"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_permissions(folder: Path) -> None:
    (folder / "a.txt").chmod(0)
    (folder / "b.wav").chmod(0)
    assert problems(folder) == {"a.wav": "unreachable"}


def test_what_is_forbidden_is_a_problem_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: object, *args: object, **options: object) -> object:
        if str(path).endswith(("a.txt", "b.wav")):
            raise PermissionError(13, "Permission denied", str(path))
        return io.open(path, *args, **options)  # type: ignore[call-overload]  # noqa: UP020

    items = load_source(folder, WAV, val_share=0).splits["train"]
    monkeypatch.setattr("mmdiff.data.folder.open", forbidden, raising=False)
    monkeypatch.setattr("mmdiff.data.items.open", forbidden, raising=False)
    assert problems(folder) == {"a.wav": "unreachable"}
    with pytest.raises(UnreachableError, match=r"b\.wav: cannot be read .*Permission denied"):
        items[1].read()


def test_a_problem_is_a_line_that_survives_a_process() -> None:
    problem = Problem("x.tar:a", "damaged", "cut off")
    copy = pickle.loads(pickle.dumps(problem))  # noqa: S301
    assert (copy, copy.where, copy.kind) == ("x.tar:a: cut off", "x.tar:a", "damaged")
    assert Problem("a", "k", "the item a is bad") == "the item a is bad", "named once"


def test_an_item_cut_off_after_the_index_is_damaged(tmp_path: Path, folder: Path) -> None:
    path = shard(tmp_path / "x.tar", folder)
    item: Item = load_source(path, WAV, val_share=0).splits["train"][-1]
    path.write_bytes(path.read_bytes()[: (item.offset or 0) + 7])
    with pytest.raises(DamagedError, match=r"7 of \d+ bytes are there"):
        item.source()
    path.unlink()
    with pytest.raises(UnreachableError, match="cannot be read"):
        item.source()
