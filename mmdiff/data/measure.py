"""`python -m mmdiff.data.measure CONFIG`: what a clip of each bucket costs on this machine, for `Buckets.costs`."""

import argparse
import logging
import statistics
import sys
import warnings
from dataclasses import replace

import lightning.pytorch as pl

from mmdiff.data.clips import ClipDataModule, collate
from mmdiff.data.items import Problem
from mmdiff.footprint import fit, instantiate
from mmdiff.io import trust_policy
from mmdiff.rehearsal import Watch

_STEPS = 4


def measure(config: str) -> dict[str, float]:
    """Seconds of training on one clip, by the bucket's name: median over steps on a whole batch, without the decoding.

    Raises ValueError for a config without buckets, whose data is not there, or none of a bucket's clips can be used.
    """
    module, data, settings = instantiate(config)
    if not isinstance(data, ClipDataModule) or data.buckets is None:
        raise ValueError(f"{config}: its data has no buckets; give data.init_args.buckets, such as {{steps: [8, 16]}}")
    data.buckets = replace(data.buckets, costs=None)
    data.setup("fit")
    dataset, plan = data.datasets["train"], data.plans["train"]
    costs: dict[str, float] = {}
    for group, size in zip(plan.groups, plan.sizes, strict=True):
        found = [dataset.result(place) for place in group[:size]]
        samples = [sample for sample in found if not isinstance(sample, Problem)]
        bucket = str((dataset.shapes or {})[group[0]])
        if not samples:
            raise ValueError(f"{config}: no clip of the bucket {bucket} can be used: {found[0]}")
        costs[bucket] = _step_s(module, samples, settings) / len(samples)
    return costs


def _step_s(module: pl.LightningModule, samples: list[dict[str, object]], settings: dict[str, object]) -> float:
    watch = Watch()
    fit(module, collate(samples), settings, _STEPS + 1, [watch])
    return statistics.median(watch.seconds[1:])  # the first one sets up


def main(args: list[str]) -> int:
    """Prints the line for `buckets` in the config. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mmdiff.data.measure", description=__doc__)
    parser.add_argument("config", help="of mmdiff fit, with data.init_args.buckets")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help="that the config may also name")
    given = parser.parse_args(args)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    trust_policy(given.trust)
    try:
        costs = measure(given.config)
    except (ValueError, OSError, ImportError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    print("costs: {" + ", ".join(f'"{name}": {seconds:.4g}' for name, seconds in costs.items()) + "}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
