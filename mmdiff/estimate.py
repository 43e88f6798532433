"""`mmdiff estimate`: what training by a config costs on this machine, before it is trained."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .generate import Parser

COLUMNS = ("config", "batch", "M parameters", "GFLOP a training step", "GFLOP a sampling step", "peak MiB", "s a step")
# The fields of `mmdiff.footprint.Footprint`, and of the rehearsal peak_bytes, the most resident memory that the process
# of `mmdiff fit` ever has, and step_s, median seconds of an optimizer step without the loading of data.
Found = Mapping[str, Any]


# A small process between this one and what it measures: Linux counts what the starting one has in memory, too.
METER = """import resource, subprocess, sys
status = subprocess.run([sys.executable, "-m", *sys.argv[1:]]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)"""


def footprint(config: str, batch_size: int | None = None, trusted: Sequence[str] = ()) -> Found:
    """Of one config, measured in processes of their own. Raises ValueError with the one line of one that fails."""
    with tempfile.TemporaryDirectory() as folder:
        size = "-" if batch_size is None else str(batch_size)
        line, _ = spent(["mmdiff.footprint", config, folder, size, *trusted])
        counted = json.loads(line)
        _, peak_bytes = spent(["mmdiff", *counted["rehearsal"]])
        seconds: list[float] = json.loads(Path(counted["seconds"]).read_text("utf-8"))
    found: dict[str, Any] = counted["found"]
    return {**found, "peak_bytes": peak_bytes, "step_s": statistics.median(seconds[1:]) * found["batches"]}


def spent(words: Sequence[str]) -> tuple[str, int]:
    """The last line that `python -m` of `words` prints, and the peak in bytes of its resident memory, to its very end.

    Raises ValueError with its last line of error where it fails.
    """
    done = subprocess.run([sys.executable, "-c", METER, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"{words[0]} ended with status {done.returncode}"])[-1]
        raise ValueError(said.removeprefix("mmdiff fit: error: "))
    *_, line, peak = ["", *done.stdout.splitlines()]
    return line, int(peak) * (1 if sys.platform == "darwin" else 1024)


def cells(found: Found) -> list[str]:
    """One row of the table, in the order of COLUMNS."""
    sampling = found["sampling_gflop"]
    return [
        found["config"].removeprefix("configs/"),
        "x".join(map(str, found["batch"])),
        f"{sum(found['parameters'].values()) / 1e6:.2f}",
        f"{found['training_gflop']:.1f}",
        "" if sampling is None else f"{sampling:.2f}",
        f"{found['peak_bytes'] / 2**20:.0f}",
        f"{found['step_s']:.2f}",
    ]


def table(rows: Sequence[Found]) -> str:
    """Markdown, a row for each config."""
    lines = [COLUMNS, ("---", "---", *["---:"] * (len(COLUMNS) - 2)), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(found: Found) -> str:
    """The numbers of one config in words."""
    counts = {name: f"{count:,}" for name, count in found["parameters"].items()}
    total = sum(found["parameters"].values())
    sampling, step_s = found["sampling_gflop"], found["step_s"]
    lines = {
        "parameters": f"{total:,}, trained {found['trainable']:,}",
        **{f"  {name}": count for name, count in counts.items()},
        "batch": "x".join(map(str, found["batch"])),
        "training step": f"{found['training_gflop']:.2f} GFLOP",
        "sampling step": "" if sampling is None else f"{sampling:.3f} GFLOP for one clip",
        "peak memory": f"{found['peak_bytes'] / 2**20:.0f} MiB, of the whole process",
        "time": f"{step_s:.3f} s a step, {step_s * 1000 / 60:.1f} min for 1,000 steps, on this machine's CPU",
    }
    return "\n".join([found["config"], *(f"  {name:16}{value}" for name, value in lines.items() if value)])


def main(args: list[str]) -> int:
    """What training by a config costs: parameters, operations, memory and time, measured in a few steps."""
    parser = Parser(
        "mmdiff estimate",
        description=f"{main.__doc__} One process counts parameters and operations; another is `mmdiff fit` itself, for "
        "five steps, a validation, samples and a checkpoint in a temporary folder, on the CPU: peak memory is its "
        "largest resident size, libraries included, that of data workers apart. A sampling step is one call of the "
        "denoiser for one clip, without guidance; of an autoencoder, the decoding of one clip.",
    )
    parser.add_argument("config", nargs="+", metavar="CONFIG", help="of mmdiff fit; BASE.yaml+VARIANT.yaml is two -c")
    parser.add_argument("--batch-size", type=int, metavar="N", help="in the place of the config's")
    parser.add_argument("--table", action="store_true", help="print a Markdown table, a row for each config")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE", help="package that the configs may also name"
    )
    given = parser.parse_args(args)
    if given.table and given.json:
        raise ValueError("--table and --json are two forms of the same output; give one of them")
    if given.batch_size is not None and given.batch_size < 1:
        raise ValueError(f"--batch-size {given.batch_size} must be at least 1")
    found: list[Found] = []
    failed = False
    for config in given.config:
        try:
            found.append(footprint(config, given.batch_size, given.trust))
        except ValueError as error:
            if len(given.config) == 1:
                raise
            failed = True
            print(f"mmdiff estimate: error: {error}", file=sys.stderr)
            continue
        if not given.table and not given.json:
            print(report(found[-1]), flush=True)
    if given.json:
        print(json.dumps(found, indent=1))
    elif given.table and found:
        print(table(found))
    return 2 if failed else 0
