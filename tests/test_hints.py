"""Hints for a ControlNet: edges of clips, envelope and chroma of waveforms."""

import math

import pytest
import torch
from torch import Tensor

from audio.hints import Chroma, Envelope
from video.hints import Edges

RATE = 16_000
NOTES = ["C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B"]


def tone(frequency: float, samples: int = RATE, level: float = 0.5) -> Tensor:
    return level * torch.sin(2 * math.pi * frequency * torch.arange(samples) / RATE)[None, None]


def step(angle: float) -> Tensor:
    """A grey clip (1, 1, 2, 33, 33), black on one side of a line through the centre and white on the other."""
    at = torch.arange(33) - 16.0
    side = at[:, None] * math.sin(angle) + at[None, :] * math.cos(angle)
    return side.sign().expand(1, 1, 2, 33, 33)


def test_an_edge_from_black_to_white_is_one_and_all_else_is_nothing() -> None:
    hint = Edges()(step(0.0) - (step(0.0) == 0).float())
    assert hint.shape == (1, 1, 2, 33, 33)
    assert torch.allclose(hint[..., 16], torch.ones(1, 1, 2, 33))
    assert hint[..., :15].max() == hint[..., 18:].max() == 0
    assert Edges()(torch.full((1, 3, 1, 5, 7), 0.7)).max() < 1e-6


@pytest.mark.parametrize("angle", [0.0, 0.5, math.pi / 4, math.pi / 2, 2.5])
def test_edges_are_as_strong_in_every_direction_and_lie_on_the_line(angle: float) -> None:
    hint = Edges()(step(angle))[0, 0, 0]
    inner = hint[8:25, 8:25]
    assert 0.7 < inner.max() <= math.sqrt(2)
    at = torch.arange(33) - 16.0
    distance = (at[:, None] * math.sin(angle) + at[None, :] * math.cos(angle)).abs()
    assert hint[distance > 2].max() < 1e-6


def test_edges_of_colour_are_those_of_its_luminance_frame_by_frame() -> None:
    clip = torch.rand(2, 3, 3, 6, 8) * 2 - 1
    luma = (clip * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1, 1)).sum(dim=1, keepdim=True)
    hint = Edges()(clip)
    assert torch.allclose(hint, Edges()(luma), atol=1e-6)
    assert torch.allclose(hint[1:, :, 2:], Edges()(clip[1:, :, 2:]), atol=1e-6)


def test_the_envelope_is_the_level_in_decibels() -> None:
    envelope = Envelope(hop_length=256, window=1024)
    for level in (1.0, 0.1, 0.01):
        hint = envelope(tone(440.0, level=level))
        assert hint.shape == (1, 1, math.ceil(RATE / 256))
        expected = 1 + 20 * math.log10(level / math.sqrt(2)) / 40  # 80 dB are the range of 2
        assert (hint[..., 4:-4] - expected).abs().max() < 0.005
    assert torch.equal(envelope(torch.zeros(1, 2, 512)), torch.full((1, 1, 2), -1.0))


def test_a_burst_stands_in_the_envelope_where_it_sounds() -> None:
    x = torch.zeros(1, 1, 4096)
    x[..., 2048] = 1.0
    hint = Envelope(hop_length=64, window=65)(x)[0, 0]
    assert hint.argmax() == 32
    assert (hint > -1).sum() == 1


@pytest.mark.parametrize("octave", [3, 4, 5])
@pytest.mark.parametrize("note", range(12), ids=NOTES)
def test_a_note_is_its_pitch_class_in_every_octave(note: int, octave: int) -> None:
    frequency = 440 * 2 ** ((note - 9) / 12 + octave - 4)
    hint = Chroma()(tone(frequency))
    assert hint.shape == (1, 12, math.ceil(RATE / 256))
    inner = hint[0, :, 8:-8]
    assert (inner.argmax(dim=0) == note).all()
    assert (inner[note] == 1).all()
    others = [n for n in range(12) if (n - note) % 12 not in (0, 1, 11)]
    assert inner[others].max() < 0.05


def test_a_chord_shows_its_notes_and_loudness_does_not_matter() -> None:
    chord = tone(261.63) + tone(329.63) + tone(392.0)
    chroma = Chroma()
    hint = chroma(chord)[0, :, 8:-8].mean(dim=1)
    assert set(hint.topk(3).indices.tolist()) == {0, 4, 7}
    assert torch.allclose(chroma(chord), chroma(0.01 * chord), atol=1e-4)
    assert chroma(torch.zeros(1, 1, 5000)).abs().max() == 0


@pytest.mark.parametrize("make", [Envelope, Chroma])
@pytest.mark.parametrize("samples", [1, 255, 256, 257, 4097])
def test_every_length_gives_a_frame_for_each_hop_begun(make: type, samples: int) -> None:
    hint = make()(torch.randn(2, 2, samples).clamp(-1, 1))
    assert hint.shape[0] == 2
    assert hint.shape[-1] == math.ceil(samples / 256)
    assert hint.isfinite().all()


def test_what_is_no_clip_or_no_waveform_is_refused() -> None:
    with pytest.raises(ValueError, match="edges are of grey or RGB clips"):
        Edges()(torch.zeros(1, 2, 1, 4, 4))
    for hint in (Envelope(), Chroma()):
        with pytest.raises(ValueError, match="this hint is of waveforms"):
            hint(torch.zeros(4, 100))
    with pytest.raises(ValueError, match="hop_length=512, window=256 must satisfy"):
        Envelope(512, 256)
    with pytest.raises(ValueError, match="low=60.0, high=9000.0 must satisfy"):
        Chroma(high=9000.0)
