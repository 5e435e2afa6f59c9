"""Replacements for what PyTorch before 2.6 lacks, under the names in `mmslide.compat`. Also work in later versions."""

import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch._dynamo
from torch import Tensor
from torch.utils import flop_counter

from .unpickler import load

is_compiling = torch._dynamo.is_compiling


class CustomOp:
    """Replaces `torch.library.custom_op`: an operator from a Python function of tensors and plain values."""

    TYPES: ClassVar = {Tensor: 'Tensor', Tensor | None: 'Tensor?', float: 'float', bool: 'bool', str: 'str'}

    def __init__(self, qualified_name: str, function: Callable) -> None:
        namespace, self.name = qualified_name.split('::')
        # Operators exist as long as the library object that declared them.
        self.library = torch.library.Library(namespace, 'FRAGMENT')
        signature = inspect.signature(function)
        parameters = ', '.join(f'{self.TYPES[x.annotation]} {x.name}' for x in signature.parameters.values())
        returns = signature.return_annotation
        count = 0 if returns is Tensor else len(returns.__args__)
        result = f'({", ".join(["Tensor"] * count)})' if count else 'Tensor'
        self.library.define(f'{self.name}({parameters}) -> {result}')
        self.library.impl(self.name, function, 'CompositeExplicitAutograd')
        self.overload = getattr(getattr(torch.ops, namespace), self.name).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def register_fake(self, function: Callable) -> Callable:
        self.library.impl(self.name, function, 'Meta')
        return function

    def register_autograd(
        self, backward: Callable, *, setup_context: Callable = lambda ctx, inputs, output: None
    ) -> None:
        overload = self.overload

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    output = overload(*args)
                setup_context(ctx, args, output)
                return output

        Function.backward = staticmethod(backward)  # type: ignore[method-assign]
        self.library.impl(self.name, Function.apply, 'Autograd')


def register_custom_op(name: str, *, mutates_args: tuple) -> Callable[[Callable], CustomOp]:
    return lambda function: CustomOp(name, function)


def register_flop_formula(operator: Any) -> Callable[[Callable], Callable]:
    """2.1 has another registry, and 2.2's own function of this name registers where the counter does not look."""

    def register(formula: Callable) -> Callable:
        if hasattr(flop_counter, 'flop_mapping'):
            flop_counter.flop_mapping[operator] = formula
        else:
            flop_counter.flop_registry[operator] = flop_counter.shape_wrapper(formula)
        return formula

    return register


def is_autocast_enabled(device_type: str) -> bool:
    return torch.is_autocast_cpu_enabled() if device_type == 'cpu' else torch.is_autocast_enabled()


def get_autocast_dtype(device_type: str) -> torch.dtype:
    return torch.get_autocast_cpu_dtype() if device_type == 'cpu' else torch.get_autocast_gpu_dtype()


def is_batched(x: Tensor) -> bool:
    """Tensors made by `torch.autograd.grad(..., is_grads_batched=True)` cannot be detected there."""
    return torch._C._functorch.is_batchedtensor(x)


def statically_known_true(condition: Any) -> bool:
    """There are no symbolic sizes there."""
    return bool(condition)


def safe_load(file: Path, map_location: Any, globals_: dict[str, Any]) -> Any:
    from .stack import HISTORY_GLOBALS

    try:
        return load(file, map_location, {**HISTORY_GLOBALS, **globals_})
    except pickle.UnpicklingError as error:  # as torch words it
        raise pickle.UnpicklingError(f'WeightsUnpickler error: {error}') from error


def add_safe_globals(_: list) -> None:
    """Does nothing: checkpoints are only read by `safe_load`, which has its own list."""
