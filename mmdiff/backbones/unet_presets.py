"""The U-Net with settings that suit waveforms (T), spectrograms or images (T, F) and videos (T, H, W).

Each takes `UNet`'s arguments (see there) and differs from it in defaults alone, which follow the number of levels.
"""

from collections.abc import Callable, Sequence

from torch import nn

from ..nn.activation import Snake
from .unet import UNet

Patterns = Sequence[Sequence[Sequence[int]]]


class UNet1D(UNet):
    """U-Net over time, for waveforms: x (B, C, T), T a multiple of 512 with the defaults, 32 ms at 16 kHz.

    Four samples become channels, then each step between levels divides time by 4, the last one by 2: most parameters
    work at low rates, where they cost little. The lower half of the levels attends to all of time, and to the tokens
    where there are any. Activations are Snake, which learned faster than SiLU (`activation=None`) on waveforms.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2, 4, 8, 12),
        factors: Sequence[Sequence[int]] | None = None,
        blocks: int = 1,
        kernels: Sequence[Sequence[int]] | None = None,
        attend: Sequence[Sequence[Sequence[int]]] | None = None,
        cross: Sequence[bool] | None = None,
        tokens_width: int = 0,
        vector_width: int = 0,
        concat_channels: int = 0,
        patch: Sequence[int] | None = (4,),
        head_channels: int = 32,
        dropout: float = 0.0,
        dilations: Sequence[int] | None = None,
        gated: bool = False,
        activation: Callable[[int], nn.Module] | None = Snake,
        checkpoint: bool = False,
    ) -> None:
        levels = len(multipliers)
        factors = [*[(4,)] * (levels - 2), (2,)][: levels - 1] if factors is None else factors
        attend = [[[0]] if 2 * level >= levels else [] for level in range(levels)] if attend is None else attend
        cross = where_attended(attend, tokens_width) if cross is None else cross
        super().__init__(
            1,
            in_channels,
            out_channels=out_channels,
            channels=channels,
            multipliers=multipliers,
            factors=factors,
            blocks=blocks,
            kernels=kernels,
            attend=attend,
            cross=cross,
            tokens_width=tokens_width,
            vector_width=vector_width,
            concat_channels=concat_channels,
            patch=patch,
            head_channels=head_channels,
            dropout=dropout,
            dilations=dilations,
            gated=gated,
            activation=activation,
            checkpoint=checkpoint,
        )


class UNet2D(UNet):
    """U-Net over two axes, for spectrograms and images: x (B, C, T, F), both multiples of 4 with the defaults.

    Every level but the first attends to all positions, and to the tokens where there are any.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 4),
        factors: Sequence[Sequence[int]] | None = None,
        blocks: int = 1,
        kernels: Sequence[Sequence[int]] | None = None,
        attend: Sequence[Sequence[Sequence[int]]] | None = None,
        cross: Sequence[bool] | None = None,
        tokens_width: int = 0,
        vector_width: int = 0,
        concat_channels: int = 0,
        patch: Sequence[int] | None = None,
        head_channels: int = 32,
        dropout: float = 0.0,
        activation: Callable[[int], nn.Module] | None = None,
        checkpoint: bool = False,
    ) -> None:
        levels = len(multipliers)
        attend = [[[0, 1]] if level else [] for level in range(levels)] if attend is None else attend
        cross = where_attended(attend, tokens_width) if cross is None else cross
        super().__init__(
            2,
            in_channels,
            out_channels=out_channels,
            channels=channels,
            multipliers=multipliers,
            factors=factors,
            blocks=blocks,
            kernels=kernels,
            attend=attend,
            cross=cross,
            tokens_width=tokens_width,
            vector_width=vector_width,
            concat_channels=concat_channels,
            patch=patch,
            head_channels=head_channels,
            dropout=dropout,
            activation=activation,
            checkpoint=checkpoint,
        )


class UNet3D(UNet):
    """U-Net over time and space, for video: x (B, C, T, H, W), any T (1 is an image), H and W multiples of 8.

    The levels divide space and keep time. The first only convolves, the last attends to all positions, those between
    to time; every level that attends does so to the tokens too, where there are any. `kernels` are (2+1)-D, half the
    work of 3 x 3 x 3; [[1, 3, 3]] leaves time to attention.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        factors: Sequence[Sequence[int]] | None = None,
        blocks: int = 1,
        kernels: Sequence[Sequence[int]] | None = ((1, 3, 3), (3, 1, 1)),
        attend: Sequence[Sequence[Sequence[int]]] | None = None,
        cross: Sequence[bool] | None = None,
        tokens_width: int = 0,
        vector_width: int = 0,
        concat_channels: int = 0,
        patch: Sequence[int] | None = None,
        head_channels: int = 32,
        dropout: float = 0.0,
        activation: Callable[[int], nn.Module] | None = None,
        checkpoint: bool = False,
    ) -> None:
        levels = len(multipliers)
        factors = [(1, 2, 2)] * (levels - 1) if factors is None else factors
        if attend is None:
            attend = [[], *([[0]] for _ in range(levels - 2)), [[0, 1, 2]]] if levels > 1 else [[[0, 1, 2]]]
        cross = where_attended(attend, tokens_width) if cross is None else cross
        super().__init__(
            3,
            in_channels,
            out_channels=out_channels,
            channels=channels,
            multipliers=multipliers,
            factors=factors,
            blocks=blocks,
            kernels=kernels,
            attend=attend,
            cross=cross,
            tokens_width=tokens_width,
            vector_width=vector_width,
            concat_channels=concat_channels,
            patch=patch,
            head_channels=head_channels,
            dropout=dropout,
            activation=activation,
            checkpoint=checkpoint,
        )


def where_attended(attend: Patterns, tokens_width: int) -> list[bool]:
    """Cross-attention where there is self-attention, or everywhere if there is none."""
    if not tokens_width:
        return [False] * len(attend)
    return [bool(patterns) or not any(attend) for patterns in attend]
