from .convert import convert_checkpoint
from .load import load_pretrained, read_state_dict

__all__ = ['convert_checkpoint', 'load_pretrained', 'read_state_dict']
