from .merge import fixed_shift, merge_paths
from .slide_attention import slide_attention

__all__ = ['fixed_shift', 'merge_paths', 'slide_attention']
