"""torch.export's own archive: plain PyTorch operators, which PyTorch loads without mmslide (but detectors)."""

import json
from pathlib import Path
from zipfile import is_zipfile

import numpy as np

from .base import Runner, Target, Traced, require

FILE = 'mmslide.json'


class TorchExport(Target):
    suffix = '.pt2'
    runtime = 'torch.export'
    extra = 'torch'
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
            # Its guards ask for twice the least side, for which it was traced; the graph is right from that side on.
            module = torch.export.load(path, extra_files=files).module(check_guards=False)
        except Exception as error:  # of many kinds
            raise RuntimeError(f'torch.export cannot load {path}: {str(error).splitlines()[0]}') from error
        metadata = json.loads(files[FILE] or '{}')
        if threads:
            torch.set_num_threads(threads)

        def run(image: np.ndarray) -> dict[str, np.ndarray]:
            with torch.no_grad():
                outputs = module(torch.from_numpy(image))
            return {name: x.numpy() for name, x in zip(metadata['outputs'], outputs, strict=True)}

        return Runner(run, metadata)
