"""What every media file has in common: it can be unusable, and it is written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class MediaError(ValueError):
    """A media file that cannot be used; the message names the file, the reason and the cure.

    `kind` is a word for reports that count the reasons.
    """

    kind = "unusable"


class NotMediaError(MediaError):
    """Empty, of no media format, or of one that is not read here."""

    kind = "not media"


class NoStreamError(MediaError):
    """Media without a stream of the kind that is asked for, or with an empty one."""

    kind = "no stream"


class DamagedError(MediaError):
    """Cut off or corrupt: a part of what the file promises cannot be decoded."""

    kind = "damaged"


class TooLargeError(MediaError):
    """Over a limit of pixels, bytes, seconds or channels, by what its header claims or by what it holds."""

    kind = "too large"


class UnsupportedError(MediaError):
    """Readable, but not as what it means: the message says what is not supported and how to convert it."""

    kind = "unsupported"


class UnreachableError(MediaError):
    """Not there, not permitted, or outside of the folder that it must lie in."""

    kind = "unreachable"


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Temporary path beside `path` that takes its place when the block ends well and is deleted when it does not.

    Parent folders are made. The temporary name is on the same file system, so that the rename is atomic.
    Raises OSError when the folder cannot be made or written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes a private file; a result is an ordinary one
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
