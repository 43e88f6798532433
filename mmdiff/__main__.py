"""The `mmdiff` command. Nothing heavy is imported before a command is chosen."""

import os
import sys
from collections.abc import Callable
from importlib.metadata import entry_points

from . import __version__

LIGHTNING = {
    "fit": "train a model: mmdiff fit -c configs/video/sprites.yaml",
    "validate": "validation loss of a checkpoint",
    "test": "loss on the test split",
    "predict": "Lightning's predict loop",
}


def usage() -> str:
    """Help of the command: its own commands and those that packages add through the group `mmdiff.commands`."""
    lines = [f"  {name:<12}{text}" for name, text in LIGHTNING.items()]
    lines += [
        f"  {entry.name:<12}{entry.value}"
        for entry in sorted(entry_points(group="mmdiff.commands"), key=lambda e: e.name)
    ]
    return "usage: mmdiff COMMAND ...\n\ncommands (mmdiff COMMAND --help says more):\n" + "\n".join(lines)


def guarded(name: str, command: Callable[[list[str]], int], args: list[str]) -> int:
    """Runs a command. A wrong value ends in one line on stderr and status 2; MMDIFF_DEBUG=1 shows the traceback."""
    try:
        return command(args) or 0
    except (ValueError, OSError) as error:
        if os.environ.get("MMDIFF_DEBUG"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"mmdiff {name}: error: {message}", file=sys.stderr)
        return 2
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
    return guarded(name, next(iter(found)).load(), args[1:])


if __name__ == "__main__":
    sys.exit(main())
