"""OpenVINO IR, converted from the ONNX graph."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from .base import Runner, Target, Traced, require
from .onnx import to_onnx

KEY = 'mmslide'


class OpenVino(Target):
    suffix = '.xml'
    runtime = 'openvino'
    extra = 'openvino'
    write_packages = ('openvino', 'onnx', 'onnxscript')
    run_packages = ('openvino',)
    precisions: ClassVar = {'fp32': 1e-4, 'fp16': 2e-2}
    runtime_precisions: ClassVar = {'bf16': 1e-1}
    any_size = True
    takes_detectors = True

    def companions(self, path: Path) -> list[Path]:
        return [path.with_suffix('.bin')]

    def write(self, traced: Traced, path: Path) -> None:
        import openvino

        model = self.to_model(traced)
        model.set_rt_info(json.dumps(traced.metadata), KEY)
        openvino.save_model(model, path, compress_to_fp16=traced.precision == 'fp16')

    @staticmethod
    def to_model(traced: Traced) -> Any:
        import openvino

        return openvino.Core().read_model(to_onnx(traced).model_proto.SerializeToString())

    def load(self, path: Path, threads: int | None = None, precision: str | None = None) -> Runner:
        require(self, self.run_packages)
        import openvino

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
        text = model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else '{}'
        return Runner(
            lambda image: dict(zip(names, map(_copy, compiled(image).values()), strict=True)), json.loads(text)
        )

    def available_precisions(self) -> Mapping[str, float]:
        import openvino

        known = openvino.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES')
        return {name: bound for name, bound in self.runtime_precisions.items() if name.upper() in known}


def _copy(output: Any) -> Any:
    """OpenVINO's arrays are views of memory that the next run overwrites."""
    return output.copy()
