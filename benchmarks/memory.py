"""Peak memory of training steps of one network, in a process of its own: python benchmarks/memory.py CASE NETWORK

Prints bytes: the peak resident size after three steps less that before the network was built.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmdiff.resident import STEADY, resident


def peak_of(case: str, network: str, threads: int) -> int:
    """Bytes that a fresh process reports. Raises RuntimeError with its last line where it fails."""
    command = [sys.executable, __file__, case, network, str(threads)]
    environment = {**os.environ, **STEADY, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{network}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return int(done.stdout.split()[-1])


def main(case_name: str, network_name: str, threads: str) -> int:
    import torch

    from benchmarks.cases import CASES
    from benchmarks.measure import training_step

    torch.set_num_threads(int(threads))
    case = CASES[case_name]
    (network,) = [network for network in case.networks if network.name == network_name]
    network.build()  # what it imports is not its memory
    x, c_noise, target = case.input()
    before = resident()
    step = training_step(network.build(), x, c_noise, target)
    for _ in range(3):
        step()
    print(resident(peak=True) - before)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
