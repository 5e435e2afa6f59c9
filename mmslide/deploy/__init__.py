from .checkpoint import fuse_checkpoint, load_model
from .fuse import fuse

__all__ = ['fuse', 'fuse_checkpoint', 'load_model']
