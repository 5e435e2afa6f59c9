"""ONNX, written with torch.onnx, for onnxruntime; standard operators without control flow."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .base import INT8, Runner, Target, Traced, parse_metadata, require


class Onnx(Target):
    suffix = '.onnx'
    runtime = 'onnxruntime'
    install = "'mmslide[onnx]'"
    write_packages = ('onnx', 'onnxscript', 'onnxruntime')
    run_packages = ('onnxruntime',)
    precisions: ClassVar = {'fp32': 1e-4, 'int8': INT8}
    any_size = True
    takes_detectors = True

    def write(self, traced: Traced, path: Path) -> None:
        program = to_onnx(traced)
        if traced.precision == 'int8':
            quantize(program.model_proto, traced, path)
        else:
            program.save(path, external_data=False)

    def load(self, path: Path, threads: int | None = None, precision: str | None = None) -> Runner:
        require(self, self.run_packages)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if threads:
            options.intra_op_num_threads = threads
        try:
            session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
        except Exception as error:  # onnxruntime's errors have no common base class
            raise RuntimeError(f'onnxruntime cannot load {path}: {str(error).splitlines()[0]}') from error
        names = [output.name for output in session.get_outputs()]
        properties = session.get_modelmeta().custom_metadata_map

        def run(image: np.ndarray) -> dict[str, np.ndarray]:
            try:
                return dict(zip(names, session.run(None, {'image': image}), strict=True))
            except Exception as error:
                raise RuntimeError(f'onnxruntime cannot run {path}: {str(error).splitlines()[0]}') from error

        return Runner(run, parse_metadata(properties.get('mmslide', ''), path))


def to_onnx(traced: Traced) -> Any:
    """A torch.onnx.ONNXProgram."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # The math implementation of attention has the memory layout that remains after its decomposition.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        program = torch.onnx.export(
            traced.program,
            dynamo=True,
            input_names=['image'],
            output_names=list(traced.metadata['outputs']),
            custom_translation_table=translations(),
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props['mmslide'] = json.dumps(traced.metadata)
    return program


def layers(model: Any) -> list[str]:
    """The nodes of a ModelProto that compute an nn.Linear or nn.Conv2d, which are quantized to int8.

    Everything else stays in float32: norms, softmax and the products of attention, including Slide Attention's with its
        small kernels.
    """

    def is_linear(node: Any) -> bool:
        origin = next((x.value for x in node.metadata_props if x.key == 'pkg.torch.onnx.fx_node'), '')
        return node.op_type in ('Gemm', 'MatMul') and 'aten.linear' in origin

    return [node.name for node in model.graph.node if node.op_type == 'Conv' or is_linear(node)]


def quantize(model: Any, traced: Traced, path: Path) -> None:
    """Writes a ModelProto, which is modified, with its layers in int8."""
    from onnxruntime import quantization

    class Images(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = ({'image': image} for image in traced.calibration)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    # Otherwise onnxruntime advises shape inference and optimization, which torch.onnx has already done.
    quantization.quant_utils.add_pre_process_metadata(model)
    quantization.quantize_static(
        model,
        path,
        Images(),
        op_types_to_quantize=['Conv', 'Gemm', 'MatMul'],
        nodes_to_quantize=layers(model),
        per_channel=True,
        reduce_range=True,  # 7-bit weights: without VNNI, the sum of two 8-bit products saturates
        activation_type=quantization.QuantType.QUInt8,
    )


def translations() -> dict[Callable, Callable]:
    """The operators of `mmslide.deploy.graphs.operators` as ONNX's own."""
    import onnxscript
    import torch

    op: Any = onnxscript.opset18  # its type hints do not allow numbers for tensors

    def nms(boxes: Any, scores: Any, iou_threshold: float, max_num: int) -> Any:
        selected = op.NonMaxSuppression(
            op.Unsqueeze(boxes, [0]),
            op.Unsqueeze(scores, [0, 1]),
            op.Constant(value_ints=[max_num]),
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[-0.5]),  # between valid and invalid scores: runtimes differ at equality
        )  # (M, 3), M <= max_num: image, class, box
        found = op.Gather(selected, op.Constant(value_int=2), axis=1)
        padded = op.Concat(found, op.Constant(value_ints=[-1] * max_num), axis=0)
        return op.Reshape(op.Slice(padded, [0], [max_num], [0]), [max_num])  # with Slice alone, the length is unknown

    def roi_align(feature: Any, boxes: Any, output_size: Any, spatial_scale: float, sampling_ratio: int) -> Any:
        height, width = output_size
        return op.RoiAlign(
            feature,
            boxes,
            op.Constant(value_ints=[0] * boxes.shape[0]),
            coordinate_transformation_mode='half_pixel',
            mode='avg',
            output_height=height,
            output_width=width,
            sampling_ratio=sampling_ratio,
            spatial_scale=spatial_scale,
        )

    operators = torch.ops.mmslide
    table: dict[Callable, Callable] = {}
    for name, function in (('nms', nms), ('roi_align', roi_align)):
        if hasattr(operators, name):  # only once a detector is exported
            table[getattr(operators, name).default] = function
    return table
