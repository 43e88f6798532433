"""Picture and sound of one file together, for reports and curation: both are measured, cut and written on one clock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from audio.curation import AudioMedium
from audio.files import AudioReader
from audiovideo.data import heard_from
from mmdiff.data.medium import Encoded, Fingerprint, MediaSource, Medium, Piece, Seen
from video.curation import VideoMedium, all_of, coded, facts_of
from video.files import EXTENSIONS, VideoReader


@dataclass(frozen=True)
class JointMedium(Medium):
    """Settings of curation of films with sound: those of `VideoMedium`, and of `AudioMedium` for the sound.

    What is changed is written as H.264 with AAC, both from the same instant of the file's clock. Measures and faults
    are those of both; a copy is what looks like another and sounds like it. A file without sound is refused.
    """

    fps: float | None = None
    size: tuple[int, int] | None = None
    resize: Literal["cover", "fit"] | None = None
    crf: int = 16
    scene_threshold: float | None = None
    clip_weights: str | None = None
    aesthetic_weights: str | None = None
    sample_rate: int | None = None
    channels: int | None = None
    clap_weights: str | None = None

    extensions: ClassVar[tuple[str, ...]] = EXTENSIONS
    tellers: ClassVar[Mapping[str, tuple[str, ...]]] = {**AudioMedium.tellers, **VideoMedium.tellers}

    def __post_init__(self) -> None:
        self.measures()  # both check their settings

    @property
    def picture(self) -> VideoMedium:
        return VideoMedium(
            self.fps, self.size, self.resize, self.crf, self.scene_threshold, self.clip_weights, self.aesthetic_weights
        )

    @property
    def sound(self) -> AudioMedium:
        return AudioMedium(self.sample_rate, self.channels, self.clap_weights)

    def measures(self) -> Sequence[str]:
        return [*self.picture.measures(), *self.sound.measures()]

    def key(self) -> str:
        return f"{self.picture.key()} {self.sound.key()}"

    def pieces(self, source: MediaSource, name: str) -> tuple[list[Piece], float]:
        return self.picture.pieces(source, name)

    def look(self, source: MediaSource, name: str, piece: Piece, caption: str = "") -> Seen:
        seen = self.picture.look(source, name, piece, caption)
        with VideoReader(source, name=name) as reader, AudioReader(source, name=name) as sound:
            begin_s = reader.start_s + piece.start_s
            waveform = _during(sound, begin_s, float(seen.facts["duration"]), sound.sample_rate, sound.channels)
            heard = self.sound.heard(waveform, sound.sample_rate, caption)
        both = Fingerprint(
            seen.fingerprint.bits[:16] + heard.fingerprint.bits[:16],
            seen.fingerprint.values + heard.fingerprint.values,
            seen.fingerprint.length_s,
        )
        facts = {**seen.facts, "sample_rate": sound.sample_rate, "channels": sound.channels}
        return replace(
            seen, facts=facts, measures={**seen.measures, **heard.measures}, fingerprint=both,
            faults=seen.faults + heard.faults,
        )  # fmt: skip

    def encode(self, source: MediaSource, name: str, suffix: str, piece: Piece) -> Encoded:
        with VideoReader(source, name=name) as reader, AudioReader(source, name=name) as sound:
            rate, channels = self.sample_rate or sound.sample_rate, self.channels or sound.channels
            changed = self.picture.changed(reader)
            changed += ["resampled"] if rate != sound.sample_rate else []
            changed += ["mixed"] if channels != sound.channels else []
            told = {"sample_rate": rate, "channels": channels}
            if piece.whole and not changed:
                return Encoded(all_of(source), suffix, {**facts_of(reader), **told})
            frames, fps, begin_s = self.picture.frames(reader, piece)
            waveform = _during(sound, begin_s, frames.shape[1] / float(fps), rate, channels)
        data = coded(frames, fps, self.crf, (waveform.clamp(-1, 1), rate))
        with VideoReader(data, name=name) as reader:
            facts = {**facts_of(reader), **told}
        return Encoded(data, ".mp4", facts, tuple((["cut"] if not piece.whole else []) + changed))

    def changes(self, facts: Mapping[str, Any], sample: Any) -> tuple[str, ...]:
        picture = replace(sample, data=sample.data["video"], rate=sample.rate["video"])
        sound = replace(sample, data=sample.data["audio"], rate=sample.rate["audio"])
        return self.picture.changes(facts, picture) + self.sound.changes(facts, sound)


def _during(sound: AudioReader, begin_s: float, duration_s: float, rate: int, channels: int) -> Tensor:
    """(channels, T) at `rate` Hz of what is heard from `begin_s` of the file's clock on."""
    return heard_from(sound, begin_s, max(1, round(duration_s * rate)), rate, channels)
