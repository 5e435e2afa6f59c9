"""What is exported, as a module from tensors to tensors: a backbone, alone or with its neck, or a whole model."""

from typing import Any

from .base import EXACT, Exportable, ExportableBackbone, ExportableFeatures

PARTS = ('backbone', 'features', 'model')

__all__ = ['EXACT', 'PARTS', 'Exportable', 'ExportableBackbone', 'ExportableFeatures', 'part']


def part(model: Any, name: str, shape: tuple[int, int]) -> Exportable:
    """What is exported of a fused model.

    Args:
        model: a fused detector, segmentor or classifier, see `mmslide.deploy.fuse`.
        name: the 'backbone', its 'features', which are the backbone and the neck, or the whole 'model'.
        shape: height and width of the images.

    Raises:
        ValueError: the model has a part or a setting that cannot be exported.
    """
    if (channels := getattr(model.backbone, 'in_channels', 3)) != 3:
        raise ValueError(f'only models of 3 channels can be exported, got in_channels={channels}')
    if name == 'backbone':
        return ExportableBackbone(model.backbone)
    if name == 'features':
        return ExportableFeatures(model, shape)
    if hasattr(model, 'decode_head'):
        from .segmentor import ExportableSegmentor

        return ExportableSegmentor(model)
    if hasattr(model, 'with_head'):  # of mmpretrain alone
        from .classifier import ExportableClassifier

        return ExportableClassifier(model)
    from .detector import ExportableDetector

    return ExportableDetector(model, shape)
