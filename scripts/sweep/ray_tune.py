"""Searches settings of a config with Ray Tune: every trial is one `mmdiff fit`, on as many GPUs as `--gpus` says.

python scripts/sweep/ray_tune.py -c configs/tiny/audio.yaml --trials 4 --gpus 0 \
    --log model.init_args.optimizer.init_args.lr=0.0003:0.01 --choice model.init_args.seed=0,1

Prints the best trial by its last val/loss. Needs pip install 'ray[tune]'.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def last_value(run: Path, metric: str) -> float:
    """The last value of a metric in the history of the newest run below `run`. Raises ValueError without one."""
    histories = sorted(run.rglob("history.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = [json.loads(line) for path in histories[-1:] for line in path.read_text("utf-8").splitlines()]
    found = [line[metric] for line in (line.get("metrics", line) for line in lines) if metric in line]
    if not found:
        raise ValueError(f"{run} has no {metric}; let the trainer validate before its last step")
    return float(found[-1])


def trial(settings: dict[str, Any], configs: list[str], out: str, metric: str) -> dict[str, float]:
    """Trains with these settings in a folder named by them. Returns the metric."""
    run = Path(out) / ",".join(f"{name.rpartition('.')[2]}={value}" for name, value in settings.items())
    words = [word for config in configs for word in ("-c", config)]
    words += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "mmdiff", "fit", *words, "--resume", "--trainer.default_root_dir", str(run)]
    subprocess.run([*command, "--trainer.enable_progress_bar", "false"], check=True)
    return {metric: last_value(run, metric)}


def space(choices: list[str], logs: list[str]) -> dict[str, Any]:
    """Ray Tune's search space of NAME=A,B,... and NAME=LOW:HIGH. Raises ValueError for words of another form."""
    from ray import tune

    found: dict[str, Any] = {}
    try:
        for word in choices:
            name, values = word.split("=")
            found[name] = tune.choice([json.loads(value) for value in values.split(",")])
        for word in logs:
            name, ends = word.split("=")
            low, high = map(float, ends.split(":"))
            found[name] = tune.loguniform(low, high)
    except ValueError as error:
        raise ValueError(f"{word!r} is not NAME=A,B,... (--choice) or NAME=LOW:HIGH (--log): {error}") from error
    if not found:
        raise ValueError("nothing to search: give --choice or --log")
    return found


def main(args: list[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", action="append", required=True, help="as of mmdiff fit")
    parser.add_argument("--choice", action="append", default=[], metavar="NAME=A,B,...", help="one of these values")
    parser.add_argument("--log", action="append", default=[], metavar="NAME=LOW:HIGH", help="log-uniform")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--metric", default="val/loss", help="the smaller the better (default: val/loss)")
    parser.add_argument("--out", default="runs/sweep", help="folder of the runs (default: runs/sweep)")
    parser.add_argument("--gpus", type=float, default=1.0, help="of a trial; 0 trains on one CPU core (default: 1)")
    parser.add_argument("--address", help="of a Ray cluster; default is this machine")
    given = parser.parse_args(args)
    searched = space(given.choice, given.log)

    import ray
    from ray import tune

    ray.init(address=given.address, include_dashboard=None if given.address else False, log_to_driver=False)
    configs, out = [str(Path(path).absolute()) for path in given.config], str(Path(given.out).absolute())
    run = tune.with_parameters(trial, configs=configs, out=out, metric=given.metric)
    tuner = tune.Tuner(
        tune.with_resources(run, {"cpu": 1, "gpu": given.gpus}),
        param_space=searched,
        tune_config=tune.TuneConfig(metric=given.metric, mode="min", num_samples=given.trials),
        run_config=tune.RunConfig(storage_path=f"{out}/.tune", verbose=0),
    )
    best = tuner.fit().get_best_result()
    print(json.dumps({"best": best.config, given.metric: (best.metrics or {})[given.metric]}))


if __name__ == "__main__":
    main(sys.argv[1:])
