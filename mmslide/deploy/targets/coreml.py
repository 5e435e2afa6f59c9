"""Core ML packages (ML programs), for iOS 16 and macOS 13 or later.

An app passes an image: the mean and standard deviation are part of the model.
"""

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .base import Runner, Target, Traced, parse_metadata, require
from .images import to_pixels

KEY = 'mmslide'
# Instead of -inf in masks, as in Apple's own transformers for the Neural Engine: in float16, infinities become NaN.
LOWEST = -1e4


class CoreMl(Target):
    suffix = '.mlpackage'
    runtime = 'Core ML'
    install = "'mmslide[coreml]'"
    write_packages = ('coremltools', 'torch')
    run_packages = ('coremltools', 'PIL')
    precisions: ClassVar = {'fp16': 5e-2, 'fp32': 1e-4}
    takes_pixels = True
    is_folder = True

    def write(self, traced: Traced, path: Path) -> None:
        import coremltools

        about = traced.metadata
        layout = coremltools.colorlayout.RGB if about['bgr_to_rgb'] else coremltools.colorlayout.BGR
        precision = coremltools.precision.FLOAT16 if traced.precision == 'fp16' else coremltools.precision.FLOAT32
        converted = coremltools.convert(
            from_pixels(traced),
            inputs=[coremltools.ImageType('image', (1, 3, *about['shape']), color_layout=layout)],
            compute_precision=precision,
            minimum_deployment_target=coremltools.target.iOS16,
            skip_model_load=True,
        )
        spec = converted.get_spec()
        for output, name in zip(list(spec.description.output), about['outputs'], strict=True):
            coremltools.utils.rename_feature(spec, output.name, name, rename_inputs=False)
        model = coremltools.models.MLModel(spec, weights_dir=converted.weights_dir, skip_model_load=True)
        model.user_defined_metadata[KEY] = json.dumps(about)
        model.save(str(path))

    def load(self, path: Path, threads: int | None = None, precision: str | None = None) -> Runner:
        require(self, self.run_packages)
        if reason := self.why_not_run():
            raise RuntimeError(f'{path} cannot be run here, since {reason}')
        import coremltools
        from PIL import Image

        try:
            # The GPU compiler aborts the process on some graphs, so the export would end without a message.
            units = coremltools.ComputeUnit.CPU_AND_NE
            model = coremltools.models.MLModel(str(path), compute_units=units)
        except Exception as error:  # of many kinds
            raise RuntimeError(f'Core ML cannot load {path}: {str(error).splitlines()[0]}') from error
        about = parse_metadata(model.user_defined_metadata.get(KEY, ''), path)

        def run(image: np.ndarray) -> dict[str, np.ndarray]:
            pixels = to_pixels(image, about)
            rgb = pixels if about['bgr_to_rgb'] else pixels[..., ::-1]
            try:
                found = model.predict({'image': Image.fromarray(np.ascontiguousarray(rgb))})
            except Exception as error:  # of many kinds, including loading errors
                raise RuntimeError(f'Core ML cannot run {path}: {str(error).splitlines()[0]}') from error
            return {name: _widened(found[name]) for name in about['outputs']}

        return Runner(run, about)

    def why_not_run(self) -> str | None:
        return super().why_not_run() if sys.platform == 'darwin' else 'Core ML runs on macOS only'


def from_pixels(traced: Traced) -> Any:
    """The program preceded by the normalization, as a torch.export.ExportedProgram for coremltools."""
    import torch

    about, module = traced.metadata, traced.program.module()
    mean, std = (torch.tensor(about[name], dtype=torch.float32).view(3, 1, 1) for name in ('mean', 'std'))

    class FromPixels(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, image: Any) -> Any:
            return self.module((image - mean) / std)

    with torch.no_grad():
        exported = torch.export.export(FromPixels(), (torch.zeros(1, 3, *about['shape']),))
        # With the default decompositions, a linear layer would become five nodes, and attention would be guarded
        # against fully masked rows.
        program = exported.run_decompositions({})
        for tensors in (program.state_dict, program.constants):
            for name, x in tensors.items():
                if x.is_floating_point() and x.isinf().any():
                    tensors[name] = x.clamp(min=LOWEST)
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.alias.default:  # not supported by coremltools
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    return program


def _widened(output: np.ndarray) -> np.ndarray:
    """Converts float16 or int32 to PyTorch's types, float32 or int64."""
    return output.astype(np.float32 if output.dtype.kind == 'f' else np.int64)
