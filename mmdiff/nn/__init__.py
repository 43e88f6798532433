"""Blocks over one, two or three axes: what the backbones are made of. Needs torch and einops alone."""

from .activation import Snake
from .attention import AxisAttention, CrossAttention
from .conv import Resample, convolution, pool_time
from .embed import NoiseEmbedding, sinusoid
from .norm import AdaGroupNorm, Standardize, group_norm

__all__ = [
    "AdaGroupNorm",
    "AxisAttention",
    "CrossAttention",
    "NoiseEmbedding",
    "Resample",
    "Snake",
    "Standardize",
    "convolution",
    "group_norm",
    "pool_time",
    "sinusoid",
]
