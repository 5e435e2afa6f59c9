"""Token mixers: each takes a channels-last map (B, H, W, C) and returns one of the same shape."""

from .locally_grouped import LocallyGroupedAttention
from .neighborhood import NeighborhoodAttention
from .slide import SlideAttention
from .subsampled import SubsampledAttention
from .window import WindowAttention

__all__ = [
    'LocallyGroupedAttention',
    'NeighborhoodAttention',
    'SlideAttention',
    'SubsampledAttention',
    'WindowAttention',
]
