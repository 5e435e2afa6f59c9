from .slide_cswin import SlideCSWin
from .slide_nat import SlideNAT
from .slide_pvt import SlidePVT
from .slide_pvtv2 import SlidePVTv2
from .slide_swin import SlideSwin
from .twins import TwinsPCPVT, TwinsSVT

__all__ = [
    'SlideCSWin',
    'SlideNAT',
    'SlidePVT',
    'SlidePVTv2',
    'SlideSwin',
    'TwinsPCPVT',
    'TwinsSVT',
]
