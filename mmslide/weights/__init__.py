from mmslide.checkpoints import read_state_dict

from .convert import convert_checkpoint
from .load import is_pretrained, load_pretrained

__all__ = ['convert_checkpoint', 'is_pretrained', 'load_pretrained', 'read_state_dict']
