"""Captions of scenes: of what is seen, of what is heard, and of both, in three wordings that say the same."""

from .labels import attributes
from .log import Scene

VERBS = {"blink": "blink", "bounce": "bounce", "turn": "turn"}
ADVERBS = {"slow": "slowly", "fast": "fast"}
SILENCE = "silence"


def caption(scene: Scene) -> str:
    """One sentence with everything there is to see, in the scene's wording."""
    found = attributes(scene)
    one = found["count"] == "one"
    who = f"{'a' if one else found['count']} {found['size']} {found['colour']} {_plural(found['shape'], not one)}"
    move = f"{'moves' if one else 'move'} {found['motion']} {ADVERBS[found['speed']]}"
    where = f"on a {found['background']} background"
    act = ""
    if found["action"] in VERBS:
        act = f" and {VERBS[found['action']]}{'s' if one else ''}"
        act += f" {found['times']}" if "times" in found else ""
    return _sentence(
        (
            f"{who} {move} {where}{act}",
            f"{where}, {who} {move}{act}",
            f"video of {who} that {move}{act}, {where}",
        )[scene.wording]
    )


def sound_caption(scene: Scene, stereo: bool = False) -> str:
    """One sentence with everything there is to hear, in the scene's wording; places are named in stereo alone."""
    return _sentence(_sounds(scene, stereo))


def joint_caption(scene: Scene, stereo: bool = False) -> str:
    """One sentence with everything there is to see and to hear, in the scene's wording."""
    seen, heard = caption(scene)[:-1], _sounds(scene, stereo)
    return (
        f"{seen}, {'in' if heard == SILENCE else 'with the sound of'} {heard}.",
        f"{_sentence(heard)[:-1]}: {seen[0].lower()}{seen[1:]}.",
        f"{seen}; there is the sound of {heard}." if heard != SILENCE else f"{seen}; there is {heard}.",
    )[scene.wording]


def _sounds(scene: Scene, stereo: bool) -> str:
    found = attributes(scene, stereo)
    on, of = (" on the", " from the", ",")[scene.wording], found.get("pan")
    parts = []
    if found["sound"] != "none":
        noun = _plural(found["sound"], found["number"] != "one")
        if scene.wording == 1:
            parts.append(f"{found['number']} {found['timbre']} {noun} of {found['pitch']} pitch{_where(on, of)}")
        else:
            parts.append(f"{found['number']} {found['pitch']} {found['timbre']} {noun}{_where(on, of)}")
    if found["burst"] != "none":
        parts.insert(found["burst"] == "after", f"a noise burst{_where(on, found.get('burst_pan'))}")
    return ", then ".join(parts) or SILENCE


def _where(words: str, place: str | None) -> str:
    if place == "centre":
        words = words.replace("on", "in")
    return f"{words} {place}" if place else ""


def _plural(noun: str, several: bool) -> str:
    return noun if not several else f"{noun}es" if noun.endswith("s") else f"{noun}s"


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."
