"""OpenVINO IR, converted from the ONNX graph."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from .base import INT8, Runner, Target, Traced, parse_metadata, require
from .onnx import layers, to_onnx

KEY = 'mmslide'


class OpenVino(Target):
    suffix = '.xml'
    runtime = 'openvino'
    install = "'mmslide[openvino]'"
    write_packages = ('openvino', 'onnx', 'onnxscript')
    run_packages = ('openvino',)
    int8_packages = ('nncf',)
    int8_install = "'mmslide[int8]'"
    precisions: ClassVar = {'fp32': 1e-4, 'fp16': 2e-2, 'int8': INT8}
    runtime_precisions: ClassVar = {'bf16': 1e-1}
    any_size = True
    takes_detectors = True

    def companions(self, path: Path) -> list[Path]:
        return [path.with_suffix('.bin')]

    def write(self, traced: Traced, path: Path) -> None:
        import openvino

        proto = to_onnx(traced).model_proto
        model = openvino.Core().read_model(proto.SerializeToString())
        if traced.precision == 'int8':
            model = quantize(model, layers(proto), traced)
        model.set_rt_info(json.dumps(traced.metadata), KEY)
        openvino.save_model(model, path, compress_to_fp16=traced.precision == 'fp16')

    def load(self, path: Path, threads: int | None = None, precision: str | None = None) -> Runner:
        require(self, self.run_packages)
        import openvino

        with path.open('rb') as file:
            if file.read(5) != b'<?xml':  # otherwise, its frontends for all other formats would try and log errors
                raise RuntimeError(f'openvino cannot load {path}: it is not an IR')
        core = openvino.Core()
        settings: dict[str, Any] = {'INFERENCE_PRECISION_HINT': precision or 'f32'}
        if threads:
            settings['INFERENCE_NUM_THREADS'] = threads
        try:
            model = core.read_model(path)
            compiled = core.compile_model(model, 'CPU', settings)
        except RuntimeError as error:
            raise RuntimeError(f'openvino cannot load {path}: {str(error).strip().splitlines()[-1]}') from error
        names = [output.any_name for output in compiled.outputs]
        text = model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else ''
        return Runner(
            lambda image: dict(zip(names, map(_copy, compiled(image).values()), strict=True)),
            parse_metadata(text, path),
        )

    def available_precisions(self) -> Mapping[str, float]:
        import openvino

        known = openvino.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES')
        return {name: bound for name, bound in self.runtime_precisions.items() if name.upper() in known}


def quantize(model: Any, layers: Sequence[str], traced: Traced) -> Any:
    """The model with these operations in int8 and all others in float32."""
    import nncf
    from nncf.quantization.advanced_parameters import OverflowFix

    nncf.set_log_level(logging.ERROR)  # it would list every operation that is not quantized
    # An ONNX Conv with a bias becomes two operations here.
    names = {name for layer in layers for name in (layer, f'{layer}/WithoutBiases')}
    others = {operation.get_friendly_name() for operation in model.get_ops()} - names
    return nncf.quantize(
        model,
        nncf.Dataset(traced.calibration),
        subset_size=len(traced.calibration),
        model_type=nncf.ModelType.TRANSFORMER,
        # 7-bit weights, as in ONNX: without VNNI, the sum of two 8-bit products saturates.
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=OverflowFix.ENABLE),
        ignored_scope=nncf.IgnoredScope(sorted(others), validate=False),
    )


def _copy(output: Any) -> Any:
    """A copy, since OpenVINO's arrays are views of memory that the next run overwrites."""
    return output.copy()
