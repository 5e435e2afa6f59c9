from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Exportable


class ExportableSegmentor(Exportable):
    """An exportable segmentor: the image (1, 3, H, W) to logits (1, classes, H, W) and labels (1, H, W) in int64.

    Both have the size of the image; the logits are resized as in `EncoderDecoder.predict` for whole images.

    Raises:
        ValueError: the segmentor or its head has custom prediction code, such as CascadeEncoderDecoder or
            Mask2FormerHead; it uses sliding-window inference, or has a single channel for two classes.
    """

    output_names = ('logits', 'labels')

    def __init__(self, segmentor: Any) -> None:
        from mmseg.models import EncoderDecoder
        from mmseg.models.decode_heads.decode_head import BaseDecodeHead

        super().__init__()
        if type(segmentor) is not EncoderDecoder:
            raise ValueError(f'only segmentors of type EncoderDecoder can be exported, got {type(segmentor).__name__}')
        head = type(segmentor.decode_head)
        if (head.predict, head.predict_by_feat) != (BaseDecodeHead.predict, BaseDecodeHead.predict_by_feat):
            raise ValueError(f"only decode heads with BaseDecodeHead's predict can be exported, got {head.__name__}")
        mode = segmentor.test_cfg.get('mode', 'whole')
        if mode != 'whole':
            raise ValueError(f"only segmentors that test whole images can be exported, got test_cfg.mode='{mode}'")
        if segmentor.out_channels < 2:
            raise ValueError('only segmentors with a channel for each class can be exported, got out_channels=1')
        self.segmentor: Any = segmentor
        make_sizes_symbolic(segmentor.decode_head)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.segmentor.decode_head(self.segmentor.extract_feat(image))
        size = image.shape[2:]
        logits = F.interpolate(logits, size=size, mode='bilinear', align_corners=self.segmentor.align_corners)
        return logits, logits.argmax(1)

    def compared(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        """The logits, and for each pixel PyTorch's logits of both labels: if two classes tie, either is correct."""
        (logits, labels), (reference, expected) = outputs, wanted
        yield logits, reference
        yield reference.gather(1, labels[:, None]), reference.gather(1, expected[:, None])


class AdaptiveAverage(nn.Module):
    """nn.AdaptiveAvgPool2d as two averaging matrices computed from the map's shape, so it is correct at any size."""

    def __init__(self, output_size: Any) -> None:
        super().__init__()
        self.output_size = (output_size,) * 2 if isinstance(output_size, int) else output_size

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self._average(side, out, x) for side, out in zip(x.shape[2:], self.output_size, strict=True))
        return rows @ x @ columns.t()

    @staticmethod
    def _average(side: int, out: int, x: Tensor) -> Tensor:
        """(out, side): row i is the mean of the pixels from ⌊i · side / out⌋ to ⌈(i + 1) · side / out⌉ - 1."""
        index = torch.arange(out, device=x.device)[:, None]
        first, last = index * side // out, ((index + 1) * side + out - 1) // out
        pixel = torch.arange(side, device=x.device)
        return ((pixel >= first) & (pixel < last)).to(x.dtype) / (last - first).to(x.dtype)


class Enlarge(nn.Module):
    """mmseg's Upsample by an integer factor, which in mmseg makes the size a constant."""

    def __init__(self, factor: int, mode: str, align_corners: bool | None) -> None:
        super().__init__()
        self.factor, self.mode, self.align_corners = factor, mode, align_corners

    def forward(self, x: Tensor) -> Tensor:
        size = [self.factor * side for side in x.shape[2:]]
        return F.interpolate(x, size=size, mode=self.mode, align_corners=self.align_corners)


def make_sizes_symbolic(model: nn.Module) -> None:
    """Replaces, in place, modules that would be exported only for the traced size."""
    from mmseg.models.utils import Upsample

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d):
                setattr(module, name, AdaptiveAverage(child.output_size))
            elif isinstance(child, Upsample) and not child.size and float(child.scale_factor).is_integer():
                setattr(module, name, Enlarge(int(child.scale_factor), child.mode, child.align_corners))
