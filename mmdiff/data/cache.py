"""A data module of latents that are computed once and kept, into which no stale autoencoder, decoder or file slips.

B clips of a batch, C channels, T time.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from tqdm import tqdm

from mmdiff.autoencoder import Autoencoder
from mmdiff.data.bad import BadItems
from mmdiff.data.batches import Plan
from mmdiff.data.cache_entries import DamagedEntryError, Entries
from mmdiff.data.cache_latents import DTYPES, Latents, Missing, autoencoder_of, contents_of, encoded, missing_line
from mmdiff.data.clips import ClipDataModule, ClipDataset, Sample
from mmdiff.data.items import Item, Problem
from mmdiff.data.loader import ClipLoader
from mmdiff.data.media import MediaError
from mmdiff.generate import pick_device

ROWS = 16  # clips that are encoded together
PROBES = 16  # entries whose reading is timed
TOLERANCE = 0.05  # of the latents' own size: far above rounding and other hardware, far below another frame


@dataclass(frozen=True)
class Clip:
    """One clip of an item; crop None is the one that is no random choice."""

    latents: Latents
    item: Item
    crop: int | None


@dataclass(frozen=True)
class Encoding:
    """What `LatentCache.encode` did. there, made: entries. bytes: of both. seconds: of making.

    clip_s: to decode and encode a clip. read_s: to read its latents. Both 0 where nothing was measured.
    """

    there: int
    made: int
    bad: tuple[Problem, ...]
    bytes: int
    seconds: float
    clip_s: float
    read_s: float


class LatentCache(LightningDataModule):
    """The clips of `data` as latents of `autoencoder`, encoded once and kept in `folder`.

    A batch has "latents" (B, C, T, ...) in the place of "x", the times of the clips that were encoded (start_s,
    duration_s, total_s, rate), and "autoencoder", by which a DiffusionModule refuses latents of other weights. What the
    clips are cut to, the autoencoder and the bytes of the file are in an entry's name, so that a stale one is never
    found. A folder made with another autoencoder, decoder or dtype is refused, and one entry is made again at every
    start and compared, so that what no name can hold, such as another version of a decoder, is noticed too.

    Args:
        data: data module of the clips. autoencoder: model folder of the exported autoencoder, the same that the
            DiffusionModule has as autoencoder_weights.
        dtype: float16 takes half the room and rounds latents to 3 digits.
        crops: clips of a file that training chooses from, each at a random place as `data` takes it. renew: epochs
            after which a file's clips give way to new ones, each file in an epoch of its own; 0 keeps them.
        missing: "ahead" encodes what is not there before training, on `device` (auto: a GPU where there is one);
            "later" when it is first needed, in the data's workers, as `renew` does in any case; "refuse" is an error.

    Raises ValueError for a wrong argument, a stale or damaged folder, and from `data`.
    """

    def __init__(
        self,
        data: LightningDataModule,
        autoencoder: str,
        folder: str,
        dtype: str = "float32",
        crops: int = 1,
        renew: int = 0,
        missing: Missing = "ahead",
        device: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(data, ClipDataModule):
            raise ValueError(f"data={type(data).__name__} is no ClipDataModule, whose files could be told apart")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is unknown; choose {' or '.join(DTYPES)}")
        if crops < 1 or renew < 0:
            raise ValueError(f"crops={crops} must be at least 1 and renew={renew} not negative")
        if missing not in get_args(Missing):
            raise ValueError(f"missing={missing!r} is unknown; choose {', '.join(get_args(Missing))}")
        if renew and missing == "refuse":
            raise ValueError(f"renew={renew} makes new latents, which missing=refuse forbids; leave one of them out")
        self.data, self.autoencoder, self.folder = data, autoencoder, Path(folder).expanduser()
        self.dtype, self.crops, self.renew, self.missing, self.device = dtype, crops, renew, missing, device
        self.model: Autoencoder | None = None
        self.latents: Latents | None = None

    def prepare_data(self) -> None:
        """Encodes what is missing. In a run of several processes on a machine, one of them does."""
        self.data.prepare_data()
        there, missing = self._clips()
        self._compare(there)
        if self.missing == "ahead":
            self._make(missing)
        elif self.missing == "refuse":
            self._refuse(missing)

    def setup(self, stage: str | None = None) -> None:
        """Raises ValueError for a folder made with other settings."""
        latents = self._open()
        for dataset in self.data.datasets.values():
            dataset.decode = latents

    def encode(self, check: bool = True) -> Encoding:
        """Encodes every clip that is not there yet. check: reads all entries, and makes the damaged ones again."""
        there, missing = self._clips(check)
        again_s = self._compare(there)
        begin = time.perf_counter()
        bad = self._make(missing)
        seconds = time.perf_counter() - begin
        now = there + [clip for clip in missing if _path(clip).is_file()]
        made = len(now) - len(there)
        return Encoding(
            len(there), made, bad, sum(_path(clip).stat().st_size for clip in now), seconds,
            seconds / made if made else again_s, _read_s(now),
        )  # fmt: skip

    def train_dataloader(self) -> Any:
        return self._ours().train_dataloader()

    def val_dataloader(self) -> Any:
        return self._ours().val_dataloader()

    def test_dataloader(self) -> Any:
        return self._ours().test_dataloader()

    def teardown(self, stage: str | None = None) -> None:
        self._ours().teardown(stage)

    def on_exception(self, exception: BaseException) -> None:
        self._ours().on_exception(exception)

    def _ours(self) -> ClipDataModule:
        """The data, which asks its trainer for its part of the batches."""
        self.data.trainer = self.trainer
        return self.data

    def _open(self) -> Latents:
        """The decoder of latents. Raises ValueError for a folder made with other settings."""
        if self.latents is None:
            self._ours().setup()
            decode = self.data.decoder()
            if " at 0x" in repr(decode):
                raise ValueError(f"the decoder {type(decode).__name__} does not say its settings; give it a __repr__")
            self.model, words = autoencoder_of(self.autoencoder)
            entries = Entries(self.folder, {**words, "decoder": repr(decode), "dtype": self.dtype})
            entries.open()
            items = [item for dataset in self.data.datasets.values() for item in dataset.items]
            contents = contents_of(items, self.folder)
            self.latents = Latents(decode, entries, self.autoencoder, self.crops, self.renew, self.missing, contents)
        return self.latents

    def _clips(self, check: bool = False) -> tuple[list[Clip], list[Clip]]:
        """(those that are there, those to be made ahead). check: a damaged one is not there."""
        there, missing = [], []
        for clip in self._wanted(self._open()):
            try:
                path = _path(clip)
            except MediaError:  # the data set says so when its turn comes
                missing.append(clip)
                continue
            if path.is_file() and not (check and _damaged(clip.latents.entries, path)):
                there.append(clip)
            elif clip.crop is None or not self.renew:
                missing.append(clip)
        return there, missing

    def _wanted(self, latents: Latents) -> Iterator[Clip]:
        """The clips of the first epoch."""
        for dataset in self.data.datasets.values():
            for place, item in enumerate(dataset.items):
                if dataset.shapes is not None and place not in dataset.shapes:
                    continue  # a bad item, which is in no bucket
                shaped = latents if dataset.shapes is None else latents.to(dataset.shapes[place])
                for crop in range(self.crops) if dataset.train else (None,):
                    yield Clip(shaped, item, crop)

    def _make(self, clips: Sequence[Clip]) -> tuple[Problem, ...]:
        """Decodes in the data's workers and encodes on the device. Returns what could not be decoded."""
        if not clips:
            return ()
        assert self.model is not None
        device = torch.device(pick_device(self.device))
        model, bad = self.model.to(device), BadItems("latents of", [clip.item for clip in clips], 1.0)
        loader = ClipLoader(
            _Clips(clips), Plan((tuple(range(len(clips))),), (ROWS,), False, 0), _together, bad,
            train=False, num_workers=self.data.num_workers, timeout_s=self.data.timeout_s,
        )  # fmt: skip
        with tqdm(total=len(clips), desc="encoding", unit="clip", disable=None) as bar:
            for batch in loader:
                assert batch is not None
                rows: dict[Any, list[tuple[Clip, Sample]]] = {}
                for place, sample in zip(batch["key"], batch["samples"], strict=True):
                    rows.setdefault((sample.data.shape, sample.mask is None), []).append((clips[place], sample))
                for group in rows.values():
                    for (clip, _), sample in zip(group, encoded(model, [s for _, s in group], device), strict=True):
                        clip.latents.write(clip.latents.content(clip.item), clip.crop, sample)
                bar.update(len(batch["key"]))
        self.model = model.to("cpu")
        return tuple(bad.found.values())

    def _refuse(self, clips: Sequence[Clip]) -> None:
        """Raises ValueError if one of these clips can be decoded; the others are bad items, which have no latents."""
        for clip in clips:
            try:
                _decoded(clip)
            except MediaError:
                continue
            raise ValueError(missing_line([clip.item.where for clip in clips], self.folder))

    def _compare(self, clips: Sequence[Clip]) -> float:
        """Makes one of the entries again. Returns the seconds; raises ValueError where something else comes out."""
        for clip in clips:
            begin = time.perf_counter()
            assert self.model is not None
            try:
                (again,) = encoded(self.model, [_decoded(clip)], torch.device("cpu"))
                seconds = time.perf_counter() - begin
                stored = clip.latents.read(clip.latents.content(clip.item), clip.crop)
            except MediaError:
                continue
            if stored is not None and _differ(again, stored):
                raise ValueError(
                    f"{self.folder} is stale: the latents of {clip.item.where} come out otherwise now, by another "
                    "version of a decoder or of mmdiff; name another folder, or delete it"
                )
            return seconds
        return 0.0


class _Clips(ClipDataset):
    """Decoded clips by their place."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        super().__init__([clip.item for clip in clips], clips[0].latents)
        self.clips = clips

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        place = index[1] if isinstance(index, tuple) else index
        return {"key": place, "samples": _decoded(self.clips[place])}


def _together(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: [sample[name] for sample in samples] for name in ("key", "samples")}


def _path(clip: Clip) -> Path:
    return clip.latents.path(clip.latents.content(clip.item), clip.crop)


def _decoded(clip: Clip) -> Sample:
    return clip.latents.clip(clip.item, clip.latents.content(clip.item), clip.crop)


def _damaged(entries: Entries, path: Path) -> bool:
    try:
        entries.read(path)
    except DamagedEntryError:
        return True
    return False


def _differ(a: Sample, b: Sample) -> bool:
    """Whether two samples of latents are not the same but for rounding."""
    x, y = a.data, b.data
    assert isinstance(x, Tensor)
    assert isinstance(y, Tensor)
    times = (a.start_s, a.duration_s, a.total_s) != (b.start_s, b.duration_s, b.total_s)
    return times or x.shape != y.shape or bool((x - y).norm() > TOLERANCE * x.norm() + 1e-3 * x.numel() ** 0.5)


def _read_s(clips: Sequence[Clip]) -> float:
    """Seconds to read an entry, the median of some."""
    found = []
    for clip in clips[:: max(1, len(clips) // PROBES)]:
        begin = time.perf_counter()
        clip.latents.entries.read(_path(clip))
        found.append(time.perf_counter() - begin)
    return statistics.median(found) if found else 0.0
