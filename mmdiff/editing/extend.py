"""A clip made longer by a whole cascade.

B batch, C channels, T time; clips are (B, C, T, ...).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from mmdiff.conditioning import Batch
from mmdiff.sampling import Noise

from .chunks import Chunks
from .edit import Edit
from .known import outpaint
from .window import Window

if TYPE_CHECKING:
    from mmdiff.cascade import Cascade, Clip


def extend(
    cascade: "Cascade",
    prompt: Batch,
    clip: Tensor,
    steps: int,
    *,
    noise: Noise,
    context: int | None = None,
    fade: int = 0,
    negative: Batch | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    watch: "Callable[[str, Clip], None] | None" = None,
) -> "Clip":
    """The clip (1 or B, C, T, ...) followed by `steps` new time steps, T + steps in all.

    It is encoded once, continued to its whole length in the space of the first stage, and then goes through the others
    and is decoded once (`long`). The given clip comes back as it is, but for its last `fade` steps.
    context: steps of the cascade's clip that each part knows of those before (default: half the cascade's length).
    progress, watch: as `Cascade` takes them; what is watched may be longer than the result.
    Raises ValueError unless 1 <= context < the cascade's length, and steps >= 1.
    """
    length = cascade.shape[1]
    context = length // 2 if context is None else context
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1: how many to add")
    if not 1 <= context < length:
        raise ValueError(f"context={context} must lie in 1..{length - 1}, below the cascade's length of {length} steps")
    total = clip.shape[2] + steps
    made_steps = max(total, length)  # a shorter clip is made at the length that was trained, and cut
    room, known = outpaint(clip, 2, after=made_steps - clip.shape[2])
    made = long(cascade, made_steps, context)(
        prompt, noise=noise, shape=(cascade.shape[0], made_steps, *cascade.shape[2:]), negative=negative,
        progress=progress, watch=watch, edit=Edit(room, known=known, fade=fade),
    )  # fmt: skip
    return replace(made, data=made.data[:, :, :total])


def long(cascade: "Cascade", steps: int, context: int) -> "Cascade":
    """The cascade that continues a clip to `steps` time steps, where its stages cannot by themselves.

    A first stage goes on in `Chunks` of its length that know the share of it that `context` is of the cascade's length,
    in place of a `Window`, which need not look at what is given. Later ones go by a `Window`. Those that have `Chunks`,
    `Rolling` or, later, any window are left as they are.
    """
    from mmdiff.cascade import Generate

    first, (channels, length, *sizes) = next(iter(cascade.stages)), cascade.shape
    own, asked = (cascade.plan((channels, cascade.whole(n), *sizes), cascade.rate) for n in (length, steps))
    for (name, stage), (shape, _), (longer, _) in zip(cascade.stages.items(), own, asked, strict=True):
        if not isinstance(stage, Generate) or longer[1] <= shape[1]:
            continue
        if name == first and isinstance(stage.window, Window):
            stage = replace(stage, window=None)
        if stage.seen(longer)[0] < longer[1]:
            continue
        known = min(max(1, math.ceil(context * shape[1] / length)), shape[1] - 1)
        window = Chunks(shape[1], known) if name == first else Window(shape[1], shape[1] // 2)
        cascade = cascade.with_stage(name, window=window)
    return cascade
