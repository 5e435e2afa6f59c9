"""ExecuTorch, for phones and other devices: XNNPACK where possible, ExecuTorch's own kernels for the rest."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .base import Runner, Target, Traced, parse_metadata, require

METHOD = 'mmslide'  # returns the metadata as JSON
MAX_DIMENSIONS = 6  # of XNNPACK's tensors


class ExecuTorch(Target):
    suffix = '.pte'
    runtime = 'executorch'
    install = "'mmslide[executorch]'"
    write_packages = ('executorch',)
    run_packages = ('executorch', 'torch')

    def write(self, traced: Traced, path: Path) -> None:
        lower(traced).to_executorch().save(str(path))

    def load(self, path: Path, threads: int | None = None, precision: str | None = None) -> Runner:
        require(self, self.run_packages)
        import torch
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime

        if threads:
            _unsafe_reset_threadpool(threads)
        try:
            program = Runtime.get().load_program(path)
            forward = program.load_method('forward')
            metadata: Any = {}
            if METHOD in program.method_names:
                (text,) = program.load_method(METHOD).execute([])
                metadata = parse_metadata(text, path)
        except (RuntimeError, KeyError) as error:  # KeyError if there is no such method
            raise RuntimeError(f'executorch cannot load {path}: {str(error).splitlines()[0]}') from error

        def run(image: np.ndarray) -> dict[str, np.ndarray]:
            outputs = forward.execute([torch.from_numpy(image)])
            return {name: x.numpy() for name, x in zip(metadata['outputs'], outputs, strict=True)}

        return Runner(run, metadata)


def lower(traced: Traced) -> Any:
    """An executorch.exir.EdgeProgramManager; operators that XNNPACK does not support stay in its graph."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    class Partitioner(XnnpackPartitioner):
        """Excludes tensors with more dimensions than XNNPACK supports, which would fail when the file is loaded."""

        def get_matched_nodes_from_configs(self, program: Any) -> list[Any]:
            matches = super().get_matched_nodes_from_configs(program)
            return [match for match in matches if all(map(fits_xnnpack, match))]

    return to_edge_transform_and_lower(
        for_xnnpack(traced.program),
        partitioner=[Partitioner()],
        constant_methods={METHOD: json.dumps(traced.metadata)},
    )


def fits_xnnpack(node: Any) -> bool:
    values = (x.meta['val'] for x in (node, *node.all_input_nodes))
    return all(getattr(value, 'ndim', 0) <= MAX_DIMENSIONS for value in values)


def for_xnnpack(program: Any) -> Any:
    """The program in operators that XNNPACK supports, where PyTorch's own decompositions produce others."""
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    lowered = constant_prop_pass(program.run_decompositions(decompositions()))
    for node in lowered.graph.nodes:
        # The provenance of nodes is copied repeatedly, which takes much of the time for lowering.
        node.meta = {key: value for key, value in node.meta.items() if key == 'val'}
    return lowered


def decompositions() -> dict[Any, Callable]:
    import torch
    from torch import Tensor

    aten = torch.ops.aten

    def matmul(x: Tensor, y: Tensor) -> Tensor:
        """PyTorch's decomposition expands the matrix to as many copies as x has pixels."""
        if y.ndim == 1:
            return matmul(x, y[:, None]).squeeze(-1)
        if x.ndim == 2 < y.ndim:
            return matmul(y.mT, x.mT).mT
        if y.ndim == 2:
            return torch.mm(x.reshape(-1, x.shape[-1]), y).view(*x.shape[:-1], y.shape[-1])
        batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        x, y = (z if z.shape[:-2] == batch else z.expand(*batch, *z.shape[-2:]) for z in (x, y))
        product = torch.bmm(x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:]))
        return product.view(*batch, *product.shape[-2:])

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        dropout: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """PyTorch's decomposition checks for rows without a finite number."""
        if is_causal or enable_gqa:
            raise ValueError(f'attention with {is_causal=}, {enable_gqa=} cannot be exported to {ExecuTorch.suffix}')
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -1e30)  # not infinity: a row of infinities gives NaN
        logits = matmul(q * (q.shape[-1] ** -0.5 if scale is None else scale), k.mT)
        return matmul((logits if mask is None else logits + mask).softmax(-1), v)

    def unbind(x: Tensor, dim: int = 0) -> list[Tensor]:
        shape = [side for axis, side in enumerate(x.shape) if axis != dim % x.ndim]
        return [x.narrow(dim, index, 1).reshape(shape) for index in range(x.shape[dim])]

    def split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
        return [x.narrow(dim, start, min(size, x.shape[dim] - start)) for start in range(0, x.shape[dim], size)]

    def roll(x: Tensor, shifts: list[int], dims: list[int]) -> Tensor:
        for shift, dim in zip(shifts, dims, strict=True):
            side = x.shape[dim]
            if first := -shift % side:
                x = torch.cat([x.narrow(dim, first, side - first), x.narrow(dim, 0, first)], dim)
        return x

    def pad(x: Tensor, pads: list[int], mode: str = 'constant', value: float | None = None) -> Tensor:
        """Converts negative padding to slices."""
        if mode != 'constant':
            return aten._pad_enum.default(x, pads, ('reflect', 'replicate', 'circular').index(mode), value)
        for axis, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True), 1):
            start = max(0, -before)
            if start or after < 0:
                x = x.narrow(-axis, start, x.shape[-axis] - start - max(0, -after))
        positive = [max(0, side) for side in pads]
        return torch.constant_pad_nd(x, positive, value or 0) if any(positive) else x

    return {
        aten.matmul.default: matmul,
        aten.scaled_dot_product_attention.default: attention,
        aten.unbind.int: unbind,
        aten.split.Tensor: split,
        aten.roll.default: roll,
        aten.pad.default: pad,
        aten.alias.default: lambda x: x,
    }
