__version__ = '0.2.0'

# What works with it: from the first version, up to but without the second.
VERSIONS = {
    'torch': ('2.1', '3'),
    'mmengine': ('0.10', '1'),
    'mmcv': ('2.0.0', '3'),
    'mmdet': ('3.1', '4'),
    'mmseg': ('1.0', '2'),
}
REQUIRED = ('torch', 'mmengine', 'mmcv')
DISTRIBUTIONS = {'mmseg': 'mmsegmentation'}
# Imported by classification configs only: it takes seconds.
MMPRETRAIN = ('1.0', '2')


def requirement(name: str, minimum: str, limit: str) -> str:
    """What pip and mim are asked for, in quotes for a shell."""
    return f'"{DISTRIBUTIONS.get(name, name)}>={minimum},<{limit}"'
