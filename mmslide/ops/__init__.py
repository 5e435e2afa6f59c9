from .slide_attention import slide_attention

__all__ = ['slide_attention']
