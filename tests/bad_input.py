"""Reads media files in a process of its own, which may take no more than a GiB and ten seconds for each.

`python -m tests.bad_input` takes JSON lines on standard input, {"path", "key", "kinds"}, and answers each with lines:
{"reading": ...} before, and after it {"kind": None or that of the MediaError, "error", "seconds", "bytes", ...}.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 10  # of processor time; on a busy machine other seconds say nothing
HUNG = 90
BYTES = 1 << 30
CHUNK = 1 << 20  # samples of a channel that are read at once


def answers(jobs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What became of each job; "kind" is "hung", "too much memory" or "died" where its process did not live."""
    left = list(jobs)
    while left:
        text = "".join(f"{json.dumps(job)}\n" for job in left)
        done = subprocess.run(
            [sys.executable, "-m", "tests.bad_input"], cwd=ROOT, input=text, capture_output=True, text=True,
            timeout=280, check=False,
        )  # fmt: skip
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        found = [line for line in lines if "kind" in line]
        yield from found
        if len(found) < len(left):
            assert lines, f"the process of bad inputs does not start: {done.stderr[-2000:]}"
            signals = {-signal.SIGPROF: "hung", -signal.SIGALRM: "hung"}
            yield {**left[len(found)], "kind": signals.get(done.returncode, "died"), "error": done.stderr[-500:]}
        left = left[len(found) + 1 :]


def main() -> None:
    import torch

    from audio.data import AudioDecode
    from audio.files import AudioReader
    from mmdiff.data.clips import Sample
    from mmdiff.data.items import Item
    from mmdiff.data.media import MediaError
    from video.data import VideoDecode
    from video.files import VideoReader

    torch.set_num_threads(1)

    def video(path: Path) -> dict[str, Any]:
        with VideoReader(path) as reader:
            times = reader.times_s
            ends = [reader.read_at(part).shape for part in (times[:8], times[-8:])]
            return {"count": len(times), "shape": list(ends[0]), "fps": float(reader.fps)}

    def audio(path: Path) -> dict[str, Any]:
        with AudioReader(path) as reader:
            count = 0
            for start in range(0, reader.samples, CHUNK):
                part = reader.read(start, min(CHUNK, reader.samples - start))
                assert bool(torch.isfinite(part).all())
                count += part.shape[1]
            return {"count": count, "samples": reader.samples, "rate": reader.sample_rate}

    def clip(decode: Any, path: Path, rng: random.Random | None) -> dict[str, Any]:
        item = Item(path.stem, path.name, ["a"], {}, path, None, os.path.getsize(path) if os.path.exists(path) else 0)
        sample: Sample = decode(item, rng)
        assert isinstance(sample.data, torch.Tensor)
        assert bool(torch.isfinite(sample.data).all())
        assert sample.data.abs().max() <= 1 + 1e-6, float(sample.data.abs().max())
        total_s = sample.start_s + sample.duration_s if sample.total_s is None else sample.total_s
        assert 0 <= sample.start_s <= total_s, (sample.start_s, total_s)
        return {"shape": list(sample.data.shape), "sum": float(sample.data.double().sum())}

    ways = {
        "video reader": video,
        "audio reader": audio,
        "video clip": lambda path: clip(VideoDecode(4, (16, 16), None, "cover", "pad"), path, None),
        "video crop": lambda path: clip(VideoDecode(4, (16, 16), 4.0, "cover", "pad"), path, random.Random(1)),
        "audio clip": lambda path: clip(AudioDecode(8000, 4000, 1, "pad"), path, None),
        "audio crop": lambda path: clip(AudioDecode(8000, 4000, 1, "pad"), path, random.Random(1)),
    }
    for way in ("video clip", "audio clip"):  # what is imported at first use is not the file's
        try:
            ways[way](ROOT / "README.md")
        except MediaError:
            pass
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps({"reading": job["path"]}), flush=True)
        resource.setrlimit(resource.RLIMIT_AS, (virtual + BYTES, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, HUNG)
        begin, kind, error, found = time.process_time(), None, "", dict[str, Any]()
        if job.get("as_nobody"):
            os.seteuid(65534)
        try:
            found = ways[job["way"]](Path(job["path"]))
        except MediaError as caught:
            kind, error = caught.kind, str(caught)
        except MemoryError as caught:
            kind, error = "too much memory", repr(caught)
        except Exception as caught:  # whatever it is, it is no answer
            kind, error = "fault", f"{type(caught).__name__}: {caught}"
        finally:
            if job.get("as_nobody"):
                os.seteuid(0)
            for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
                signal.setitimer(timer, 0)
        print(
            json.dumps({**job, "kind": kind, "error": error, "seconds": time.process_time() - begin, **found}),
            flush=True,
        )


if __name__ == "__main__":
    main()
