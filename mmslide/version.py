__version__ = '0.2.0'

# Supported versions: from the first (inclusive) to the second (exclusive).
VERSIONS = {
    'torch': ('2.1', '3'),
    'mmengine': ('0.10', '1'),
    'mmcv': ('2.0.0', '3'),
    'mmdet': ('3.1', '4'),
    'mmseg': ('1.0', '2'),
}
REQUIRED = ('torch', 'mmengine', 'mmcv')
DISTRIBUTIONS = {'mmseg': 'mmsegmentation'}
# Only imported for classification configs: importing it takes seconds.
MMPRETRAIN = ('1.0', '2')


def requirement(name: str, minimum: str, limit: str) -> str:
    """The requirement for pip and mim, quoted for a shell."""
    return f'"{DISTRIBUTIONS.get(name, name)}>={minimum},<{limit}"'
