from .slide_pvt import SlidePVT
from .slide_swin import SlideSwin

__all__ = ['SlidePVT', 'SlideSwin']
