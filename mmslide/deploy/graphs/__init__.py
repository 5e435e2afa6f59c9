"""What is exported: a backbone, or a whole classifier, segmentor or detector, as a module from tensors to tensors."""

from typing import Any

from .base import Exportable, ExportableBackbone

PARTS = ('backbone', 'model')

__all__ = ['PARTS', 'Exportable', 'ExportableBackbone', 'part']


def part(model: Any, name: str, shape: tuple[int, int]) -> Exportable:
    """What is exported of a fused model: its 'backbone', or the whole 'model' for images of `shape` (height, width).

    Raises:
        ValueError: the model has a part or a setting that cannot be exported.
    """
    if name == 'backbone':
        return ExportableBackbone(model.backbone)
    if hasattr(model, 'decode_head'):
        from .segmentor import ExportableSegmentor

        return ExportableSegmentor(model)
    if hasattr(model, 'with_head'):  # of mmpretrain alone
        from .classifier import ExportableClassifier

        return ExportableClassifier(model)
    from .detector import ExportableDetector

    return ExportableDetector(model, shape)
