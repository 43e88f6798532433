"""Training checkpoints that a kill at any moment leaves readable, and that say so when they are not."""

import errno
import os
import pickle
import secrets
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from .exits import full_disk

PREFIX = ".inprogress-"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that are either the old one or the new one: written beside the target, synced, then renamed.

    Lightning stages in the temporary folder, which may lie on another file system, where a move is a copy that a kill
    cuts short (Lightning issue 21744). Loading unpickles tensors and plain Python values only (`weights_only=True`),
    after every record of the file has been compared with its CRC32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.started_s = time.time()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: object | None = None
    ) -> None:
        """Write `checkpoint` to a local file. Raises ValueError on a URL or on `storage_options`.

        Raises OSError on a full disk; what the file held before, and every other checkpoint, is then as it was.
        """
        if storage_options is not None:
            raise ValueError(f"storage_options={storage_options!r}: checkpoints are local files and take no options")
        target = _local(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._sweep(target.parent)
        staged = target.parent / f"{PREFIX}{secrets.token_hex(8)}"
        try:
            # Not mkstemp: its mode 0600 would stay on the checkpoint, against the user's umask.
            with open(os.open(staged, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666), "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, target)
        except (OSError, RuntimeError) as error:
            lack = _lack_of_room(error)
            if lack is None:
                raise
            raise OSError(
                lack,
                f"no room for {target}: the checkpoints before it are whole; make room and go on (mmdiff fit --resume)",
            ) from error
        finally:
            staged.unlink(missing_ok=True)
        if os.name != "nt":  # the rename itself reaches the disk; Windows cannot open a folder
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | torch.device | str | dict[str, str] | None = "cpu",
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """The checkpoint in a local file. Raises ValueError on a URL, a broken file or one that holds other objects."""
        if weights_only is False:
            raise ValueError("weights_only must be True: without it a checkpoint could run its own code")
        source = _local(path)
        if not source.is_file():
            raise FileNotFoundError(f"no such checkpoint: {source}")
        verify(source)
        return _read(source, map_location=map_location, mmap=False)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a local checkpoint, if there is one. Raises ValueError on a URL."""
        super().remove_checkpoint(_local(path))

    def _sweep(self, folder: Path) -> None:
        """Delete what runs killed before this one began left unfinished."""
        for path in folder.glob(f"{PREFIX}*"):
            try:
                if path.stat().st_mtime < self.started_s:
                    path.unlink()
            except FileNotFoundError:
                continue  # another process of this run was faster


def verify(path: Path) -> None:
    """Compares every record of a checkpoint with its CRC32. Raises ValueError that names a torn or changed file."""
    try:
        with zipfile.ZipFile(path) as records:
            changed = records.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError) as error:
        raise _broken(path, str(error)) from error
    if changed is not None:
        raise _broken(path, f"the record {changed} has changed since it was written")


def peek(path: Path) -> dict[str, Any]:
    """A checkpoint whose tensors stay in the file, so that its plain values cost little. Raises ValueError.

    Nothing is compared with its CRC32.
    """
    return _read(path, map_location="cpu", mmap=True)


def _read(path: Path, map_location: Any, mmap: bool) -> dict[str, Any]:
    try:
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise _broken(path, str(error)) from error


def _broken(path: Path, reason: str) -> ValueError:
    line = reason.strip().split("\n")[0]
    return ValueError(f"{path} is broken, or holds more than tensors and plain values: {line}")


def _lack_of_room(error: BaseException) -> int | None:
    """The error number of a full disk among an error and its causes, None where it is another error."""
    cause: BaseException | None = error
    while cause is not None:
        if full_disk(cause):
            return cause.errno if isinstance(cause, OSError) else errno.ENOSPC
        cause = cause.__cause__ or cause.__context__
    return None


def _local(path: str | os.PathLike[str]) -> Path:
    if "://" in os.fspath(path):
        raise ValueError(f"checkpoint path {os.fspath(path)!r} is a URL; checkpoints are local files, copy it first")
    return Path(path)
