"""Opening a video file by PyAV: only local files and bytes, only formats that open no other file, errors with names."""

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO

import av

from mmdiff.data.containers import check_whole, opened
from mmdiff.data.media import DamagedError, MediaError, NoStreamError, NotMediaError, UnreachableError

MediaSource = str | os.PathLike[str] | bytes | BinaryIO

# playlists and image sequences, which open other files, are no media to us
_FORMATS = "mov,mp4,m4a,3gp,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,gif,apng,h264,hevc,m4v,ivf,dv"
_COVER = av.stream.Disposition.attached_pic  # a picture of a sound


def open_container(source: MediaSource, name: str) -> tuple[av.container.InputContainer, av.VideoStream]:
    """The container and its first video stream; the demuxer passes over the other streams.

    Raises UnreachableError, NotMediaError, DamagedError or NoStreamError, naming the file by `name`.
    """
    options = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}
    try:
        with named(name):
            container = av.open(regular_file(source, name), mode="r", options=options, metadata_errors="ignore")
    except DamagedError as error:
        if isinstance(error.__cause__, av.ArgumentError):
            raise NotMediaError(
                f"{name}: is of no format that is read as video; convert it to mp4"
            ) from error.__cause__
        if not _begins_as_media(source, name):
            raise NotMediaError(str(error)) from error.__cause__
        raise
    try:
        _check_whole(source, name)
    except MediaError:
        container.close()
        raise
    pictures = [stream for stream in container.streams.video if not stream.disposition & _COVER]
    if not pictures:
        container.close()
        raise NoStreamError(f"{name}: no video stream; give a file that has one")
    for stream in container.streams:
        if stream is not pictures[0] and stream.type != "attachment":
            stream.discard = av.stream.Discard.all
    return container, pictures[0]


def regular_file(source: MediaSource, name: str) -> str | BinaryIO:
    """What av.open takes for a source: a `file:` path (never another protocol), or a binary file at its start.

    Raises UnreachableError for what is not there, is no regular file (a pipe would wait for ever) or is not permitted.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        source.seek(0)
        return source
    path = os.fspath(source)
    try:
        path.encode()  # FFmpeg opens no other name
        regular = stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError) as error:
        raise UnreachableError(f"{name}: cannot be reached ({error}); check the path") from error
    if not regular:
        raise UnreachableError(f"{name}: cannot be read as video, it is no file; give the path of a media file")
    if not os.access(path, os.R_OK):
        raise UnreachableError(f"{name}: may not be read; change its permissions")
    return f"file:{path}"


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """What FFmpeg or the file system reports, as a MediaError that names the file."""
    try:
        yield
    except MediaError:
        raise
    except PermissionError as error:
        raise UnreachableError(f"{name}: may not be read ({error}); change its permissions") from error
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{name}: cannot be read as video ({error}); download or export it again") from error


def _check_whole(source: MediaSource, name: str) -> None:
    """Raises DamagedError for a file that was cut off, of which FFmpeg shows what is left without a word."""
    place = regular_file(source, name)
    with opened(place.removeprefix("file:") if isinstance(place, str) else place, name) as file:
        check_whole(file, name)


def _begins_as_media(source: MediaSource, name: str) -> bool:
    opened = regular_file(source, name)
    if isinstance(opened, str):
        with open(opened.removeprefix("file:"), "rb") as file:
            begin = file.read(12)
    else:
        begin = opened.read(12)
    return begin[4:8] in (b"ftyp", b"moov") or begin.startswith((b"\x1aE\xdf\xa3", b"RIFF", b"OggS", b"GIF8"))
