"""The `mmdiff` command. Nothing heavy is imported before a command is chosen."""

import ast
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from . import __version__
from .exits import Stopped, status

LIGHTNING = {
    "fit": "train a model: mmdiff fit -c configs/video/sprites.yaml [--resume]",
    "validate": "validation loss of a checkpoint",
    "test": "loss on the test split",
    "predict": "Lightning's predict loop",
}


def summary(entry: EntryPoint) -> str:
    """First line of a command's docstring, read from its source: importing it would import torch."""
    try:
        spec = importlib.util.find_spec(entry.module)
        source = Path(spec.origin).read_text("utf-8") if spec is not None and spec.origin is not None else ""
    except (ImportError, OSError):
        source = ""
    found = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == entry.attr]
    return ((ast.get_docstring(found[0]) or "").splitlines() or [""])[0] if found else f"(not found: {entry.value})"


def usage() -> str:
    """Help of the command: its own commands and those that packages add through the group `mmdiff.commands`."""
    added = sorted(entry_points(group="mmdiff.commands"), key=lambda entry: entry.name)
    commands = {**LIGHTNING, **{entry.name: summary(entry) for entry in added}}
    lines = [f"  {name:<12}{text}" for name, text in commands.items()]
    return "usage: mmdiff COMMAND ...\n\ncommands (mmdiff COMMAND --help says more):\n" + "\n".join(lines)


def guarded(name: str, command: Callable[[list[str]], int], args: list[str]) -> int:
    """Runs a command. What goes wrong ends in one line on stderr and a status of `mmdiff.exits`.

    MMDIFF_DEBUG=1 shows the traceback.
    """
    try:
        return command(args) or 0
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("MMDIFF_DEBUG"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"mmdiff {name}: error: {message}", file=sys.stderr)
        return status(error)
    except Stopped as stop:
        print(f"mmdiff {name}: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print(f"mmdiff {name}: interrupted", file=sys.stderr)
        return 130


def lightning(args: list[str]) -> int:
    """Runs one of Lightning's commands, the first of `args`."""
    from . import cli

    return cli.main(args)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    if args[0] == "--version":
        print(f"mmdiff {__version__}")
        return 0
    name = args[0]
    if name in LIGHTNING:
        return guarded(name, lightning, args)
    found = entry_points(group="mmdiff.commands", name=name)
    if not found:
        print(f"mmdiff: error: {name!r} is not a command; mmdiff --help lists them", file=sys.stderr)
        return 2
    return guarded(name, lambda rest: next(iter(found)).load()(rest), args[1:])


if __name__ == "__main__":
    sys.exit(main())
