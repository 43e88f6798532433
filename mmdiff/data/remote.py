"""Shards on other machines, by fsspec: read by byte ranges, only where a path itself names such a place."""

import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mmdiff.data.items import Item
from mmdiff.data.media import MediaError, UnreachableError

PACKAGES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}  # what fsspec needs for each scheme
CACHES = ("simplecache", "filecache", "blockcache")  # fsspec's local copies: simplecache::s3://bucket/train-0.tar
_TRIES = 3


@dataclass(frozen=True)
class RemoteItem(Item):
    """An item of a shard at `url`; its bytes are fetched when it is read, as a range."""

    url: str = ""

    def read(self) -> bytes:
        """The bytes of the media file. Raises UnreachableError when they cannot be fetched, DamagedError when cut."""
        offset = self.offset or 0
        for left in reversed(range(_TRIES)):
            try:
                system, path = _system(self.url)
                data = bytes(system.cat_file(path, start=offset, end=offset + self.size))
                if len(data) > self.size:
                    cure = f"download it, pipe it into -, or give {CACHES[0]}::{self.url}"
                    raise UnreachableError(f"{self.where}: the server gives no ranges of bytes; {cure}")
                return self.whole(data)
            except MediaError:
                raise
            except Exception as error:  # each file system has errors of its own
                if left == 0 or not _passes(error):
                    raise UnreachableError(f"{self.where}: cannot be fetched from {self.url} ({error})") from error
                time.sleep(0.2 * 2 ** (_TRIES - left))
        raise AssertionError("unreachable: the last try returns or raises")

    def source(self) -> bytes:
        return self.read()


def check_url(url: str) -> None:
    """Raises ValueError for a URL of a scheme that is not read here, ImportError when its package is missing."""
    scheme = url.split("://")[0].split("::")[-1]
    caches = url.split("://")[0].split("::")[:-1]
    if scheme not in PACKAGES or any(cache not in CACHES for cache in caches):
        raise ValueError(
            f"path={url!r}: {'::'.join([*caches, scheme])} is not read; give a local path, {', '.join(PACKAGES)}, "
            f"or {CACHES[0]}::s3://..."
        )
    if importlib.util.find_spec(PACKAGES[scheme]) is None and not _registered(scheme):
        raise ImportError(f"path={url!r} needs {PACKAGES[scheme]}; pip install {PACKAGES[scheme]}")


@contextmanager
def opened(shard: Path | str) -> Iterator[tuple[BinaryIO, int]]:
    """(open seekable file, its size in bytes) of a path or URL. Raises ValueError when it cannot be opened."""
    if isinstance(shard, Path):
        try:
            with open(shard, "rb") as local:
                yield local, shard.stat().st_size
        except OSError as error:
            raise ValueError(f"{shard}: cannot be read ({error}); fetch it again or check the permissions") from error
        return
    try:
        system, path = _system(shard)
        remote = system.open(path, "rb")
        size = getattr(remote, "size", None) or system.size(path)
    except Exception as error:  # each file system has errors of its own
        raise ValueError(f"{shard}: cannot be opened ({error}); check the address and your credentials") from error
    with remote:
        if size is None:
            raise ValueError(f"{shard}: the server gives no ranges of bytes; download it, or pipe it into -")
        yield remote, size


def listed(pattern: str) -> list[Path | str]:
    """The URLs that match a pattern with stars. Raises ValueError when the place cannot be listed."""
    scheme = pattern.split("://")[0]
    try:
        system, path = _system(pattern)
        found = sorted(system.glob(path))
    except Exception as error:  # each file system has errors of its own
        raise ValueError(f"path={pattern!r} cannot be listed ({error}); name the shards by braces") from error
    return [name if "://" in name else f"{scheme}://{name.lstrip('/')}" for name in found]


def _system(url: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it). It keeps one for each process and thread by itself."""
    from fsspec.core import url_to_fs

    check_url(url)
    found: tuple[Any, str] = url_to_fs(url)
    return found


def _registered(scheme: str) -> bool:
    """Whether a program has given fsspec a file system of its own for the scheme."""
    from fsspec.registry import registry

    return scheme in registry


def _passes(error: Exception) -> bool:
    """Whether another try may help: not where the file is missing or forbidden."""
    return not isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError)
