from mmslide.checkpoints import read_state_dict

from .convert import convert_checkpoint
from .load import load_pretrained

__all__ = ['convert_checkpoint', 'load_pretrained', 'read_state_dict']
