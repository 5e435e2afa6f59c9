"""Traces a module to the graph used by all targets."""

from operator import attrgetter
from typing import Any

import torch

from mmslide.compat import CAN_EXPORT

if not CAN_EXPORT:
    raise ImportError(f'export needs PyTorch 2.9 or later, got {torch.__version__}')

import torch.fx.experimental._config
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.node import map_arg
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._sympy.value_ranges import ValueRanges

from mmslide.models.attention import SlideAttention

from .graphs import Exportable

MIN_SIDE = 32
# For dynamic tracing: large and odd, so that no map happens to be square, a multiple of windows or inside one.
DYNAMIC_TRACE = (2003, 2503)
symbolic_shapes_config: Any = torch.fx.experimental._config


def trace(module: Exportable, shape: tuple[int, int], dynamic: bool = False) -> ExportedProgram:
    """The graph of a fused module.

    In it, Slide Attention consists of plain operations, and everything that depends only on parameters is a constant.

    Args:
        module: the module to export, see `mmslide.deploy.graphs.part`.
        shape: height and width of the images (1, 3, H, W).
        dynamic: whether the graph accepts any size of at least 32 pixels per side instead.
    """
    for child in module.modules():
        if isinstance(child, SlideAttention):
            child.backend = 'unrolled'
    # At least twice the minimum side, since PyTorch treats maps with a side of 1 separately; the graph is the same.
    sides = {axis: Dim(side, min=2 * MIN_SIDE) for axis, side in ((2, 'height'), (3, 'width'))}
    settings: dict[str, Any] = dict(
        args=(torch.zeros(1, 3, *(DYNAMIC_TRACE if dynamic else shape)),),
        dynamic_shapes=(sides,) if dynamic else None,
        prefer_deferred_runtime_asserts_over_guards=dynamic,
    )
    # torch.onnx.export alone would silently make a size constant where export reports it. The math implementation of
    # attention has the memory layout that remains after its decomposition.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), symbolic_shapes_config.patch(backed_size_oblivious=True):
        program = torch.export.export(module, **settings)
        if dynamic:
            for symbol, bounds in program.range_constraints.items():
                program.range_constraints[symbol] = ValueRanges(MIN_SIDE, bounds.upper)
            # Assumptions about sizes, some of them wrong, such as sides that are not a multiple of the window.
            for node in program.graph.find_nodes(op='call_function', target=torch.ops.aten._assert_scalar.default):
                program.graph.erase_node(node)
            program.graph.eliminate_dead_code()
            program.graph_module.recompile()
            return program
        simplified: Any = program.run_decompositions({}).module()
        flatten_maps(simplified)
        split_projections(simplified)
        fold_constants(simplified)
        return torch.export.export(simplified, **settings)


def flatten_maps(module: GraphModule) -> None:
    """Adds and normalizes maps (1, H, W, C) as tokens (1, H·W, C), in place.

    Runtimes interpret four dimensions as (N, C, H, W), and order them in memory accordingly.
    """
    aten, graph = torch.ops.aten, module.graph
    tokens = dict[torch.fx.Node, torch.fx.Node]()  # of maps that are computed as tokens
    norms = {
        node
        for node in graph.find_nodes(op='call_function', target=aten.layer_norm.default)
        if node.meta['val'].ndim == 4 and node.args[1] == [node.meta['val'].shape[-1]]
    }
    for node in list(graph.nodes):
        sources = node.all_input_nodes
        if node in norms:
            maps = sources[:1]
        elif (
            node.target is aten.add.Tensor
            and node.meta['val'].ndim == 4
            and all(x.meta['val'].shape == node.meta['val'].shape for x in sources)
            and (any(x in tokens for x in sources) or any(x in norms for x in node.users))
        ):
            maps = sources
        else:
            continue
        with graph.inserting_before(node):
            flat = {x: tokens.get(x) or graph.call_function(aten.flatten.using_ints, (x, 1, 2)) for x in maps}
            computed = graph.node_copy(node)
            for x in maps:
                computed.replace_input_with(x, flat[x])
            shaped = graph.call_function(aten.unflatten.int, (computed, 1, list(node.meta['val'].shape[1:3])))
        shaped.meta = node.meta
        tokens[shaped] = computed
        node.replace_all_uses_with(shaped)
        graph.erase_node(node)
    graph.eliminate_dead_code()


def split_projections(module: GraphModule) -> None:
    """Computes the parts of a split linear layer separately, in place, since runtimes copy the parts of a split."""
    aten, graph = torch.ops.aten, module.graph
    for node in graph.find_nodes(op='call_function', target=aten.split.Tensor):
        source, size, dim = (*node.args, 0)[:3]
        if (
            source.target is not aten.linear.default
            or len(source.users) > 1
            or dim not in (-1, source.meta['val'].ndim - 1)
        ):
            continue
        x, *parameters = source.args
        for part in list(node.users):
            start = part.args[1] * size
            with graph.inserting_before(part):
                sliced = [
                    parameter and graph.call_function(aten.slice.Tensor, (parameter, 0, start, start + size))
                    for parameter in parameters
                ]
                part.replace_all_uses_with(graph.call_function(aten.linear.default, (x, *sliced)))
    graph.eliminate_dead_code()


def fold_constants(module: GraphModule) -> None:
    """Folds constants, in place: everything that a functional graph computes only from parameters and constants."""
    graph, values = module.graph, dict[torch.fx.Node, Any]()
    for node in graph.nodes:
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # would keep its inputs alive
        elif node.op == 'get_attr':
            values[node] = attrgetter(node.target)(module)
        elif node.op == 'call_function' and all(x in values for x in node.all_input_nodes):
            values[node] = node.target(*map_arg(node.args, values.get), **map_arg(node.kwargs, values.get))
    for index, (node, value) in enumerate(values.items()):
        if node.op == 'get_attr' or not isinstance(value, Tensor) or all(user in values for user in node.users):
            continue
        # A copy, since exporters ignore that a slice is only a part of its memory.
        value = value.detach().clone(memory_format=torch.contiguous_format)
        module.register_buffer(name := f'constant{index}', value)
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(name), delete_user_cb=lambda user: user not in values)
    graph.eliminate_dead_code()
    module.recompile()
    used = {node.target for node in graph.find_nodes(op='get_attr')}
    for name in {name for name, _ in (*module.named_parameters(), *module.named_buffers())} - used:
        owner, _, attribute = name.rpartition('.')
        delattr(module.get_submodule(owner), attribute)  # would be saved otherwise
