from .slide_nat import SlideNAT
from .slide_pvt import SlidePVT
from .slide_swin import SlideSwin
from .twins import TwinsPCPVT, TwinsSVT

__all__ = ['SlideNAT', 'SlidePVT', 'SlideSwin', 'TwinsPCPVT', 'TwinsSVT']
