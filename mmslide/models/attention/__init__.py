"""Token mixers: each takes a channels-last map (B, H, W, C) and returns one of the same shape."""

from .cross_shaped import CrossShapedWindowAttention
from .locally_grouped import LocallyGroupedAttention
from .neighborhood import NeighborhoodAttention
from .slide import SlideAttention
from .subsampled import PooledAttention, SubsampledAttention
from .window import WindowAttention

__all__ = [
    'CrossShapedWindowAttention',
    'LocallyGroupedAttention',
    'NeighborhoodAttention',
    'PooledAttention',
    'SlideAttention',
    'SubsampledAttention',
    'WindowAttention',
]
