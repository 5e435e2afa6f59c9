"""Token mixers: each takes a channels-last map (B, H, W, C) and returns one of the same shape."""

from .cross_shaped import CrossShapedWindowAttention
from .locally_grouped import LocallyGroupedAttention
from .slide import SlideAttention
from .subsampled import SubsampledAttention
from .window import WindowAttention

__all__ = [
    'CrossShapedWindowAttention',
    'LocallyGroupedAttention',
    'SlideAttention',
    'SubsampledAttention',
    'WindowAttention',
]
