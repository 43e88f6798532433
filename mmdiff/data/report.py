"""The account of a dataset under a config: what becomes of every item, and what the items are. A dry run of loading.

Every entry of the source is one row, with one status: kept, dropped (with kind and reason) or not used (beyond
`limit`); the rows of all statuses are 100.0 % of the entries.
"""

import math
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from mmdiff.data.clips import ClipDataModule, ClipDataset, Decode, Sample
from mmdiff.data.duplicates import ORDER, Duplicates
from mmdiff.data.items import Item, Problem
from mmdiff.data.media import MediaError
from mmdiff.data.medium import Fingerprint, Medium, Piece, medium_of
from mmdiff.data.prepare_engines import Engine, Job

GEOMETRY = ("too short", "other size")  # kinds of items that fit only by a change which the config does not ask for


@dataclass(frozen=True)
class Row:
    """One entry of the source. The numbers are None where the entry was not looked at."""

    split: str
    where: str
    status: str
    kind: str = ""
    reason: str = ""
    key: str = ""
    captions: tuple[str, ...] = ()
    facts: Mapping[str, Any] | None = None
    measures: Mapping[str, float] | None = None
    faults: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    copy_of: str = ""
    fingerprint: Fingerprint | None = None
    picture: bytes = b""


@dataclass(frozen=True)
class Examine:
    """Loads one item as training would, and looks at the whole of it."""

    row: Row
    item: Item
    decode: Decode
    caption: Any
    medium: Medium | None

    def __call__(self) -> Row:
        result = ClipDataset([self.item], self.decode, caption=self.caption).result(0)
        if isinstance(result, Problem):
            return replace(self.row, status="dropped", kind=result.kind, reason=str(result))
        if self.medium is None:
            return replace(self.row, status="kept")
        try:
            seen = self.medium.look(self.item.source(), self.item.where, Piece(), self.row.captions[0])
        except MediaError as error:  # the window of the clip is whole, another part of the file is not
            faults = (f"elsewhere {error.kind}",)
            return replace(self.row, status="kept", faults=faults, reason=" ".join(str(error).split()))
        sample = Sample(result["x"], result["rate"], float(result["duration_s"]))
        return replace(
            self.row, status="kept", facts=seen.facts, measures=seen.measures, faults=seen.faults,
            changes=self.medium.changes(seen.facts, sample) + _in_time(seen.facts, sample),
            fingerprint=seen.fingerprint, picture=seen.picture,
        )  # fmt: skip


def _in_time(facts: Mapping[str, Any], sample: Sample) -> tuple[str, ...]:
    """padded: the clip is longer than what the item gave it; cut: it shows less than the item."""
    data, rate = sample.data, sample.rate
    if isinstance(data, dict) and isinstance(rate, dict):
        name = next(iter(data))
        data, rate = data[name], rate[name]
    assert not isinstance(data, dict)
    assert not isinstance(rate, dict)
    clip_s = data.shape[1] / rate
    found = ["padded in time"] if clip_s > sample.duration_s * (1 + 1e-3) + 1e-6 else []
    if float(facts["duration"]) > sample.duration_s * (1 + 1e-3) + 1e-6:
        found.append("a window of it")
    return tuple(found)


def rows_of(data: ClipDataModule, engine: Engine) -> list[Row]:
    """A row for every entry of the module's source, in the order test, val, train.

    Raises ValueError where the source cannot be read at all. The module's budget of bad items is not applied here.
    """
    allowed, data.max_bad_share = data.max_bad_share, 1.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # every line is in the account
            data.setup()
    finally:
        data.max_bad_share = allowed
    source, medium = data.source, medium_of(data)
    if source is None:
        raise ValueError(f"{type(data).__name__} has no source to account for")
    rows: list[Row] = []
    jobs: list[Job] = []
    places: list[int] = []
    for split in ORDER:
        dataset, bad = data.datasets[split], data.bad[split].found
        for place, item in enumerate(source.splits[split]):
            row = Row(split, item.where, "not used", key=item.key, captions=tuple(item.captions or [""]))
            rows.append(row)
            if place >= len(dataset):
                rows[-1] = replace(row, kind="limit", reason=f"beyond limit={data.limit}")
            elif place in bad:
                rows[-1] = replace(row, status="dropped", kind=bad[place].kind, reason=str(bad[place]))
            else:
                decode: Any = dataset.decode
                decode = decode if dataset.shapes is None else decode.to(dataset.shapes[place])
                jobs.append(Examine(row, item, decode, data.caption, medium))
                places.append(len(rows) - 1)
        rows += [Row(split, line.where, "dropped", line.kind, str(line)) for line in source.problems[split]]
    with engine.opened() as run, tqdm(total=len(jobs), desc="items", unit="item", dynamic_ncols=True) as bar:
        for number, row in run(jobs):
            rows[places[number]] = row
            bar.update()
    return _with_copies(rows)


def _with_copies(rows: Sequence[Row]) -> list[Row]:
    finder, found = Duplicates(), list(rows)
    for place, row in enumerate(rows):
        if row.fingerprint is not None and (original := finder.first(place, row.fingerprint)) is not None:
            found[place] = replace(row, copy_of=f"{rows[original].split} {rows[original].where}")
    return found


def account(rows: Sequence[Row], data: ClipDataModule, named: Iterable[str]) -> dict[str, Any]:
    """The report as plain values. named: the arguments that the config gives to its data module.

    `failures` holds a line for each reason for which the config should not be trained with.
    """
    statuses = Counter(row.status for row in rows)
    assert sum(statuses.values()) == len(rows)
    assert set(statuses) <= {"kept", "dropped", "not used"}
    kept = [row for row in rows if row.status == "kept"]
    medium = medium_of(data)
    return {
        "path": str(data.path),
        "measured": medium is not None,  # else no package has added a medium for this data module
        "entries": len(rows),
        "accounted_percent": round(100 * sum(statuses.values()) / max(1, len(rows)), 1),
        "status": {name: statuses.get(name, 0) for name in ("kept", "dropped", "not used")},
        "splits": {s: dict(Counter(row.status for row in rows if row.split == s)) for s in reversed(ORDER)},
        "dropped": dict(Counter(row.kind for row in rows if row.status == "dropped").most_common()),
        "not_used": dict(Counter(row.kind for row in rows if row.status == "not used").most_common()),
        "changes": dict(Counter(change for row in kept for change in row.changes).most_common()),
        "faults": dict(Counter(fault for row in kept for fault in row.faults).most_common()),
        "duplicates": {
            "copies": sum(bool(row.copy_of) for row in kept),
            "across_splits": sum(bool(row.copy_of) and row.copy_of.split(" ")[0] != row.split for row in kept),
        },
        "facts": _summaries([row.facts for row in kept if row.facts is not None]),
        "measures": _summaries([row.measures for row in kept if row.measures is not None]),
        "captions": captions_of(kept),
        "failures": failures(rows, data, medium, set(named)),
        "items": [_plain(row) for row in rows],
    }


def failures(rows: Sequence[Row], data: ClipDataModule, medium: Medium | None, named: set[str]) -> list[str]:
    """Why this config would train on other than what it says: geometry changed unasked, or too many items dropped."""
    found = []
    for kind in GEOMETRY:
        refused = [row for row in rows if row.status == "dropped" and row.kind == kind]
        if refused:
            found.append(
                f"{len(refused)} items fit only by a change that the config does not ask for: {refused[0].reason}"
            )
    for change, arguments in (medium.tellers if medium is not None else {}).items():
        changed = [row for row in rows if change in row.changes]
        if changed and not named & set(arguments):
            choice = " or ".join(f"data.init_args.{name}" for name in arguments)
            found.append(f"{len(changed)} items would be {change} unasked, the first {changed[0].where}; give {choice}")
    used = [row for row in rows if row.status != "not used"]
    dropped = [row for row in used if row.status == "dropped" and row.kind not in GEOMETRY]
    if len(dropped) > data.max_bad_share * len(used):
        found.append(
            f"{len(dropped)} of {len(used)} entries are dropped, more than max_bad_share={data.max_bad_share}; repair "
            f"or remove them, or raise data.init_args.max_bad_share; the first: {dropped[0].reason}"
        )
    if not any(row.status == "kept" for row in rows):
        found.append("no item is kept")
    return found


def captions_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Lengths and words of the captions of kept items; a word is a run of characters between spaces, lower case."""
    texts = [text for row in rows for text in row.captions if text]
    words = [[word.strip(".,;:!?'\"()").lower() for word in text.split()] for text in texts]
    counts = Counter(word for line in words for word in line if word)
    firsts = Counter(row.captions[0] for row in rows if row.captions)
    return {
        "captions": len(texts),
        "distinct": len(set(texts)),
        "items_without": sum(not any(row.captions) for row in rows),
        "items_sharing_the_first": sum(count for count in firsts.values() if count > 1),
        "characters": _summary([len(text) for text in texts]),
        "words": _summary([len(line) for line in words]),
        "vocabulary": len(counts),
        "most_used": counts.most_common(30),
        "not_ascii": sum(not text.isascii() for text in texts),
    }


def _summaries(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for record in records for name in record)
    found: dict[str, Any] = {}
    for name in names:
        values = [record[name] for record in records if name in record]
        numbers = [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]
        found[name] = (
            _summary(numbers) if len(numbers) == len(values) else dict(Counter(map(str, values)).most_common(20))
        )
    return found


def _summary(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    return {
        "least": min(values), "median": statistics.median(values), "mean": round(statistics.fmean(values), 6),
        "most": max(values),
    }  # fmt: skip


def _plain(row: Row) -> dict[str, Any]:
    names = ("split", "where", "status", "kind", "reason", "key", "copy_of")
    plain: dict[str, Any] = {name: getattr(row, name) for name in names if getattr(row, name)}
    for name in ("captions", "faults", "changes"):
        if getattr(row, name):
            plain[name] = list(getattr(row, name))
    for name in ("facts", "measures"):
        if getattr(row, name) is not None:
            plain[name] = dict(getattr(row, name))
    return plain
