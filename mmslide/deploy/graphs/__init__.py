"""The exportable parts, as modules from tensors to tensors: a backbone, a backbone with neck, or a whole model."""

from typing import Any

from .base import EXACT, Exportable, ExportableBackbone, ExportableFeatures

PARTS = ('backbone', 'features', 'model')

__all__ = ['EXACT', 'PARTS', 'Exportable', 'ExportableBackbone', 'ExportableFeatures', 'part']


def part(model: Any, name: str, shape: tuple[int, int]) -> Exportable:
    """The exportable part of a fused model.

    Args:
        model: a fused detector, segmentor or classifier, see `mmslide.deploy.fuse`.
        name: 'backbone', 'features' (the backbone and the neck) or 'model' (the whole model).
        shape: height and width of the images.

    Raises:
        ValueError: the model has a part or a setting that cannot be exported.
    """
    if (channels := getattr(model.backbone, 'in_channels', 3)) != 3:
        raise ValueError(f'only models with 3 channels can be exported, got in_channels={channels}')
    if name == 'backbone':
        return ExportableBackbone(model.backbone)
    if name == 'features':
        return ExportableFeatures(model, shape)
    if hasattr(model, 'decode_head'):
        from .segmentor import ExportableSegmentor

        return ExportableSegmentor(model)
    if hasattr(model, 'with_head'):  # only mmpretrain's
        from .classifier import ExportableClassifier

        return ExportableClassifier(model)
    from .detector import ExportableDetector

    return ExportableDetector(model, shape)
