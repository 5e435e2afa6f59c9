import gc
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')  # tests run side by side; their tensors are small
os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # deterministic algorithms ask for it on a GPU

import pytest
import torch

if not torch.cuda.is_available():
    os.environ['TRITON_INTERPRET'] = '1'  # before Triton is imported: its kernels then run on CPU tensors

from mmengine.logging import MMLogger
from mmengine.runner import set_random_seed

import mmslide  # noqa: F401
from mmslide.compat import CAN_EXPORT, MODERN

# Compiling and benchmarks need PyTorch 2.6, exporting 2.9.
MODERN_ONLY = ['benchmark', 'graphs', 'triton']
EXPORT_ONLY = ['coreml', 'executorch', 'export', 'export_detector', 'quantization']
left_out = [*(() if MODERN else MODERN_ONLY), *(() if CAN_EXPORT else EXPORT_ONLY)]
collect_ignore = [f'test_{name}.py' for name in left_out]


@pytest.fixture(autouse=True)
def deterministic():
    """Random numbers from one seed, the pipelines' too, and NaN where a test reads memory that nothing has written."""
    set_random_seed(0)
    torch.use_deterministic_algorithms(True)
    if MODERN:
        torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope='module')
def frozen_heap():
    """Data sets of MM packages collect garbage, which takes a second once all packages are imported."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture
def log(caplog):
    """What mmslide tells the user through mmengine's logger."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
