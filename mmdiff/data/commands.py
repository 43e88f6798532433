"""`mmdiff data report` and `mmdiff data prepare`."""

import argparse
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from mmdiff.generate import Parser

FAILED = 3  # exit status: the work is done, and its account says no


def main(args: list[str]) -> int:
    """Accounts for a dataset under a config (report), or makes one of raw media (prepare)."""
    commands = {"report": report, "prepare": prepare}
    if args[:1] in (["-h"], ["--help"]) or not args:
        lines = "\n".join(f"  {name:9}{(command.__doc__ or '').splitlines()[0]}" for name, command in commands.items())
        print(f"usage: mmdiff data COMMAND ...\n\n{main.__doc__}\n\n{lines}\n\nmmdiff data COMMAND --help says more")
        return 0 if args else 2
    if args[0] not in commands:
        raise ValueError(f"{args[0]!r} is no command of mmdiff data; there are {', '.join(commands)}")
    return commands[args[0]](args[1:])


def report(args: list[str]) -> int:
    """What becomes of every item under a config, as HTML and JSON; status 3 where the config should not be used."""
    parser = Parser(
        "mmdiff data report",
        description="Loads every item once as training would, and accounts for all of them: kept, dropped and why, "
        "retimed, resized, cropped, padded, near copies, silent, black or frozen, loudness, captions. Status 3 where "
        "the config would change geometry without saying so, or more is dropped than max_bad_share allows.",
    )
    parser.add_argument("config", help="YAML with a `data:` tree, of `mmdiff fit` or of data alone")
    parser.add_argument("--out", type=Path, help="folder for report.html and report.json (runs/data_report/CONFIG)")
    parser.add_argument("--path", help="of the data, in the place of the config's")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only the first N items of each split; the rest counts as not used"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help="the config may also name it")
    given = parser.parse_args(args)
    if given.workers < 1:
        raise ValueError(f"--workers {given.workers} is below 1")
    from mmdiff.config import build, read_config
    from mmdiff.data.clips import ClipDataModule
    from mmdiff.data.media import whole_file
    from mmdiff.data.prepare import utf8
    from mmdiff.data.prepare_engines import Local
    from mmdiff.data.report import account, rows_of
    from mmdiff.data.report_page import page

    tree = read_config(given.config).get("data")
    while isinstance(tree, dict) and "class_path" in dict((tree.get("init_args") or {}).get("data") or {}):
        tree = tree["init_args"]["data"]  # of a module that wraps another, as a cache
    if not isinstance(tree, dict) or "class_path" not in tree:
        raise ValueError(
            f"{given.config} has no data with a class_path; a report needs the data module that it accounts for"
        )
    arguments = dict(tree.get("init_args") or {})
    arguments |= {name: value for name, value in (("path", given.path), ("limit", given.limit)) if value is not None}
    needed = "a report accounts for the items of a ClipDataModule"
    try:
        data = build({**tree, "init_args": arguments}, given.trust)
    except ValueError as error:
        raise ValueError(f"{given.config}: {error} ({needed})") from error
    if not isinstance(data, ClipDataModule):
        raise ValueError(f"{given.config}: {tree['class_path']} has no items; {needed}")
    rows = rows_of(data, Local(given.workers))
    found = account(rows, data, arguments)
    out = given.out or Path("runs/data_report") / Path(given.config).stem
    with whole_file(out / "report.json") as temporary:
        temporary.write_bytes(utf8(json.dumps(found, indent=1, ensure_ascii=False)))
    with whole_file(out / "report.html") as temporary:
        temporary.write_bytes(utf8(page(found, rows, f"mmdiff data report {given.config}")))
    for name in ("status", "dropped", "changes", "faults", "duplicates"):
        if found[name]:
            print(f"{name:11}{', '.join(f'{count} {word}' for word, count in found[name].items())}")
    print(f"{found['accounted_percent']:.1f} % of {found['entries']} entries accounted for: {out / 'report.html'}")
    if not found["measured"]:
        print(
            f"only loaded, not measured: no entry point in the group mmdiff.media is of {tree['class_path']}'s package"
        )
    for line in found["failures"]:
        print(f"fails: {line}")
    return FAILED if found["failures"] else 0


def prepare(args: list[str]) -> int:
    """Cuts, filters, deduplicates and converts media, and writes WebDataset shards; status 3 where too many are bad."""
    given = _prepare_parser().parse_args(args)
    if given.limit is not None and given.limit < 1:
        raise ValueError(f"--limit {given.limit} is below 1; leave it out to use every item")
    settings = _settings(given)
    from mmdiff.config import build
    from mmdiff.data.medium import Medium
    from mmdiff.data.prepare import Recipe
    from mmdiff.data.prepare_run import prepare as run
    from mmdiff.data.sources import load_source

    medium = build(settings["media"], given.trust)
    if not isinstance(medium, Medium):
        raise ValueError(f"media: {settings['media']['class_path']} is not a Medium of mmdiff.data.medium")
    recipe = Recipe(medium, settings["keep"], settings["longest_s"], tuple(settings["allow"] or ()))
    where = settings["source"]
    source = load_source(
        where if "://" in where or where == "-" else Path(where).expanduser().absolute(),
        medium.extensions,
        val_share=settings["val_share"],
        need_captions=settings["captions"],
    )
    if given.limit is not None:
        source = type(source)(
            {s: items[: given.limit] for s, items in source.splits.items()}, source.problems, source.keep
        )
    engine, out = _engine(given), Path(settings["out"]).expanduser().absolute()
    found = run(
        source, recipe, out, engine, duplicates=settings["duplicates"], shard_clips=settings["shard_clips"],
        keep_work=given.keep_work,
    )  # fmt: skip
    clips, items = found["clips"], found["items"]
    print(f"items      {items['all']}, bad {sum(items['bad'].values())} {items['bad'] or ''}".rstrip())
    for name in ("dropped", "changes", "splits"):
        if clips[name]:
            print(f"{name:11}{', '.join(f'{count} {word}' for word, count in clips[name].items())}")
    print(f"clips      {clips['cut']} cut, {clips['duplicates']} near copies dropped, {clips['kept']} kept")
    print(f"{len(found['shards'])} shards and {out / 'prepared.json'}")
    share = sum(items["bad"].values()) / max(1, items["all"])
    if share > settings["max_bad_share"]:
        most = settings["max_bad_share"]
        print(f"fails: {share:.1%} of the items are bad, more than max_bad_share={most}; prepared.json names them")
        return FAILED
    return 0


_DEFAULTS: dict[str, Any] = {
    "keep": {}, "longest_s": None, "allow": [], "duplicates": True, "shard_clips": 1000, "captions": True,
    "val_share": 0.0, "max_bad_share": 0.01,
}  # fmt: skip


def _prepare_parser() -> Parser:
    parser = Parser(
        "mmdiff data prepare",
        description=f"{prepare.__doc__} Give a YAML with a `prepare:` tree, options, or both; options go before "
        "the YAML. The same source and settings give the same shards, byte for byte, whoever does the work. A run that "
        "was ended goes on where it was: finished items and shards are kept.",
    )
    parser.add_argument("config", nargs="?", help="YAML with a `prepare:` tree")
    parser.add_argument("--source", help="folder, shards, manifest or address, as of the data modules")
    parser.add_argument("--out", help="folder for the shards")
    parser.add_argument("--media", help="kind of media: video, audio, or one that a package adds")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the media: fps=8, size=[64,64], resize=cover, scene_threshold=0.15, sample_rate=16000, ...",
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="NAME=LEAST:MOST",
        help="clips with this measure in the range: duration=1:20, motion=0.01:, lufs=-40:-5, clip=0.25:",
    )
    parser.add_argument("--longest", type=float, metavar="S", help="cut longer pieces into equal parts")
    parser.add_argument(
        "--allow", action="append", metavar="FAULT", help="keep it: black, frozen, silent, 'single frame'"
    )
    parser.add_argument("--keep-copies", action="store_true", help="do not drop near copies")
    parser.add_argument("--no-captions", action="store_true", help="items without a caption count too")
    parser.add_argument("--val-share", type=float, metavar="SHARE", help="of train that becomes val (0)")
    parser.add_argument("--shard-clips", type=int, metavar="N", help="clips of a shard (1000)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items of each split")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes, one core each (all)"
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "local", "ray"),
        default="auto",
        help="ray: Ray Data; local: processes; auto: ray where it is installed",
    )
    parser.add_argument(
        "--address", help="of a Ray cluster, as auto or ray://HOST:10001; its machines share the folders"
    )
    parser.add_argument(
        "--keep-work", action="store_true", help="leave OUT/.work, so that more items can be added fast"
    )
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help="the YAML may also name it")
    return parser


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    """The YAML's values under the options'. Raises ValueError naming what is missing, unknown or ill-formed."""
    import yaml

    from mmdiff.config import read_config
    from mmdiff.data.medium import medium_path

    tree = read_config(given.config).get("prepare") if given.config else {}
    if not isinstance(tree, dict):
        raise ValueError(f"{given.config} has no tree `prepare:`; it names source, out and media")
    known = {*_DEFAULTS, "source", "out", "media"}
    if unknown := sorted(set(tree) - known):
        raise ValueError(f"{given.config}: prepare has no {unknown[0]!r}; there are {', '.join(sorted(known))}")
    found = {**_DEFAULTS, **tree}
    if isinstance(found["allow"], str) or not isinstance(found["keep"] or {}, dict):
        raise ValueError(f"{given.config}: allow is a list, as [silent], and keep a tree, as {{duration: 1:20}}")
    options = {
        "source": given.source, "out": given.out, "longest_s": given.longest, "allow": given.allow,
        "val_share": given.val_share, "shard_clips": given.shard_clips,
        "duplicates": False if given.keep_copies else None, "captions": False if given.no_captions else None,
    }  # fmt: skip
    found |= {name: value for name, value in options.items() if value is not None}
    if given.media is not None:
        found["media"] = {"class_path": medium_path(given.media), "init_args": {}}
    for name in ("source", "out", "media"):
        if not found.get(name):
            raise ValueError(f"no {name}; give --{name}, or {name} in the YAML's tree `prepare:`")
    if isinstance(found["media"], str):
        found["media"] = {"class_path": medium_path(found["media"]), "init_args": {}}
    if not isinstance(found["media"], dict):
        raise ValueError(f"media={found['media']!r} is no name, as video, and no tree with a class_path")
    if not 0 <= found["val_share"] < 1:
        raise ValueError(f"val_share={found['val_share']} is outside [0, 1); it is the part of train that becomes val")
    arguments = dict(found["media"].get("init_args") or {})
    for entry in given.set:
        name, sign, value = entry.partition("=")
        if not sign:
            raise ValueError(f"--set {entry} is not NAME=VALUE, as fps=8")
        arguments[name] = yaml.safe_load(value)
    found["media"] = {"class_path": found["media"].get("class_path"), "init_args": arguments}
    found["keep"] = {**{name: _range(name, value) for name, value in (found["keep"] or {}).items()}}
    for entry in given.keep:
        name, _, text = entry.partition("=")
        found["keep"][name] = _range(name, text)
    return found


def _range(name: str, value: Any) -> tuple[float | None, float | None]:
    """(least, most) of "0.5:20", "0.5:", ":20" or a list of two numbers or null."""
    ends = value.split(":") if isinstance(value, str) else value
    try:
        least, most = ((None if end in (None, "") else float(end)) for end in ends)
    except (TypeError, ValueError):
        raise ValueError(
            f"keep {name}={value} is not LEAST:MOST, as {name}=0.5:20, {name}=0.5: or {name}=:20"
        ) from None
    return least, most


def _engine(given: argparse.Namespace) -> Any:
    from mmdiff.data.prepare_engines import Local, Ray

    if given.workers < 1:
        raise ValueError(f"--workers {given.workers} is below 1")
    if given.address is not None and given.engine == "local":
        raise ValueError("--address is of a Ray cluster; leave out --engine local")
    there = importlib.util.find_spec("ray") is not None
    if given.address is not None or given.engine == "ray" or (given.engine == "auto" and there):
        return Ray(given.workers, given.address)
    return Local(given.workers)
