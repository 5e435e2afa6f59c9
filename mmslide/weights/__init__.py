from .load import load_pretrained, read_state_dict

__all__ = ['load_pretrained', 'read_state_dict']
