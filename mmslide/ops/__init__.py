from .backends import check_backend
from .merge import fixed_shift, merge_paths
from .neighborhood import neighborhood_attention
from .reference import attention_weights
from .slide_attention import slide_attention

__all__ = [
    'attention_weights',
    'check_backend',
    'fixed_shift',
    'merge_paths',
    'neighborhood_attention',
    'slide_attention',
]
