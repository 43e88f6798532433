"""Sound of a container (mp4, mov, Matroska, WebM, Ogg, MPEG-TS, AVI, ...) by PyAV."""

import io
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import BinaryIO

import av
from av.audio.codeccontext import AudioCodecContext
from av.stream import Discard

from audio.blocks import WHOLE, BlockReader, fresh_decoder, keep_priming, named
from audio.containers import movie_timescale
from audio.timeline import Lead, preroll, skipped, timeline
from mmdiff.data.containers import opened
from mmdiff.data.media import DamagedError, NoStreamError, NotMediaError, TooLargeError, UnsupportedError

MAX_CHANNELS = 64
# playlists and image sequences, which open other files, are no media to us
FORMATS = "mov,mp4,m4a,3gp,matroska,webm,avi,mpeg,mpegts,asf,flv,ogg,mp3,aac,wav,w64,aiff,caf,flac,amr,ac3,eac3,wv,ape"
_FRESH = (
    "aac",
    "ac3",
    "eac3",
    "mp3",
    "mp3float",
)  # what they remember outlives a flush, and extradata is all they need
_INEXACT = ("mp3", "aac", "ac3", "eac3", "amr", "loas")  # demuxers that guess the time of a place in the file
_LEAD_FRAMES = 8  # looked at for the length of frames
_TAIL_S = 0.5  # before the claimed end, where the search for the real one begins
_CLAIM_S = 0.5  # by which a header may promise more than there is


class ContainerFeed:
    """The packets of the first audio stream of an open container."""

    def __init__(self, source: str | bytes | BinaryIO, name: str) -> None:
        self._source = source
        self._name = name
        self._first_pts: int | None = None
        self._open()

    def _open(self) -> None:
        source = io.BytesIO(self._source) if isinstance(self._source, bytes) else self._source
        if isinstance(source, str):
            source = f"file:{source}"  # a name is never another protocol
        else:
            source.seek(0)
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
        container = av.open(source, mode="r", options=options, metadata_errors="ignore")
        if not container.streams.audio:
            container.close()
            raise NoStreamError(f"{self._name}: no audio stream; read it as video, or leave it out")
        self.container, self.stream = container, container.streams.audio[0]
        context = self.stream.codec_context
        if context is None or not context.sample_rate:
            container.close()
            if context is None:
                raise UnsupportedError(f"{self._name}: its audio codec is not known here; convert it to flac elsewhere")
            raise NotMediaError(
                f"{self._name}: cannot be read as audio, there is no rate; fetch it again or leave it out"
            )
        for other in container.streams:
            if other.index != self.stream.index:
                other.discard = Discard.all  # pictures are not read at all
        keep_priming(context)
        self.codec: str = context.name
        self.early = preroll(self.codec, context.sample_rate)
        self.format: str = container.format.name

    def close(self) -> None:
        self.container.close()

    def decoder(self) -> AudioCodecContext:
        own = self.stream.codec_context
        return fresh_decoder(self.codec, own.extradata) if self.codec in _FRESH else own  # a seek has flushed its own

    def packets(self, pts: int | None) -> Iterator[av.Packet]:
        if pts is None:
            pts = self._first_pts
        if pts is not None and self.format not in _INEXACT:
            try:
                self.container.seek(pts, stream=self.stream, backward=True)
                rest = self.container.demux(self.stream)
                first = next((packet for packet in rest if packet.pts is not None), None)
                if first is None:  # nothing from there to the end
                    return
                if first.pts is not None and first.pts <= pts:
                    yield first
                    yield from (packet for packet in rest if packet.size)
                    return
            except av.FFmpegError:  # no index, and none can be made
                pass
        self.container.close()
        self._open()
        yield from self.from_beginning()

    def from_beginning(self) -> Iterator[av.Packet]:
        """Packets of a container that has just been opened."""
        for packet in self.container.demux(self.stream):
            if packet.size:
                if self._first_pts is None:
                    self._first_pts = packet.pts
                yield packet


def open_container(source: str | bytes | BinaryIO, name: str) -> BlockReader:
    """The first audio stream of a container. Raises MediaError's kinds, naming `name`."""
    with named(name, NotMediaError):
        feed = ContainerFeed(source, name)
    try:
        with named(name, DamagedError):
            reader = _from_lead(feed, name)
            _find_end(reader, feed, source)
    except BaseException:
        feed.close()
        raise
    return reader


def _from_lead(feed: ContainerFeed, name: str) -> BlockReader:
    """Reader without its end: rate, channels and the first sample that is heard, from the first packets."""
    leads: list[Lead] = []
    frames: list[av.AudioFrame] = []
    decoder = feed.decoder()
    for packet in feed.from_beginning():
        if packet.pts is not None:
            leads.append(Lead(packet.pts, skipped(packet)[0], packet.is_discard))
        frames += decoder.decode(packet)
        if len(frames) >= _LEAD_FRAMES:
            break
    else:
        frames += decoder.decode(None)
    if not frames:
        raise NoStreamError(f"{name}: no audio samples, its sound is empty or cut off; leave it out")
    rate, channels = frames[0].sample_rate, frames[0].layout.nb_channels
    if channels > MAX_CHANNELS:
        raise TooLargeError(f"{name}: {channels} channels are over the limit of {MAX_CHANNELS}; mix them")
    lengths = [frame.samples for frame in frames]
    if len(frames) < _LEAD_FRAMES:
        lengths = lengths[:-1] or lengths  # the last frame of a file may be shorter
    unit = (feed.stream.time_base or Fraction(1)) * rate
    found, start = timeline(
        leads or [Lead(0, 0, False)], lengths, unit, feed.codec, feed.stream.codec_context.extradata
    )
    can_seek = bool(leads) and (found.exact or found.step is not None) and feed.format not in _INEXACT
    return BlockReader(feed, name, sample_rate=rate, channels=channels, timeline=found, start=start, can_seek=can_seek)


def _find_end(reader: BlockReader, feed: ContainerFeed, source: str | bytes | BinaryIO) -> None:
    """Where the last sample that is heard lies: short files are decoded for it, of long ones only the tail."""
    claim, rate, duration = _claimed_end(reader, feed), reader.sample_rate, feed.stream.duration
    mov = "mov" in feed.format
    if claim is not None and claim - reader.start <= WHOLE:
        reader.decode_whole()
    elif claim is not None and reader.can_seek:
        reader.find_end(max(reader.start, int(claim - Fraction(_TAIL_S) * rate)))
    else:
        reader.find_end(None)
    if mov and duration is not None:
        with opened(source, reader.name) as file:
            tick = Fraction(rate, movie_timescale(file))
        edit_end = reader.start + duration * reader.timeline.unit
        if reader.end - edit_end >= tick:  # nearer than one tick the edit is the same length, rounded
            reader.end = max(reader.start + 1, round(edit_end))
    promised = mov or feed.format == "ogg" or "DURATION" in feed.stream.metadata
    if claim is not None and promised and claim - reader.end > _CLAIM_S * rate:
        raise DamagedError(
            f"{reader.name}: sound until {float(claim) / rate:.2f} s is promised and it ends at "
            f"{reader.end / rate:.2f} s; fetch it again or leave it out"
        )


def _claimed_end(reader: BlockReader, feed: ContainerFeed) -> Fraction | None:
    """Position after the last sample, as the header has it or FFmpeg guesses it."""
    stream = feed.stream
    if stream.duration is not None:
        return (stream.duration + (stream.start_time or 0)) * reader.timeline.unit
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    if tag is not None:
        return (int(tag[1]) * 3600 + int(tag[2]) * 60 + Fraction(tag[3])) * reader.sample_rate
    if feed.container.duration is not None:
        return Fraction(feed.container.duration, av.time_base) * reader.sample_rate
    return None
