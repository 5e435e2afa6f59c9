"""The program of a Core ML package, run by PyTorch: Core ML itself is on macOS only.

Written from the documentation of MIL's operators, for those that our models are converted to. Every operator computes
in the precision of its inputs.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from coremltools.converters.mil.frontend.milproto.load import load
from coremltools.converters.mil.mil.types import builtin_to_string
from coremltools.models import MLModel
from torch import Tensor

DTYPES = {'fp16': torch.float16, 'fp32': torch.float32, 'int32': torch.int32}


def operations(model: MLModel) -> list[Any]:
    """Of the program in a package, without its constants."""
    return [op for op in _program(model) if op.op_type != 'const']


def constants(model: MLModel) -> list[np.ndarray]:
    """The arrays of floating-point numbers among them."""
    values = [op.outputs[0].val for op in _program(model) if op.op_type == 'const']
    return [value for value in values if isinstance(value, np.ndarray) and value.dtype.kind == 'f']


def type_of(var: Any) -> str:
    return builtin_to_string(var.dtype)


def _program(model: MLModel) -> list[Any]:
    spec = model.get_spec()
    program = load(spec, spec.specificationVersion, model.weights_dir)
    assert list(program.functions) == ['main']
    return list(program.functions['main'].operations)


def predict(model: MLModel, data: dict[str, Any]) -> dict[str, np.ndarray]:
    """What `MLModel.predict` does with an image of Pillow's."""
    spec = model.get_spec()
    (description,) = spec.description.input
    image = description.type.imageType
    pixels = np.asarray(data[description.name])
    assert data[description.name].mode == 'RGB'
    assert pixels.shape == (image.height, image.width, 3)
    if image.colorSpace == image.BGR:
        pixels = pixels[..., ::-1]
    values = {description.name: torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None]}

    def value(var: Any) -> Any:
        if isinstance(var, list | tuple):
            return [value(x) for x in var]
        if var.val is None:
            return values[var.name]
        is_tensor = isinstance(var.val, np.ndarray) and var.val.dtype.kind == 'f'
        return torch.from_numpy(var.val.copy()) if is_tensor else var.val

    for op in operations(model):
        given = {name: value(var) for name, var in op.inputs.items() if var is not None}
        outputs = OPERATORS[op.op_type](**given)
        outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
        for var, output in zip(op.outputs, outputs, strict=True):
            assert tuple(output.shape) == var.shape, op
            values[var.name] = output
    return {output.name: values[output.name].numpy() for output in spec.description.output}


def matmul(x: Tensor, y: Tensor, transpose_x: bool = False, transpose_y: bool = False) -> Tensor:
    return (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)


def conv(
    x: Any, weight: Any, strides: Any, pad_type: str, pad: Any, dilations: Any, groups: int, bias: Any = None
) -> Any:
    assert pad_type in ('valid', 'custom')
    if pad_type == 'custom':
        top, bottom, left, right = pad.tolist()
        x = F.pad(x, (left, right, top, bottom))
    return F.conv2d(x, weight, bias, strides.tolist(), 0, dilations.tolist(), int(groups))


def layer_norm(x: Tensor, axes: Any, gamma: Tensor, beta: Tensor, epsilon: float) -> Tensor:
    assert axes.tolist() in ([-1], [x.ndim - 1])
    return F.layer_norm(x, x.shape[-1:], gamma, beta, float(epsilon))


def batch_norm(x: Tensor, mean: Tensor, variance: Tensor, gamma: Tensor, beta: Tensor, epsilon: float) -> Tensor:
    return F.batch_norm(x, mean, variance, gamma, beta, eps=float(epsilon))


def gelu(x: Tensor, mode: str) -> Tensor:
    assert mode == 'EXACT'
    return F.gelu(x)


def pad(x: Tensor, pad: Any, mode: str = 'constant', constant_val: float = 0.0) -> Tensor:
    """The numbers are pairs for the last axes, the first of these first."""
    pairs = pad.reshape(-1, 2)[::-1]
    return F.pad(x, pairs.flatten().tolist(), str(mode), float(constant_val))


def slice_by_index(
    x: Tensor, begin: Any, end: Any, begin_mask: Any = None, end_mask: Any = None, squeeze_mask: Any = None
) -> Tensor:
    masks = [np.zeros(x.ndim, bool) if mask is None else mask for mask in (begin_mask, end_mask, squeeze_mask)]
    slices = []
    for first, last, from_start, to_end, one in zip(begin, end, *masks, strict=True):
        slices.append(int(first) if one else slice(None if from_start else first, None if to_end else last))
    return x[tuple(slices)]


def upsample_bilinear(x: Tensor, scale_factor_height: Any, scale_factor_width: Any, align_corners: Any) -> Tensor:
    factors = [float(scale_factor_height), float(scale_factor_width)]
    return F.interpolate(x, scale_factor=factors, mode='bilinear', align_corners=bool(align_corners))


OPERATORS: dict[str, Callable] = {
    'add': lambda x, y: x + y,
    'sub': lambda x, y: x - y,
    'mul': lambda x, y: x * y,
    'real_div': lambda x, y: x / y,
    'matmul': matmul,
    'linear': lambda x, weight, bias=None: F.linear(x, weight, bias),
    'conv': conv,
    'layer_norm': layer_norm,
    'batch_norm': batch_norm,
    'softmax': lambda x, axis: x.softmax(int(axis)),
    'gelu': gelu,
    'relu': lambda x: x.relu(),
    'reshape': lambda x, shape: x.reshape(shape.tolist()),
    'transpose': lambda x, perm: x.permute(perm.tolist()),
    'squeeze': lambda x, axes: x.squeeze(axes.tolist()),
    'slice_by_index': slice_by_index,
    'pad': pad,
    'split': lambda x, axis, split_sizes: x.split(split_sizes.tolist(), int(axis)),
    'concat': lambda values, axis, interleave=False: torch.cat(values, int(axis)),
    'gather': lambda x, indices, axis, batch_dims=0: x.index_select(int(axis), torch.from_numpy(indices)),
    'cast': lambda x, dtype: x.to(DTYPES[dtype]),
    'reduce_sum': lambda x, axes, keep_dims: x.sum(axes.tolist(), keepdim=bool(keep_dims)),
    'reduce_mean': lambda x, axes, keep_dims: x.mean(axes.tolist(), keepdim=bool(keep_dims)),
    'reduce_argmax': lambda x, axis, keep_dims: x.argmax(int(axis), bool(keep_dims)).int(),
    'upsample_bilinear': upsample_bilinear,
}
