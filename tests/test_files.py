"""Media files: exact counts in and out, the same bytes each time, and errors that name the file."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from audio.files import read_audio
from mmdiff.data.media import MediaError, whole_file
from video.files import contact_sheet, read_video, write_gif, write_video

TORTURE = Path(__file__).resolve().parents[2] / "shared" / "data" / "torture" / "files"
needs_torture = pytest.mark.skipif(not TORTURE.is_dir(), reason="../shared/data/torture is not there")


def ramp(frames: int, height: int = 48, width: int = 64) -> torch.Tensor:
    """(3, T, H, W): frame t is a flat grey of its own level, with a bright left half of the first channel."""
    level = torch.linspace(-0.8, 0.8, frames).view(1, frames, 1, 1)
    clip = level.expand(3, frames, height, width).clone()
    clip[0, :, :, : width // 2] += 0.2
    return clip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_is_refused_and_leaves_nothing(tmp_path, value):
    clip = ramp(3)
    clip[0, 1, 2, 3] = value
    for write in (
        lambda: write_video(tmp_path / "a.mp4", clip, 8),
        lambda: contact_sheet(tmp_path / "a.png", clip),
        lambda: write_gif(tmp_path / "a.gif", clip, 8),
    ):
        with pytest.raises(ValueError, match="non-finite"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_are_named(tmp_path):
    for call, match in (
        (lambda: write_video(tmp_path / "a.mp4", torch.zeros(16, 3, 8, 8), 8), r"\(3, T, H, W\)"),
        (lambda: write_video(tmp_path / "a.mp4", torch.zeros(3, 0, 8, 8), 8), "at least one frame"),
        (lambda: write_video(tmp_path / "a.mp4", torch.zeros(3, 2, 8, 8, dtype=torch.uint8), 8), "dtype"),
        (lambda: write_video(tmp_path / "a.mp4", ramp(2), 0), "fps=0"),
        (lambda: write_video(tmp_path / "a.mp4", ramp(2), float("nan")), "fps=nan"),
        (lambda: write_video(tmp_path / "a.mp4", ramp(2), 8, crf=60), "crf=60"),
        (lambda: contact_sheet(tmp_path / "a.png", ramp(2), columns=0), "columns=0"),
        (lambda: write_gif(tmp_path / "a.gif", ramp(2), 0), "fps=0"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_playlist_opens_no_other_file(tmp_path):
    write_video(tmp_path / "secret.mp4", ramp(2), fps=8)
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{tmp_path / 'secret.mp4'}'\n")
    (tmp_path / "hls.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.mp4\n#EXT-X-ENDLIST\n")
    for name in ("list.mp4", "hls.mp4"):
        with pytest.raises(MediaError):
            read_video(tmp_path / name)
        with pytest.raises(MediaError):
            read_audio(tmp_path / name)


def test_imports_are_cheap():
    code = (
        "import sys, video, audio, mmdiff.data; "
        "heavy = {'torch', 'lightning', 'av', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@needs_torture
def test_odd_files_are_read_or_named():
    counts = {"read": 0, "refused": 0}
    messages: dict[str, str] = {}
    for file in sorted(TORTURE.iterdir()):
        if file.stat().st_size > 60_000:
            continue
        for read in (read_video, read_audio):
            try:
                read(file)
                counts["read"] += 1
            except MediaError as error:
                messages[file.name] = str(error)
                counts["refused"] += 1
    assert all(name in message for name, message in messages.items())
    assert counts["read"] >= 60
    frames = {
        "odd_17x31.mp4": (3, 10, 31, 17),
        "fps120.mp4": (3, 60, 96, 96),
        "name with spaces (1).mp4": (3, 75, 96, 96),
    }
    for name, shape in frames.items():
        assert read_video(TORTURE / name).frames.shape == shape
