"""The attributes of a scene in words: what captions say, readers read and compositional tests hold out."""

from collections.abc import Mapping, Sequence

from .log import Scene
from .vocabulary import (
    ACTIONS,
    BACKGROUNDS,
    BURSTS,
    COLOURS,
    FREQUENCIES,
    MOTIONS,
    NUMBERS,
    PANS,
    PITCHES,
    SHAPES,
    SIZES,
    SOUNDS,
    SPEEDS,
    TIMBRES,
    TIMES,
    mean,
    pan_of,
)

SEEN = {  # attribute -> its values; `times` only of bodies that blink or turn
    "count": tuple(NUMBERS.values()),
    "size": tuple(SIZES),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "motion": tuple(MOTIONS),
    "speed": tuple(SPEEDS),
    "background": tuple(BACKGROUNDS),
    "action": ACTIONS,
    "times": tuple(TIMES.values()),
}
HEARD = {  # from `number` to `pan` only where bodies make a sound, `pan` and `burst_pan` only in stereo
    "sound": ("none", *SOUNDS.values()),
    "number": tuple(NUMBERS.values()),
    "pitch": tuple(FREQUENCIES),
    "timbre": ("pure", "hollow", "buzzy"),
    "pan": PANS,
    "burst": BURSTS,
    "burst_pan": ("left", "right"),
}
HELD_OUT_CHOICES = tuple({**SEEN, **HEARD})


def attributes(scene: Scene, stereo: bool = True) -> dict[str, str]:
    """Attribute -> value of all there is to see and to hear; an attribute that the scene does not have is left out."""
    found = {
        "count": NUMBERS[len(scene.movers)],
        "size": scene.size,
        "colour": scene.colour,
        "shape": scene.shape,
        "motion": scene.motion,
        "speed": scene.speed,
        "background": scene.background,
        "action": scene.action,
    }
    if scene.action in ("blink", "turn"):
        found["times"] = TIMES[len(scene.acts)]
    heard = [event for event in scene.acts if event.heard]
    found["sound"] = SOUNDS[scene.action] if heard else "none"
    if heard:
        found |= {"number": NUMBERS[len(heard)], "pitch": PITCHES[scene.size], "timbre": TIMBRES[scene.colour]}
        if stereo:
            found["pan"] = pan_of(mean([event.place for event in heard]))
    found["burst"] = "none"
    if scene.bursts:
        # A burst alone counts as after silence.
        late = not heard or scene.bursts[0].time_s > heard[0].time_s
        found["burst"] = "after" if late else "before"
        if stereo:
            found["burst_pan"] = pan_of(scene.bursts[0].place)
    return found


def is_held_out(scene: Scene, pair: tuple[str, str]) -> bool:
    """Whether the scene's combination of two attributes is held out.

    The rule: the values stand at places i and j of `SEEN` or `HEARD`; held out is i = j modulo the greater number of
    values. So each value of the attribute with fewer is held out once, and is seen with all other values of the
    other: of colour and shape, red circles, green squares, blue triangles and yellow crosses.
    A scene without one of the attributes is seen.
    """
    values, found = {**SEEN, **HEARD}, attributes(scene)
    if not all(name in found for name in pair):
        return False
    i, j = (values[name].index(found[name]) for name in pair)
    return (i - j) % max(len(values[name]) for name in pair) == 0


def agreement(asked: Sequence[Mapping[str, str]], read: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Attribute -> share of the clips that it was asked of in which just that was read.

    Raises ValueError if there are not as many of one as of the other.
    """
    if len(asked) != len(read):
        raise ValueError(f"{len(asked)} captions and {len(read)} readings are not pairs")
    hits: dict[str, list[bool]] = {}
    for wanted, found in zip(asked, read, strict=True):
        for name, value in wanted.items():
            hits.setdefault(name, []).append(found.get(name) == value)
    return {name: sum(flags) / len(flags) for name, flags in hits.items()}
