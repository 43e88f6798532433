"""Memory that a process really has: resident pages, as Linux counts them."""

from pathlib import Path

# For the environment of a process that is measured: glibc keeps freed blocks for later and moves its own threshold, so
# that equal work peaks here and there; with a fixed one, what is freed goes back to the system at once.
STEADY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident(peak: bool = False) -> int:
    """Bytes of this process that are in memory now, or with `peak` the most that were. ValueError beyond Linux."""
    status = Path("/proc/self/status")
    if not status.is_file():
        raise ValueError("peak memory is read from /proc/self/status, which only Linux has: measure there")
    name = "VmHWM:" if peak else "VmRSS:"
    (line,) = [line for line in status.read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024
