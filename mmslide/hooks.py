from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmslide.checkpoints import non_finite
from mmslide.messages import listed
from mmslide.registry import HOOKS


@HOOKS.register_module()
class CheckNonFiniteHook(Hook):
    """Stops training when losses or weights are NaN or infinite, before a checkpoint with such weights is saved.

    A single non-finite loss is tolerated: with mixed precision, the gradient scaler skips that step. Weights are
    checked after each epoch, before each validation and before each checkpoint.

    Args:
        patience: number of consecutive iterations with a non-finite loss after which training stops.

    Raises:
        ValueError: patience is not positive.
    """

    # Before CheckpointHook (VERY_LOW), which deletes an old checkpoint before it saves a new one.
    priority = 'LOW'

    def __init__(self, patience: int = 5) -> None:
        if patience < 1:
            raise ValueError(f'patience must be a positive number of iterations, got {patience=}')
        self.patience = patience
        self.count = 0

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        losses = {key: torch.as_tensor(value).detach() for key, value in (outputs or {}).items() if 'loss' in key}
        names = non_finite(losses)
        self.count = self.count + 1 if names else 0
        if self.count >= self.patience:
            raise FloatingPointError(
                f'{listed(names)} NaN or infinite in each iteration since {runner.iter + 2 - self.count}, '
                f'{self.count} times: training stops. {self._last_checkpoint(runner)} Common causes are a '
                'learning rate too high for the batch size, no warm-up, and half precision.'
            )
        if any(self._saves_now(hook, runner) for hook in runner.hooks):
            self._check_weights(runner, runner.model.state_dict())

    def after_train_epoch(self, runner: Runner) -> None:
        self._check_weights(runner, runner.model.state_dict())

    def before_val_epoch(self, runner: Runner) -> None:
        self._check_weights(runner, runner.model.state_dict())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._check_weights(runner, checkpoint['state_dict'])

    @staticmethod
    def _saves_now(hook: Hook, runner: Runner) -> bool:
        return (
            isinstance(hook, CheckpointHook)
            and not hook.by_epoch
            and (
                hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
                or (hook.save_last and hook.is_last_train_iter(runner))
            )
        )

    def _check_weights(self, runner: Runner, state: Mapping[str, torch.Tensor]) -> None:
        names = non_finite(state)
        if names:
            raise FloatingPointError(
                f'{len(names)} of {len(state)} weights are NaN or infinite ({listed(names)}): training stops, and they '
                f'are not saved. {self._last_checkpoint(runner)}'
            )

    @staticmethod
    def _last_checkpoint(runner: Runner) -> str:
        path = runner.message_hub.runtime_info.get('last_ckpt')
        if path and Path(path).exists():
            return f'The last checkpoint with finite weights is {path}.'
        return 'No checkpoint has been saved yet.'


@HOOKS.register_module()
class SlideKernelHook(Hook):
    """Logs the kernels of every Slide Attention to the visualizer: LocalVisBackend, TensorBoard or W&B.

    It logs an image, `slide_kernels` (see `mmslide.figures.kernel_figure`), and for each block a scalar,
    `slide_kernels/NAME`: the distance from the fixed shift (see `mmslide.visualize.shift_distance`). With an EMAHook,
    the kernels are those of the trained model, not of the average.

    Args:
        interval: logging interval in iterations; the first time is before training starts.

    Raises:
        ValueError: interval is not positive; or, when training starts, the model has no Slide Attention.
    """

    def __init__(self, interval: int = 1000) -> None:
        if interval < 1:
            raise ValueError(f'interval must be a positive number of iterations, got {interval=}')
        self.interval = interval

    def before_train(self, runner: Runner) -> None:
        self._send(runner, runner.iter)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.every_n_train_iters(runner, self.interval):
            self._send(runner, runner.iter + 1)

    @staticmethod
    def _send(runner: Runner, step: int) -> None:
        from mmslide.visualize import merged_kernels, shift_distance  # imports the exporters

        kernels = merged_kernels(runner.model.module if is_model_wrapper(runner.model) else runner.model)
        if not is_main_process():
            return
        from mmslide.figures import kernel_figure, to_pixels  # imports matplotlib

        runner.visualizer.add_image('slide_kernels', to_pixels(kernel_figure(kernels)), step)
        distances = {f'slide_kernels/{name}': shift_distance(weight) for name, weight in kernels.items()}
        runner.visualizer.add_scalars(distances, step)
