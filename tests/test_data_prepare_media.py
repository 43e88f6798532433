"""What curation sees and hears: cuts, motion, faults, near copies, scores."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from audio.curation import AudioMedium
from audio.curation import fingerprint as sound_fingerprint
from audio.files import read_audio, resample, write_audio
from mmdiff.data.duplicates import MOST_BITS, MOST_VALUE, Duplicates, fingerprint_bits
from mmdiff.data.medium import Fingerprint, Piece
from video.curation import VideoMedium
from video.curation import fingerprint as fingerprint_of_shots
from video.files import write_video
from video.scenes import cuts, jumps


def scene(seed: int, count: int, speed: int = 1) -> np.ndarray:
    """(count, 32, 32, 3) uint8: a smooth picture that moves sideways."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((32, 32), Image.Resampling.BICUBIC))
    return np.stack([np.roll(picture, speed * t, axis=1) for t in range(count)])


def test_cuts_are_found_at_their_frame() -> None:
    lengths = [9, 3, 14, 7, 2, 20]
    film = np.concatenate([scene(seed, count) for seed, count in enumerate(lengths)])
    assert cuts(jumps(film), 0.15) == [9, 12, 26, 33, 35]


@pytest.mark.parametrize("what", ["still", "drift", "fast motion", "flash", "fade", "one frame"])
def test_what_is_no_cut(what: str) -> None:
    film = scene(1, 30, {"still": 0, "drift": 1, "fast motion": 9}.get(what, 0)).copy()
    if what == "flash":
        film[12] = 255
    if what == "fade":
        film = (film * np.linspace(1, 0, 30)[:, None, None, None]).astype(np.uint8)
    if what == "one frame":
        film = film[:1]
    assert cuts(jumps(film), 0.15) == []


# -- near copies


def test_copies_are_found_as_by_comparing_all_with_all() -> None:
    rng = np.random.default_rng(0)
    found: list[Fingerprint] = []
    for number in range(300):
        bits = np.unpackbits(rng.integers(0, 256, 32, dtype=np.uint8))
        values = rng.integers(0, 256, 20).astype(np.int16)
        if number >= 200:  # near one before, by up to a few more than is still near
            bits = np.unpackbits(np.frombuffer(found[number - 200].bits, np.uint8)).copy()
            values = np.frombuffer(found[number - 200].values, np.uint8).astype(np.int16)
            bits[rng.choice(256, rng.integers(0, 20), replace=False)] ^= 1
            values = (values + rng.integers(-27, 28, 20) * (number % 2)).clip(0, 255)
        found.append(
            Fingerprint(np.packbits(bits).tobytes(), values.astype(np.uint8).tobytes(), 1 + number % 3 * 0.015)
        )
    finder, originals, copies = Duplicates(), [], 0
    for place, one in enumerate(found):
        expected = None
        for other in originals:
            far = np.unpackbits(np.frombuffer(one.bits, np.uint8) ^ np.frombuffer(found[other].bits, np.uint8)).sum()
            a, b = (np.frombuffer(f.values, np.uint8).astype(int) for f in (one, found[other]))
            long, short = sorted((one.length_s, found[other].length_s), reverse=True)
            if far <= MOST_BITS and np.abs(a - b).max() <= finder.most_value and long - short <= 0.02 * long:
                expected = other
                break
        assert finder.first(place, one) == expected
        if expected is None:
            originals.append(place)
        copies += expected is not None
    assert 20 < copies < 80


def frames(seed: int) -> list[np.ndarray]:
    film = scene(seed, 4, 5)
    return [np.asarray(Image.fromarray(frame).resize((96, 64), Image.Resampling.BICUBIC)) for frame in film]


def nearness(one: Fingerprint, other: Fingerprint) -> tuple[int, int]:
    """(bits that differ, greatest difference of a value)."""
    bits = np.unpackbits(np.frombuffer(one.bits, np.uint8) ^ np.frombuffer(other.bits, np.uint8)).sum()
    a, b = (np.frombuffer(f.values, np.uint8).astype(int) for f in (one, other))
    return int(bits), int(np.abs(a - b).max())


def picture_fingerprint(shots: list[np.ndarray]) -> Fingerprint:
    return fingerprint_of_shots(shots, 1.0)


def test_a_picture_s_hash_is_that_of_imagehash() -> None:
    imagehash = pytest.importorskip("imagehash")
    for seed in range(5):
        shots = frames(seed)
        theirs = np.concatenate([imagehash.phash(Image.fromarray(shot)).hash.reshape(-1) for shot in shots])
        assert picture_fingerprint(shots).bits == np.packbits(theirs).tobytes()


def test_coded_and_resized_pictures_are_copies_and_others_are_not() -> None:
    def coded(shot: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(shot).save(file, format="JPEG", quality=75)
        return np.asarray(Image.open(file))

    for seed in range(6):
        own = picture_fingerprint(frames(seed))
        resized = [np.asarray(Image.fromarray(shot).resize((48, 32), Image.Resampling.BOX)) for shot in frames(seed)]
        for copy in (resized, [coded(shot) for shot in frames(seed)]):
            bits, value = nearness(own, picture_fingerprint(copy))
            assert bits <= MOST_BITS
            assert value <= MOST_VALUE
        recoloured = [shot[..., [2, 1, 0]] for shot in frames(seed)]
        for other in (frames(seed + 10), recoloured, frames(seed)[::-1]):
            bits, value = nearness(own, picture_fingerprint(other))
            assert bits > MOST_BITS or value > MOST_VALUE


def test_wrong_shapes_of_levels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(256,\); \(4, 64\) is needed"):
        fingerprint_bits(np.zeros(256))


def word(seed: int, rate: int = 8000) -> torch.Tensor:
    """(1, T): half a second with tones that come and go."""
    rng = np.random.default_rng(seed)
    time = np.arange(rate // 2) / rate
    tones = sum(
        np.sin(2 * np.pi * rng.uniform(150, 3400) * time) * np.exp(-(((time - rng.uniform(0, 0.5)) / 0.08) ** 2))
        for _ in range(6)
    )
    noise = rng.normal(0, 1e-3, len(time))
    return torch.from_numpy(0.1 * tones + noise).float()[None]


def test_quieter_resampled_and_coded_sounds_are_copies_and_others_are_not() -> None:
    for seed in range(6):
        own = sound_fingerprint(word(seed), 8000)
        file = io.BytesIO()
        soundfile.write(file, word(seed)[0].numpy(), 8000, format="OGG", subtype="VORBIS")
        coded, _ = read_audio(file.getvalue())
        for copy, rate in (
            (word(seed) * 0.3, 8000), (resample(word(seed), 8000, 22050), 22050), (word(seed).repeat(2, 1), 8000),
        ):  # fmt: skip
            bits, value = nearness(own, sound_fingerprint(copy, rate))
            assert bits <= MOST_BITS
            assert value <= MOST_VALUE
        assert nearness(own, sound_fingerprint(coded, 8000))[0] <= 2 * MOST_BITS
        bits, value = nearness(own, sound_fingerprint(word(seed + 10), 8000))
        assert bits > MOST_BITS
        assert value > MOST_VALUE


@pytest.mark.parametrize("samples", [1, 10, 300, 8000, 400000])
def test_every_length_of_sound_has_a_fingerprint(samples: int) -> None:
    found = sound_fingerprint(torch.randn(2, samples, generator=torch.Generator().manual_seed(0)) * 0.1, 16000)
    assert (len(found.bits), len(found.values)) == (32, 512)


def test_takes_of_a_word_and_other_sprites_are_no_copies(shared_data: Path) -> None:
    from mmdiff.data.sources import load_source

    for name, medium in (("lpc_sprites", VideoMedium()), ("fsdd", AudioMedium())):
        finder = Duplicates()
        items = load_source(shared_data / name, medium.extensions).splits["val"][:60]
        for place, item in enumerate(items):
            assert finder.first(place, medium.look(item.read(), item.where, Piece()).fingerprint) is None
        again = medium.look(items[7].read(), items[7].where, Piece()).fingerprint
        assert finder.first(99, again) == 7


# -- measures


def video(path: Path, clip: torch.Tensor, fps: float = 8) -> bytes:
    write_video(path, clip, fps)
    return path.read_bytes()


def test_motion_counts_by_the_second_and_faults_are_seen(tmp_path: Path) -> None:
    moving = torch.from_numpy(scene(0, 16, 4)).permute(3, 0, 1, 2) / 127.5 - 1
    medium = VideoMedium()
    seen = medium.look(video(tmp_path / "a.mp4", moving), "a.mp4", Piece())
    grey = scene(0, 16, 4).mean(-1) / 255
    assert seen.measures["motion"] == pytest.approx(np.abs(np.diff(grey, axis=0)).mean() * 8, rel=0.05)
    assert seen.measures["brightness"] == pytest.approx(grey.mean(), abs=0.02)
    assert seen.facts == {"num_frames": 16, "fps": 8, "height": 32, "width": 32, "duration": 2.0}
    assert seen.faults == ()
    assert seen.picture.startswith(b"\xff\xd8")
    faster = medium.look(video(tmp_path / "b.mp4", moving, 16), "b.mp4", Piece())
    assert faster.measures["motion"] == pytest.approx(2 * seen.measures["motion"], rel=0.01)
    part = medium.look(tmp_path / "a.mp4", "a.mp4", Piece(0.5, 1.0))
    assert (part.facts["num_frames"], part.facts["duration"]) == (4, 0.5)
    blink = moving[:, :1].repeat(1, 16, 1, 1)
    assert medium.look(video(tmp_path / "c.mp4", blink), "c", Piece()).faults == ("frozen",)
    blink[:, 9, 10:14, 10:14] = 1.0
    assert medium.look(video(tmp_path / "d.mp4", blink), "d", Piece()).faults == ()
    dark = torch.full((3, 4, 32, 32), -1.0)
    assert medium.look(video(tmp_path / "e.mp4", dark), "e", Piece()).faults == ("black", "frozen")
    assert medium.look(video(tmp_path / "f.mp4", moving[:, :1]), "f", Piece()).faults == ("single frame",)


def test_sound_has_its_level_and_silence_is_seen(tmp_path: Path) -> None:
    time = torch.arange(16000) / 16000
    tone = 0.5 * torch.sin(2 * torch.pi * 1000 * time)[None]
    medium = AudioMedium()
    write_audio(tmp_path / "a.wav", tone, 16000)
    seen = medium.look(tmp_path / "a.wav", "a", Piece())
    assert seen.measures["peak_db"] == pytest.approx(-6.02, abs=0.01)
    assert seen.measures["rms_db"] == pytest.approx(-9.03, abs=0.01)
    assert seen.measures["lufs"] == pytest.approx(-9.03, abs=0.1)  # BS.1770: a full-scale sine of 1 kHz has -3.01
    assert seen.facts == {"sample_rate": 16000, "channels": 1, "num_samples": 16000, "duration": 1.0}
    assert seen.faults == ()
    assert seen.picture.startswith(b"\x89PNG")
    part = medium.look(tmp_path / "a.wav", "a", Piece(0.25, 0.5))
    assert part.facts["num_samples"] == 4000
    write_audio(tmp_path / "b.wav", tone * 1e-3, 16000)
    assert medium.look(tmp_path / "b.wav", "b", Piece()).faults == ("silent",)
    write_audio(tmp_path / "c.wav", torch.zeros(1, 800), 16000)
    assert medium.look(tmp_path / "c.wav", "c", Piece()).measures == {
        "lufs": -120.0,
        "peak_db": -120.0,
        "rms_db": -120.0,
    }


def test_sound_of_many_channels_has_a_level(tmp_path: Path) -> None:
    wave = 0.1 * torch.sin(torch.arange(8000) * 0.3)
    soundfile.write(tmp_path / "a.wav", wave.expand(12, -1).T.numpy(), 8000)
    soundfile.write(tmp_path / "b.wav", wave.numpy(), 8000)
    many, one = (AudioMedium().look(tmp_path / name, name, Piece()) for name in ("a.wav", "b.wav"))
    assert many.facts["channels"] == 12
    assert many.measures["lufs"] == pytest.approx(one.measures["lufs"], abs=0.01)


def test_a_film_in_parts_is_cut_where_it_is_cut_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = np.concatenate([scene(seed, 6, speed=0) for seed in range(3)])
    clip = torch.from_numpy(film).permute(3, 0, 1, 2).float() / 127.5 - 1
    write_video(tmp_path / "a.mp4", clip, 8)
    medium = VideoMedium(scene_threshold=0.15)
    whole = medium.pieces(tmp_path / "a.mp4", "a")
    assert [piece.start_s for piece in whole[0]] == [0, 0.75, 1.5]
    monkeypatch.setattr("video.curation._CHUNK_BYTES", 6 * 32 * 32 * 3)  # cuts fall between two parts
    assert medium.pieces(tmp_path / "a.mp4", "a") == whole


def test_sound_is_converted_as_asked_and_copied_otherwise(tmp_path: Path) -> None:
    stereo = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)) * 0.1
    write_audio(tmp_path / "a.wav", stereo, 8000)
    data = (tmp_path / "a.wav").read_bytes()
    kept = AudioMedium().encode(data, "a.wav", ".wav", Piece())
    assert (kept.data, kept.suffix, kept.changes) == (data, ".wav", ())
    made = AudioMedium(sample_rate=16000, channels=1).encode(data, "a.wav", ".wav", Piece())
    assert (made.suffix, made.changes) == (".flac", ("mixed", "resampled"))
    waveform, rate = read_audio(made.data)
    assert (rate, tuple(waveform.shape)) == (16000, (1, 16000))
    part, _ = read_audio(AudioMedium().encode(data, "a.wav", ".wav", Piece(0.25, 0.5)).data)
    torch.testing.assert_close(part, read_audio(data)[0][:, 2000:4000], rtol=0, atol=1e-4)


# -- scores of pretrained weights


def vocabulary(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "dog", "barks"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}))


SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 8
}  # fmt: skip


def test_clip_and_aesthetic_scores_are_those_of_the_weights(tmp_path: Path) -> None:
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 8, "max_position_embeddings": 8, "eos_token_id": 1, "pad_token_id": 0}
    picture = {**SIZES, "image_size": 16, "patch_size": 8}
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=picture, projection_dim=8)).eval()
    model.save_pretrained(tmp_path / "clip")
    vocabulary(tmp_path / "clip")
    from safetensors.torch import save_file

    (tmp_path / "nice").mkdir()
    save_file({"weight": torch.zeros(1, 8), "bias": torch.tensor([5.5])}, tmp_path / "nice" / "aesthetic.safetensors")
    medium = VideoMedium(clip_weights=str(tmp_path / "clip"), aesthetic_weights=str(tmp_path / "nice"))
    assert list(medium.measures()) == ["motion", "brightness", "clip", "aesthetic"]
    flat = torch.full((3, 4, 16, 16), 0.5)
    data = video(tmp_path / "a.mp4", flat)
    seen = medium.look(data, "a", Piece(), "a red dog")
    assert seen.measures["aesthetic"] == pytest.approx(5.5)
    from video.files import read_video

    shot = read_video(data).frames[:, :1].permute(1, 0, 2, 3) / 255
    mean, std = torch.tensor([0.4815, 0.4578, 0.4082]), torch.tensor([0.2686, 0.2613, 0.2758])
    with torch.no_grad():
        pixels = (shot - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        ids = torch.tensor([[3, 4, 5]])
        out = model(input_ids=ids, pixel_values=pixels)
        expected = float((out.image_embeds * out.text_embeds).sum())
    assert seen.measures["clip"] == pytest.approx(expected, abs=2e-3)
    assert medium.look(data, "a", Piece(), "barks").measures["clip"] != pytest.approx(expected, abs=1e-3)
    key = medium.key()
    (tmp_path / "nice" / "aesthetic.safetensors").unlink()
    save_file({"weight": torch.ones(1, 8), "bias": torch.tensor([5.5])}, tmp_path / "nice" / "aesthetic.safetensors")
    assert medium.key() != key
    with pytest.raises(ValueError, match="holds no .safetensors weights"):
        VideoMedium(clip_weights=str(tmp_path)).key()


def test_clap_scores_the_middle_of_a_long_sound_the_same_every_time(tmp_path: Path) -> None:
    tf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": 8, "max_position_embeddings": 16, "pad_token_id": 0}
    sound = {
        "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [1, 2], "hidden_size": 16,
        "num_mel_bins": 16, "spec_size": 64, "window_size": 4, "patch_size": 4, "patch_stride": [4, 4],
        "projection_dim": 8, "enable_fusion": False,
    }  # fmt: skip
    config = tf.ClapConfig(text_config=text, audio_config=sound, projection_dim=8)
    tf.ClapModel(config).eval().save_pretrained(tmp_path)
    vocabulary(tmp_path)
    settings = {"feature_size": 16, "sampling_rate": 8000, "max_length_s": 1, "hop_length": 160, "fft_window_size": 256}
    tf.ClapFeatureExtractor(**settings, frequency_max=4000, truncation="rand_trunc").save_pretrained(tmp_path)
    medium = AudioMedium(clap_weights=str(tmp_path))
    assert "clap" in medium.measures()
    waveform = torch.randn(1, 24000, generator=torch.Generator().manual_seed(0)) * 0.1
    write_audio(tmp_path / "a.wav", waveform, 8000)
    scores = {medium.look(tmp_path / "a.wav", "a", Piece(), "a dog barks").measures["clap"] for _ in range(3)}
    assert len(scores) == 1
    assert -1 <= scores.pop() <= 1
