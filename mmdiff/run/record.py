"""What a run was: run.json, with all that is needed to run it again and to say where it came from."""

import hashlib
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from mmdiff.data.media import whole_file

RECORD = "run.json"
DIFF = "git.diff"
_LOOKED_AT = 4096  # files whose size goes into the fingerprint of a data set; a listing of millions would take minutes
_DIFF_MIB = 4


def read_record(folder: Path) -> dict[str, Any]:
    """run.json of a run's folder. Raises ValueError where there is none, or it is broken."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {RECORD}: give the folder of a run of `mmdiff fit`") from None
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("launches"), list):
        raise ValueError(f"{path} is not the record of a run: it has no list of launches")
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes run.json, whole or not at all."""
    with whole_file(folder / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1, default=str) + "\n", "utf-8")


def versions() -> dict[str, str]:
    """Of Python and of every installed distribution."""
    found = {str(d.metadata["Name"]).lower(): d.version for d in distributions() if d.metadata["Name"]}
    return {"python": platform.python_version(), **dict(sorted(found.items()))}


def machine() -> dict[str, Any]:
    """Names and sizes of what this process runs on."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda if cuda else None,
    }


def command() -> str:
    """As a shell would take it."""
    return shlex.join([Path(sys.argv[0]).name if Path(sys.argv[0]).name != "__main__.py" else "mmdiff", *sys.argv[1:]])


def now() -> str:
    """Local time with its offset, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def git_states(folder: Path) -> dict[str, dict[str, Any]]:
    """State of the repository that this code lies in, and of that of the working directory: "mmdiff", "project".

    One that is no repository is left out, and "project" where it is the same. What has changed since the commit is
    written to git.diff in `folder`; untracked files are only named.
    """
    found, texts, seen = dict[str, dict[str, Any]](), list[str](), set[str]()
    for name, place in (("mmdiff", Path(__file__).resolve().parent), ("project", Path.cwd())):
        root = _git(place, "rev-parse", "--show-toplevel")
        commit = _git(place, "rev-parse", "HEAD")
        # A virtual environment may lie in someone else's repository, which says nothing of the code installed in it.
        ours = name == "project" or bool(_git(place, "ls-files", "__init__.py"))
        if root is None or commit is None or root in seen or not ours:
            continue
        seen.add(root)
        diff = _git(place, "diff", "HEAD", "--no-color", "--no-ext-diff") or ""
        status = (_git(place, "status", "--porcelain") or "").splitlines()
        found[name] = {
            "folder": root,
            "commit": commit,
            "branch": _git(place, "rev-parse", "--abbrev-ref", "HEAD"),
            "changed": [line[3:] for line in status if not line.startswith("??")],
            "untracked": [line[3:] for line in status if line.startswith("??")][:100],
            "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        }
        if diff:
            texts.append(diff if len(diff) < _DIFF_MIB * 2**20 else f"# {root}: over {_DIFF_MIB} MiB, left out\n")
    if texts:
        with whole_file(folder / DIFF) as temporary:
            temporary.write_text("\n".join(texts), "utf-8")
    return found


def data_record(loaders: dict[str, Any]) -> dict[str, Any]:
    """What a loader of each split gives: its number of items and batches, some captions, and a fingerprint.

    fingerprint: first 16 digits of the SHA-256 of the items' keys, captions and sizes in bytes, in their order, where
    the loader's data set says its `items` (`mmdiff.data`); of more than 4,096 items the sizes of as many, spread
    evenly. Bytes are not read: a file that changes at the same size goes unnoticed. How items are decoded, or drawn,
    is in the config. left_out: bad items by kind.
    """
    found = {}
    for split, loader in loaders.items():
        dataset = getattr(loader, "dataset", None)
        items = getattr(dataset, "items", None)
        found[split] = {
            "data set": type(dataset).__name__,
            "items": _length(dataset),
            "batches": _length(loader),
            "fingerprint": None if items is None else fingerprint_items(items),
            "captions": None if items is None else captions(items),
            "left_out": left_out(loader),
        }
    return found


def left_out(loader: Any) -> dict[str, int]:
    """How many items of each kind of fault a loader of `mmdiff.data` has left out so far."""
    bad = getattr(loader, "bad", None)
    return {} if bad is None else dict(bad.by_kind())


def captions(items: Sequence[Any]) -> dict[str, Any]:
    """How many captions there are, how many of them differ, their words, and some; {} where clips are drawn."""
    texts = [caption for item in items for caption in item.captions]
    words = Counter(word.strip(".,;:!?").lower() for caption in texts for word in caption.split())
    return (
        {
            "captions": len(texts),
            "distinct": len(set(texts)),
            "vocabulary": len(words),
            "most used": ", ".join(f"{word} {count}" for word, count in words.most_common(12)),
            "first": texts[:5],
        }
        if texts
        else {}
    )


def fingerprint_items(items: Sequence[Any]) -> str:
    """See `data_record`."""
    every = max(1, -(-len(items) // _LOOKED_AT))
    facts = hashlib.sha256()
    for place, item in enumerate(items):
        size = _size(item) if place % every == 0 else None
        facts.update(json.dumps([item.key, list(item.captions), size]).encode())
    return facts.hexdigest()[:16]


def batches_of(loaders: Any) -> list[Any]:
    """A trainer's loaders as a list, however they were given."""
    if loaders is None:
        return []
    if isinstance(loaders, dict):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]


def _size(item: Any) -> int | None:
    if item.size:
        return int(item.size)
    try:
        return int(item.path.stat().st_size)
    except OSError:
        return None  # drawn, or not local


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except TypeError:
        return None


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
