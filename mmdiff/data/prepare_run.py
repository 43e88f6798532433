"""One preparation from the source to the shards and their account: see `mmdiff.data.prepare`."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmdiff.data.duplicates import ORDER, Duplicates
from mmdiff.data.media import whole_file
from mmdiff.data.prepare import Member, Recipe, Shard, Task, digest, fingerprint_of, read_record, utf8
from mmdiff.data.prepare_engines import Engine, Job, Run
from mmdiff.data.sources import Item, Source

REPORT = "prepared.json"


@dataclass(frozen=True)
class Clip:
    """A kept clip: its split, its item, its record, and the result file's name."""

    split: str
    item: Item
    record: Mapping[str, Any]
    result: str
    place: int  # among its item's clips
    siblings: int


def prepare(
    source: Source,
    recipe: Recipe,
    out: Path,
    engine: Engine,
    *,
    duplicates: bool = True,
    shard_clips: int = 1000,
    keep_work: bool = False,
) -> dict[str, Any]:
    """Writes `SPLIT-000000.tar`, ..., `SPLIT.jsonl` and prepared.json into `out`, and returns the last.

    Raises ValueError when `out` holds another preparation or shards that none made, and when no clip is left.
    """
    if shard_clips < 1:
        raise ValueError(f"shard_clips={shard_clips} is below 1; a shard needs a clip")
    asked = {"recipe": recipe.tree(), "recipe_key": recipe.key(), "duplicates": duplicates, "shard_clips": shard_clips}
    asked["source_key"] = _source_key(source)
    _check_free(out, asked)
    work = out / ".work"
    items = [(split, item) for split in ORDER for item in source.splits.get(split, [])]
    tasks: list[Job] = [Task(item, recipe, str(asked["recipe_key"]), work) for _, item in items]
    with engine.opened() as run:
        results = _run(run, tasks, "items")
        clips, account = _gathered(items, results, work)
        clips, copies = _unique(clips) if duplicates else (clips, [])
        problems = [line for split in ORDER for line in source.problems.get(split, [])]
        bad = [(line.kind, str(line)) for line in problems] + account.bad
        if not clips:
            why = ", ".join(f"{count} {reason}" for reason, count in account.dropped.most_common()) or "no clip was cut"
            first = f"; the first: {bad[0][1]}" if bad else ""
            raise ValueError(f"nothing is left of {len(items)} items: {len(bad)} bad, {why}{first}")
        shards = [shard for split in ORDER for shard in _shards(split, clips, shard_clips, work, out)]
        written = _run(run, list(shards), "shards")
    _write_indices(out, shards)
    _tidy(out, {shard.name for shard in shards})
    changes = Counter(change for clip in clips for change in clip.record["changes"])
    report: dict[str, Any] = {
        **asked,
        "items": {"all": len(items) + len(problems), "bad": _sorted(Counter(kind for kind, _ in bad))},
        "clips": {
            "cut": account.cut, "kept": len(clips), "dropped": _sorted(account.dropped), "duplicates": len(copies),
            "changes": _sorted(changes), "splits": _sorted(Counter(clip.split for clip in clips)),
        },
        "bad": [reason for _, reason in bad],
        "duplicates_of": [list(pair) for pair in copies],
        "shards": [{name: made[name] for name in ("name", "clips", "bytes", "sha256")} for made in written],
    }  # fmt: skip
    assert account.cut == len(clips) + len(copies) + account.dropped.total()
    with whole_file(out / REPORT) as temporary:
        temporary.write_bytes(utf8(json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n"))
    if not keep_work:
        shutil.rmtree(work, ignore_errors=True)
    return report


@dataclass
class _Account:
    """Of the first step: clips cut, bad items as (kind, reason), dropped clips by the word of their reason."""

    cut: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def _gathered(items: Sequence[tuple[str, Item]], results: Sequence[str], work: Path) -> tuple[list[Clip], _Account]:
    """The clips that the filters kept, in the order of the source, and what became of the others."""
    clips, account = [], _Account()
    for (split, item), result in zip(items, results, strict=True):
        record = read_record(work / result)
        found = record["clips"]
        account.cut += len(found)
        if "bad" in record:
            account.bad.append((record["bad"]["kind"], record["bad"]["reason"]))
        for place, clip in enumerate(found):
            if clip["dropped"] is None:
                clips.append(Clip(split, item, clip, result, place, len(found)))
            else:
                account.dropped[clip["dropped"].partition(":")[0]] += 1
    return clips, account


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def _run(run: Run, jobs: Sequence[Job], unit: str) -> list[Any]:
    """What the jobs return, in their order, with a progress bar."""
    results: list[Any] = [None] * len(jobs)
    with tqdm(total=len(jobs), desc=unit, unit=unit.removesuffix("s"), dynamic_ncols=True) as bar:
        for place, result in run(jobs):
            results[place] = result
            bar.update()
    return results


def _source_key(source: Source) -> str:
    """Hash of which items there are; whether a file's content has changed is seen by its own key."""
    items = [(split, item.where, item.key, item.captions) for split in ORDER for item in source.splits.get(split, [])]
    return digest(json.dumps(items).encode())


def _check_free(out: Path, asked: Mapping[str, Any]) -> None:
    path = out / REPORT
    if path.is_file():
        old = json.loads(path.read_text("utf-8"))
        names = ("recipe", "duplicates", "shard_clips")
        if other := [name for name in names if old.get(name) != json.loads(json.dumps(asked[name], default=str))]:
            raise ValueError(
                f"{out} holds a preparation with another {' and '.join(other)}; give another folder, or delete it"
            )
    elif not (out / ".work").is_dir() and (strange := sorted(out.glob("*.tar"))):
        raise ValueError(f"{out} holds {strange[0].name}, which no preparation made; give another folder")


def _unique(clips: Sequence[Clip]) -> tuple[list[Clip], list[tuple[str, str]]]:
    """(the clips without near copies of earlier ones, (copy, original) by name)."""
    finder, kept, copies = Duplicates(), [], []
    for place, clip in enumerate(tqdm(clips, desc="duplicates", unit="clip", dynamic_ncols=True)):
        original = finder.first(place, fingerprint_of(clip.record))
        if original is None:
            kept.append(clip)
        else:
            copies.append((_name(clip), _name(clips[original])))
    return kept, copies


def _name(clip: Clip) -> str:
    return clip.item.where + ("" if clip.record["whole"] else f" from {clip.record['start_s']:.3f} s")


def _shards(split: str, clips: Sequence[Clip], most: int, work: Path, out: Path) -> list[Shard]:
    taken: Counter[str] = Counter()
    members = [_member(clip, taken) for clip in clips if clip.split == split]
    parts = [tuple(members[first : first + most]) for first in range(0, len(members), most)]
    return [Shard(f"{split}-{number:06d}.tar", part, work, out) for number, part in enumerate(parts)]


def _member(clip: Clip, taken: Counter[str]) -> Member:
    item, record = clip.item, clip.record
    key = re.sub(r"[^\w/-]+", "_", item.key).strip("/_") or "clip"  # WebDataset ends a key at its first dot
    if clip.siblings > 1:
        key += f"-{clip.place:04d}"
    taken[key] += 1
    if taken[key] > 1:
        key += f"~{taken[key]}"
    text: dict[str, Any] = {"caption": item.captions[0], "captions": item.captions} if any(item.captions) else {}
    text |= {**item.meta, "split": clip.split, **record["facts"], "source": item.where}
    if not record["whole"]:
        text["source_start_s"] = record["start_s"]
    text["measures"] = record["measures"]
    return Member(
        key, json.dumps(text, ensure_ascii=False, default=str), record["suffix"], clip.result, record["member"]
    )


def _write_indices(out: Path, shards: Sequence[Shard]) -> None:
    """SPLIT.jsonl: a line for each clip with its key, its shard and what its JSON says but the further captions."""
    for split in ORDER:
        lines = []
        for shard in (shard for shard in shards if shard.name.startswith(f"{split}-")):
            for member in shard.members:
                told = {name: value for name, value in json.loads(member.text).items() if name != "captions"}
                lines.append(json.dumps({"key": member.key, "shard": shard.name, **told}, ensure_ascii=False))
        if lines:
            with whole_file(out / f"{split}.jsonl") as temporary:
                temporary.write_bytes(utf8("\n".join(lines) + "\n"))


def _tidy(out: Path, made: set[str]) -> None:
    """Removes shards of an earlier run of this preparation over more items, and what a killed writer left."""
    old = json.loads((out / REPORT).read_text("utf-8"))["shards"] if (out / REPORT).is_file() else []
    for name in {shard["name"] for shard in old} - made:
        (out / Path(name).name).unlink(missing_ok=True)  # never outside, whatever the file says
    for split in set(ORDER) - {name.partition("-")[0] for name in made}:
        if any(shard["name"].startswith(f"{split}-") for shard in old):
            (out / f"{split}.jsonl").unlink(missing_ok=True)
    for left in out.glob(".*.tmp"):
        left.unlink(missing_ok=True)
