"""torch.export archives: plain PyTorch operators, which PyTorch loads without mmslide (except detectors)."""

import json
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile, is_zipfile

import numpy as np

from .base import Runner, Target, Traced, parse_metadata, require

FILE = 'mmslide.json'
# The module of a detector's two operators.
OPERATORS = 'mmslide.deploy.graphs.operators'


class TorchExport(Target):
    suffix = '.pt2'
    runtime = 'torch.export'
    install = 'torch'
    write_packages = ('torch',)
    run_packages = ('torch',)
    any_size = True
    takes_detectors = True

    def write(self, traced: Traced, path: Path) -> None:
        import torch

        torch.export.save(traced.program, path, extra_files={FILE: json.dumps(traced.metadata)})

    def load(self, path: Path, threads: int | None = None, precision: str | None = None) -> Runner:
        require(self, self.run_packages)
        import torch

        if not is_zipfile(path):  # torch would log a traceback
            raise RuntimeError(f'torch.export cannot load {path}: it is not an archive')
        files = {FILE: ''}
        try:
            if _has_operators(path):
                import_module(OPERATORS)
            # Its guards require twice the minimum side, for which it was traced; the graph is correct from the minimum
            # on.
            module = torch.export.load(path, extra_files=files).module(check_guards=False)
        except Exception as error:  # of many kinds
            raise RuntimeError(f'torch.export cannot load {path}: {str(error).splitlines()[0]}') from error
        metadata = parse_metadata(files[FILE], path)
        if threads:
            torch.set_num_threads(threads)

        def run(image: np.ndarray) -> dict[str, np.ndarray]:
            with torch.no_grad():
                outputs = module(torch.from_numpy(image))
            return {name: x.numpy() for name, x in zip(metadata['outputs'], outputs, strict=True)}

        return Runner(run, metadata)


def _has_operators(path: Path) -> bool:
    """Whether the graph calls mmslide's operators, which have to be registered before it is loaded."""
    with ZipFile(path) as archive:
        return any(b'torch.ops.mmslide.' in archive.read(x) for x in archive.namelist() if x.endswith('model.json'))
