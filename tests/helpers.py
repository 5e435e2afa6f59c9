import io
import json
import runpy
import subprocess
import sys
import zlib
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmslide.build import build_model
from mmslide.compat import CAN_EXPORT, MODERN
from mmslide.files import find_config
from mmslide.weights import load_pretrained

NEEDS_MODERN = pytest.mark.skipif(not MODERN, reason='needs PyTorch 2.6')
NEEDS_EXPORT = pytest.mark.skipif(not CAN_EXPORT, reason='needs PyTorch 2.9')
GOLDEN = Path(__file__).parent / 'golden'
TOOLS = Path(__file__).parents[1] / 'tools'

# Few blocks, since exporting takes time for each: a second one only where blocks alternate.
ARCH = dict(embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), mlp_ratios=2)
ARCH_SR = dict(ARCH, sr_ratios=(8, 4, 2, 1))
BACKBONES = {
    'SlidePVT': dict(type='mmslide.SlidePVT', arch=dict(ARCH_SR, depths=(1, 1, 1, 1))),
    'SlidePVTv2': dict(
        type='mmslide.SlidePVTv2', arch=dict(ARCH_SR, depths=(1, 1, 1, 1), pool_sizes=(7, 0, 0, 7)), slide_stages=(1,)
    ),
    'SlideSwin': dict(type='mmslide.SlideSwin', arch=ARCH),
    'SlideCSWin': dict(
        type='mmslide.SlideCSWin',
        arch=dict(ARCH, depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 4), split_sizes=(1, 2, 7, 7)),
        slide_stages=(0,),
    ),
    'TwinsPCPVT': dict(type='mmslide.TwinsPCPVT', arch=dict(ARCH_SR, depths=(1, 1, 1, 1))),
    'TwinsSVT': dict(type='mmslide.TwinsSVT', arch=ARCH_SR, slide_stages=(0, 1)),
    'SlideNAT': dict(type='mmslide.SlideNAT', arch=dict(ARCH, depths=(1, 1, 1, 1)), slide_stages=(0,)),
}


# Float32 up to opset 20 without control flow, in the lists of TensorRT 10.15 (docs/operators.md) and ONNX Runtime's
# CUDA provider (docs/OperatorKernels.md).
GPU_OPERATORS = """Add And ArgMax AveragePool Cast Clip Concat ConstantOfShape Conv ConvTranspose Div Equal Exp Expand
    Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool Greater GreaterOrEqual GridSample Identity
    InstanceNormalization IsNaN LayerNormalization Less LessOrEqual Log MatMul Max MaxPool Min Mod Mul Neg Not Pad Pow
    Range ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape Resize RoiAlign Shape Sigmoid Slice Softmax Split Sqrt
    Squeeze Sub Tile TopK Transpose Unsqueeze Where"""
# TensorRT has it; ONNX Runtime runs it on the CPU.
GPU_EXCEPTIONS = {'NonMaxSuppression'}


def run(*command: object, check: bool = True, **kwargs: Any) -> Any:
    """A process's output, which must end well; without check its exit status and its output."""
    result = subprocess.run([str(x) for x in command], capture_output=True, text=True, timeout=600, **kwargs)
    output = result.stdout + result.stderr
    assert not check or result.returncode == 0, output[-6000:]
    return output if check else (result.returncode, output)


def tool(name: str, *arguments: object, **kwargs: Any) -> Any:
    """`run` with a script of tools/."""
    return run(sys.executable, TOOLS / f'{name}.py', *arguments, **kwargs)


def assert_gpu_operators(model: Any) -> None:
    """Whether TensorRT and ONNX Runtime's CUDA provider know the operators of an ONNX model, by their lists."""
    assert [(x.domain, x.version <= 20) for x in model.opset_import] == [('', True)]
    assert not model.functions
    unknown = {node.op_type for node in model.graph.node} - {*GPU_OPERATORS.split(), *GPU_EXCEPTIONS}
    assert not unknown, unknown
    # TensorRT asks for initializers here.
    constants = {x.name for x in model.graph.initializer}
    reduced = [node.input[1:] for node in model.graph.node if node.op_type.startswith('Reduce')]
    variable = {name for names in reduced for name in names} - constants
    assert not variable, variable


def relative_error(value: Tensor, reference: Tensor) -> float:
    """max|Δ| / max|reference|, in float64 on the CPU."""
    assert value.shape == reference.shape
    value, reference = value.detach().cpu().double(), reference.detach().cpu().double()
    scale = reference.abs().max()
    difference = (value - reference).abs().max()
    assert torch.isfinite(difference)
    return float(difference / scale) if scale else float(difference)


def randomize(model: nn.Module) -> nn.Module:
    """Every parameter drawn, so that no term hides behind an initial zero or one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if name.endswith('bias') or 'relative_position' in name or 'position_embedding' in name:
                parameter.copy_(0.1 * draw)
            elif parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * draw)
            else:
                parameter.copy_(draw / parameter[0].numel() ** 0.5)
    return model


def random_model(name: str, folder: Path, num_classes: int = 0, **model: Any) -> tuple[Path, Path]:
    """A config with changes to its model, and a checkpoint of random weights for it that names its classes."""
    config, checkpoint = folder / name, folder / 'random.pth'
    config.write_text(f'_base_ = {str(find_config(name))!r}\nmodel = {model}\n')
    classes = [f'class {label}' for label in range(num_classes)]
    meta = dict(dataset_meta=dict(classes=classes, palette=[[label, 0, 0] for label in range(num_classes)]))
    state = randomize(build_model(Config.fromfile(config))).state_dict()
    torch.save(dict(meta=meta if classes else {}, state_dict=state), checkpoint)
    return config, checkpoint


def golden_state(name: str) -> dict[str, Tensor]:
    """The authors' state dict that the golden file's outputs were computed with, drawn from the keys' names."""
    state = {}
    for key, shape in json.loads((GOLDEN / f'{name}.keys.json').read_text()).items():
        if key.endswith(('relative_position_index', 'attn_mask')):
            continue
        if key.endswith('dep_conv.weight'):
            kernel_size = shape[-1]
            slots = kernel_size**2
            state[key] = torch.eye(slots).repeat(shape[0] // slots, 1).view(shape)
            continue
        draw = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
        if key.rsplit('.', 1)[-1] == 'bias':
            draw = 0.1 * draw
        elif 'relative_position_bias_table' in key:
            draw = 0.2 * draw
        elif len(shape) == 1:
            draw = 1 + 0.1 * draw
        else:
            draw = draw / np.prod(shape[1:]) ** 0.5
        state[key] = torch.from_numpy(draw.astype(np.float32))
    return state


def golden_image(name: str) -> Tensor:
    """The input that the golden file's outputs were computed from."""
    meta = json.loads(str(np.load(GOLDEN / f'{name}.npz')['meta']))
    image = np.random.default_rng(meta['image_seed']).standard_normal(meta['image_shape'])
    return torch.from_numpy(image.astype(np.float32))


def assert_golden(name: str, outs: Sequence[Tensor]) -> None:
    """Compares the map of each stage with the authors' numbers."""
    golden = np.load(GOLDEN / f'{name}.npz')
    assert f'stage{len(outs)}_shape' in golden
    assert f'stage{len(outs) + 1}_shape' not in golden
    for stage, out in enumerate(outs, 1):
        assert list(out.shape) == golden[f'stage{stage}_shape'].tolist()
        _, channels, height, width = out.shape
        part = out[:, :: max(1, channels // 16), :: max(1, height // 8), :: max(1, width // 8)]
        assert relative_error(part, torch.from_numpy(golden[f'stage{stage}_slice'])) < 1e-4
        assert abs(out.double().mean() - golden[f'stage{stage}_mean']) < 1e-4 * golden[f'stage{stage}_std']
        assert abs(out.double().std(correction=0) / golden[f'stage{stage}_std'] - 1) < 1e-4


def assert_golden_logits(name: str, last: Tensor, eps: float) -> None:
    """The authors' classifier on the map of the last stage: norm, mean over the pixels, linear."""
    state = golden_state(name)
    x = nn.functional.layer_norm(last.flatten(2).mT, last.shape[1:2], state['norm.weight'], state['norm.bias'], eps)
    logits = nn.functional.linear(x.mean(1), state['head.weight'], state['head.bias'])
    assert relative_error(logits, golden_logits(name)) < 1e-4


def golden_logits(name: str) -> Tensor:
    return torch.from_numpy(np.load(GOLDEN / f'{name}.npz')['logits'])


def load_host(model: nn.Module, host: nn.Module, folder: Path) -> nn.Module:
    """Our host, started from the randomised weights of another implementation."""
    randomize(host).eval()
    torch.save(host.state_dict(), folder / 'host.pth')
    load_pretrained(model, str(folder / 'host.pth'))
    return model.eval()


def tool_error(name: str, *arguments: object) -> str:
    """The one message of a script of tools/ that ends with exit status 2, run in this process to save its imports."""
    stderr = io.StringIO()
    argv = [f'{name}.py', *map(str, arguments)]
    with mock.patch.object(sys, 'argv', argv), redirect_stderr(stderr), pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOLS / f'{name}.py'), run_name='__main__')
    assert end.value.code == 2
    text = stderr.getvalue()
    assert text.startswith('error: '), text
    return text.removeprefix('error: ').strip()
