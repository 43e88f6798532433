"""What a caption asks for: the attributes that its words name, whether a template wrote it or a person."""

import re

from .labels import HEARD, SEEN
from .vocabulary import NUMBERS, SOUNDS

_COUNT = "|".join(("an?", *NUMBERS.values()))
_KIND = rf"(?:\b({_COUNT})\b(?:,? (?!(?:{_COUNT})\b)[\w-]+)*? )?"  # a number and adjectives, before a noun
_SHAPE = re.compile(rf"{_KIND}\b({'|'.join(SEEN['shape'])})(?:e?s)?\b")
_MOTION = re.compile(
    rf"\b(?:mov(?:e|es|ing)|go(?:es|ing)?)\s+(?:\w+ly\s+|fast\s+)?(?:to the\s+)?({'|'.join(SEEN['motion'])})\b"
)
_SPEED = re.compile(r"\b(slow|fast|quick)(?:ly)?\b")
_ACTION = re.compile(r"\b(slide|blink|bounce|turn)(?:s|ing)?\b(?:\s+(once|twice|three times))?")
_GROUND = re.compile(rf"\b({'|'.join(SEEN['background'])}) background\b")
_SOUND = re.compile(rf"{_KIND}\b({'|'.join(SOUNDS.values())})s?\b")
_BURST = re.compile(r"\bnoise burst\b")
_PLACE = re.compile(r"\s*,?\s*(?:(?:on|from|in) the )?(left|right|centre|center)\b")
_SILENCE = re.compile(r"\b(silence|silent|silently|no sound)\b")


def parse(caption: str) -> dict[str, str]:
    """Attribute -> value for what the caption names; what it does not name is left out.

    Of a caption of `mmdiff.world` that is all of it: `parse(joint_caption(scene, stereo))` is
    `attributes(scene, stereo)`, and those of the other captions are their part of it. A caption that names a sound or
    silence says by that whether there is a burst.
    """
    text = " ".join(caption.lower().split())
    return {**_seen(text), **_heard(text)}


def _seen(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    if shape := _SHAPE.search(text):
        found["shape"] = shape[2]
        if shape[1]:
            found["count"] = "one" if shape[1] in ("a", "an") else shape[1]
        noun = text[shape.start() : shape.end()]
        for name in ("size", "colour"):
            if word := re.search(rf"\b({'|'.join(SEEN[name])})\b", noun):
                found[name] = word[1]
    if motion := _MOTION.search(text):
        found["motion"] = motion[1]
        found["action"] = "slide"  # unless it says more
    if speed := _SPEED.search(text):
        found["speed"] = "slow" if speed[1] == "slow" else "fast"
    if ground := _GROUND.search(text):
        found["background"] = ground[1]
    if action := _ACTION.search(text):
        found["action"] = action[1]
        if action[2]:
            found["times"] = action[2]
    return found


def _heard(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    sound, burst = _SOUND.search(text), _BURST.search(text)
    if not (sound or burst or _SILENCE.search(text)):
        return found
    found["sound"] = sound[2] if sound else "none"
    if sound:
        if sound[1]:
            found["number"] = "one" if sound[1] in ("a", "an") else sound[1]
        rest = text[sound.end() :]
        pitched = text[sound.start() : sound.end()] + (re.match(r" of (?:high|low) pitch", rest) or [""])[0]
        for name in ("pitch", "timbre"):
            if word := re.search(rf"\b({'|'.join(HEARD[name])})\b", pitched):
                found[name] = word[1]
        if place := _PLACE.match(re.sub(r"^ of (?:high|low) pitch", "", rest)):
            found["pan"] = place[1].replace("center", "centre")
    found["burst"] = "none"
    if burst:
        found["burst"] = "before" if sound and burst.start() < sound.start() else "after"
        place = _PLACE.match(text[burst.end() :])
        if place and place[1] in HEARD["burst_pan"]:
            found["burst_pan"] = place[1]
    return found
