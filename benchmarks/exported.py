"""The fused graph compared with the two-path graph, both in onnxruntime."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from mmslide.models.attention import SlideAttention
from mmslide.models.layers import Block
from mmslide.models.mlp import MLP

from .baselines import TwoPathAttention
from .measure import Measurement, Side, compare


def compare_exported(
    height: int, width: int, embed_dims: int, num_heads: int, kernel_size: int, mlp_ratio: float, seconds: float
) -> tuple[Measurement, Measurement]:
    """Exports a layer for one map, fused and in its training form, and measures both alternately, with PyTorch's number
    of threads.

    Args:
        mlp_ratio: of a complete transformer block; 0 for only Slide Attention with its projections.

    Raises:
        RuntimeError: the results disagree.
    """
    x = torch.randn(1, height, width, embed_dims, generator=torch.Generator().manual_seed(0))
    attentions = [cls(embed_dims, num_heads, kernel_size) for cls in (SlideAttention, TwoPathAttention)]
    layers = [_layer(attention, mlp_ratio) for attention in attentions]
    with torch.no_grad():
        for parameter in layers[0].parameters():
            parameter.normal_(std=0.1)
    layers[1].load_state_dict(layers[0].state_dict())
    attentions[0].switch_to_deploy()
    attentions[0].backend = 'unrolled'
    fused, two_path = (
        _in_onnxruntime(name, layer, x) for name, layer in zip(('fused', 'two-path'), layers, strict=True)
    )
    return compare(fused, two_path, training=False, tolerance=1e-4, seconds=seconds)


def _layer(attention: SlideAttention, mlp_ratio: float) -> nn.Module:
    channels = attention.proj.out_features
    if not mlp_ratio:
        return attention.eval()
    return Block(attention, MLP(channels, round(mlp_ratio * channels)), channels).eval()


def _in_onnxruntime(name: str, layer: nn.Module, x: Tensor) -> Side:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / 'layer.onnx'
        program = torch.onnx.export(layer, (x,), dynamo=True, input_names=['x'], verbose=False)
        assert program is not None
        program.save(file)
        session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    return Side(name, lambda: [torch.from_numpy(y) for y in session.run(None, {'x': x.numpy()})], dict(x=x))
