from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Tolerance for float32.
EXACT = 1e-4


class Exportable(nn.Module):
    """An exportable model: the image (1, 3, H, W) to the named outputs.

    Attributes:
        output_names: of the outputs, in order.
        any_size: whether the graph can accept any size.
        has_operators: whether it has operators that are not in PyTorch, see `mmslide.deploy.graphs.operators`.
        may_differ: share of the compared images whose results may differ in precisions below float32.
    """

    output_names: Sequence[str] = ()
    any_size = True
    has_operators = False
    may_differ = 0.0

    def agreement(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> tuple[bool, str]:
        """Whether a runtime's outputs match PyTorch's, and a description of the difference.

        Args:
            tolerance: the largest max|Δ| / max|PyTorch's| of an output.
        """
        if problem := self.malformed(outputs, wanted):
            return False, problem
        errors = [
            (value - reference).abs().max() / reference.abs().max().clamp(min=1e-12)
            for value, reference in self.compared(outputs, wanted)
        ]
        error = float(torch.stack(errors).max())  # Python's max() ignores a NaN that is not the first
        return error <= tolerance, f'differs from PyTorch by {error:.1e}'

    def malformed(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> str:
        """Why the outputs cannot be correct (shapes or non-finite values); '' if they can."""
        shapes, expected = ([tuple(x.shape) for x in each] for each in (outputs, wanted))
        if shapes != expected:
            return f'shapes are {shapes}, of PyTorch {expected}'
        return '' if all(x.isfinite().all() for x in outputs) else 'has NaN or infinite values'

    def compared(self, outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        """Pairs that must agree, for outputs of the right shapes."""
        return zip(outputs, wanted, strict=True)


class ExportableBackbone(Exportable):
    """The image (1, 3, H, W) to one map (1, C, H', W') per stage.

    Args:
        backbone: a fused backbone of mmslide, see `mmslide.deploy.fuse`.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.output_names = [f'stage{index + 1}' for index in sorted(backbone.out_indices)]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.backbone(image)


class ExportableFeatures(Exportable):
    """The image (1, 3, H, W) to the outputs of the neck, such as the levels of an FPN.

    Raises:
        ValueError: the model has no neck.
    """

    def __init__(self, model: Any, shape: tuple[int, int]) -> None:
        super().__init__()
        if not getattr(model, 'with_neck', False):
            raise ValueError("the model has no neck: export the part 'backbone'")
        self.backbone, self.neck = model.backbone, model.neck
        with torch.no_grad():
            levels = self(torch.zeros(1, 3, *shape))
        self.output_names = [f'level{index + 1}' for index in range(len(levels))]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.neck(self.backbone(image)))
