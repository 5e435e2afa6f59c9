"""Neighborhood attention (CVPR 2023, arXiv 2204.07143): each pixel attends to the k×k pixels nearest to it.

A square tile of queries shares the patch of keys that all their windows lie in, so a tile is one dense attention whose
bias is -inf outside the windows. The bias is the same for all tiles that lie alike towards the border. Tiles are worked
off some at a time; only q, k, v and rpb are kept for backward, which computes the attention weights again.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .autocast import without_autocast

TILE = 7  # queries a side: of smaller tiles patches overlap more, of larger ones more is masked
# Bytes of the logits at a time. On a CPU what the caches of two cores hold; elsewhere enough work for a kernel launch.
CPU_BLOCK_BYTES = 1 << 22
DEVICE_BLOCK_BYTES = 1 << 26


def neighborhood_attention(
    q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, *, scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Neighborhood attention with a relative position bias (CVPR 2023, arXiv 2204.07143, section 3.1).

    On an axis of length n, query i attends to the k positions from min(max(i - ⌊k/2⌋, 0), n - k) on: at the border the
    window is moved inside.

    Args:
        q, k, v: (B, H, W, heads, d), one floating-point dtype, H and W at least k.
        rpb: (heads, 2k - 1, 2k - 1), k odd: added to the logits, by the key's position minus the query's, plus k - 1.
        scale: multiplies q · k; None is d ** -0.5.
        dropout_p: probability with which an attention weight is zeroed, as in `scaled_dot_product_attention`.

    Returns:
        (B, H, W, heads, d), dtype of q, in which products are made; bias and softmax are in float32 at least.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check(q, k, v, rpb, dropout_p)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if torch.compiler.is_exporting():
        return _whole_map(q, k, v, rpb, scale, dropout_p)
    dropout_mask = None
    if dropout_p > 0:
        keep = torch.rand(*q.shape[:-1], (rpb.shape[-1] + 1) ** 2 // 4, device=q.device) >= dropout_p
        dropout_mask = keep.to(_wide(q)) / (1 - dropout_p)
    return custom_op(q, k, v, rpb, scale, dropout_mask)


def _whole_map(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, scale: float, dropout_p: float) -> Tensor:
    """All tiles at once, in operations whose sizes may be known at run time only: for export."""
    height, width = q.shape[1:3]
    kernel_size = rpb.shape[-1] // 2 + 1

    def positions(side: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of each tile the queries (tiles, t), the keys (tiles, p), and the index of each pair's bias (tiles, t, p)."""
        count = (side + TILE - 1) // TILE
        query = torch.arange(count, device=q.device)[:, None] * TILE + torch.arange(TILE, device=q.device)
        query = query.clamp(max=side - 1)
        window = _windows(query, side, kernel_size)
        key = window[:, :1] + torch.arange(TILE + kernel_size - 1, device=q.device)
        return query, key.clamp(max=side - 1), _bias_index(query, key[:, None], window, kernel_size)

    def pick(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(B, H, W, heads, d) to (B, tiles down, tiles across, heads, rows · columns of a tile, d)."""
        x = x[:, rows][:, :, :, columns]  # (B, tiles down, rows, tiles across, columns, heads, d)
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)

    (query_y, key_y, bias_y), (query_x, key_x, bias_x) = positions(height), positions(width)
    queries, keys, values = pick(q, query_y, query_x), pick(k, key_y, key_x), pick(v, key_y, key_x)
    table = F.pad(rpb.to(_wide(q)), (0, 1, 0, 1), value=float('-inf'))
    bias = table[:, bias_y][..., bias_x].permute(1, 4, 0, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
    attention = F.dropout((scale * queries @ keys.mT + bias).softmax(-1), dropout_p).to(q.dtype)
    out = (attention @ values).unflatten(4, (TILE, TILE)).permute(0, 1, 4, 2, 5, 3, 6)
    return out.flatten(3, 4).flatten(1, 2)[:, :height, :width]


def _windows(position: Tensor, side: int, kernel_size: int) -> Tensor:
    """Where the windows of queries at these positions of an axis begin."""
    return (position - kernel_size // 2).clamp(0, side - kernel_size)


def _bias_index(query: Tensor, key: Tensor, window: Tensor, kernel_size: int) -> Tensor:
    """Key minus query, plus k - 1, and 2k - 1 for keys outside the window.

    Args:
        query, window: positions on an axis, (..., queries).
        key: (..., keys).
    """
    query, window = query.unsqueeze(-1), window.unsqueeze(-1)
    inside = (key >= window) & (key < window + kernel_size)
    return (key - query + kernel_size - 1).where(inside, 2 * kernel_size - 1)


def _check(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, dropout_p: float) -> None:
    if q.ndim != 5 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            'q, k and v must all be (B, H, W, heads, d), got '
            f'q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}'
        )
    devices = {x.device for x in (q, k, v, rpb)}
    if len(devices) > 1:
        raise ValueError(f'q, k, v and rpb must be on one device, got {sorted(map(str, devices))}')
    if rpb.ndim != 3 or rpb.shape[0] != q.shape[3] or rpb.shape[1] != rpb.shape[2] or rpb.shape[1] % 4 != 1:
        raise ValueError(
            f'rpb must be (heads, 2k - 1, 2k - 1) with heads = {q.shape[3]} as in q and k odd, got {tuple(rpb.shape)}'
        )
    kernel_size = rpb.shape[-1] // 2 + 1
    if q.shape[1] < kernel_size or q.shape[2] < kernel_size:
        raise ValueError(f'maps must be at least k = {kernel_size} pixels a side, got {tuple(q.shape[1:3])}')
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype or not rpb.is_floating_point():
        raise ValueError(
            'q, k and v must share one floating-point dtype, and rpb have one, got '
            f'{q.dtype}, {k.dtype}, {v.dtype}, {rpb.dtype}'
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f'dropout_p must be in [0, 1), got {dropout_p=}')


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@torch.library.custom_op('mmslide::neighborhood_attention', mutates_args=())
def custom_op(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, scale: float, dropout_mask: Tensor | None) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    with without_autocast(q):
        for region in _regions(q, rpb):
            for block in region.blocks(q):
                queries, keys, values = block.queries(q) * scale, block.keys(k), block.keys(v)
                attention = region.attention(queries, keys)
                if dropout_mask is not None:
                    attention *= region.spread(block.queries(dropout_mask))
                block.write(attention.to(q.dtype) @ values, out)
    return out


@torch.library.custom_op('mmslide::neighborhood_attention_backward', mutates_args=())
def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor,
    scale: float,
    dropout_mask: Tensor | None,
    parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and rpb; an empty tensor for the last without `parameters`."""
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    # Patches overlap, so these are sums.
    grad_k, grad_v = (torch.zeros(q.shape, dtype=_wide(q), device=q.device) for _ in range(2))
    grad_rpb = torch.zeros(rpb.shape, dtype=_wide(q), device=q.device)
    with without_autocast(q):
        for region in _regions(q, rpb):
            grad_bias = torch.zeros_like(region.bias)
            for block in region.blocks(q):
                queries, keys, values = block.queries(q) * scale, block.keys(k), block.keys(v)
                grad = block.queries(grad_out)
                attention = dropped = region.attention(queries, keys)
                grad_attention = (grad @ values.mT).to(attention.dtype)
                if dropout_mask is not None:
                    mask = region.spread(block.queries(dropout_mask))
                    dropped = attention * mask
                    grad_attention *= mask
                block.add_to_keys(dropped.to(q.dtype).mT @ grad, grad_v)
                grad_logits = torch._softmax_backward_data(grad_attention, attention, -1, attention.dtype)
                if parameters:
                    grad_bias += grad_logits.unflatten(0, (-1, len(rpb))).sum(0)
                grad_logits = grad_logits.to(q.dtype)
                block.write(grad_logits @ keys * scale, grad_q)
                block.add_to_keys(grad_logits.mT @ queries, grad_k)
            if parameters:
                region.add_to_rpb(grad_bias, grad_rpb)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), grad_rpb.to(rpb.dtype) if parameters else rpb.new_empty(0)


@custom_op.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *maps, rpb, _scale, _dropout_mask, parameters = args
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*maps, rpb))
    return grads if parameters else (*grads[:3], rpb.new_empty(0))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, dropout_mask = inputs
    ctx.save_for_backward(*tensors, dropout_mask)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, dropout_mask = ctx.saved_tensors
    parameters = ctx.needs_input_grad[3]
    grads = _backward(grad_out, *tensors, ctx.scale, dropout_mask, parameters)
    return *grads[:3], grads[3] if parameters else None, None, None


def _refuse_second_backward(ctx: Any, *grads: Tensor) -> None:
    raise ValueError('neighborhood_attention can be differentiated once only')


custom_op.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_refuse_second_backward)


@register_flop_formula(torch.ops.mmslide.neighborhood_attention)
def _flops(
    q_shape: torch.Size, k_shape: torch.Size, v_shape: torch.Size, rpb_shape: torch.Size, *_: Any, **__: Any
) -> int:
    """As the paper counts: q · k and a · v for k² slots, two operations a multiply-add."""
    return 2 * math.prod(q_shape) * 2 * (rpb_shape[-1] // 2 + 1) ** 2


@register_flop_formula(torch.ops.mmslide.neighborhood_attention_backward)
def _backward_flops(grad_out_shape: torch.Size, *shapes: Any, **kwargs: Any) -> int:
    """Two products for each one of the forward pass, without what is recomputed."""
    return 2 * _flops(*shapes)


@dataclass(frozen=True)
class _Run:
    """Tiles in a row on one axis that lie alike: tile j has the queries from `start + j · size` on."""

    count: int
    start: int
    size: int
    patch: int  # where the first tile's keys begin
    windows: tuple[int, ...]  # where each query's window begins in its tile's patch
    kernel_size: int

    @property
    def patch_size(self) -> int:
        return self.windows[-1] + self.kernel_size

    def parts(self, count: int) -> Iterator['_Run']:
        """Some tiles at a time."""
        for first in range(0, self.count, count):
            offset = first * self.size
            yield replace(
                self,
                count=min(count, self.count - first),
                start=self.start + offset,
                patch=self.patch + offset,
            )

    def index(self, device: torch.device) -> Tensor:
        """Of the bias for each pair in a tile: (size, patch_size)."""
        query = torch.arange(self.size, device=device) + self.start - self.patch
        key = torch.arange(self.patch_size, device=device)
        return _bias_index(query, key, torch.tensor(self.windows, device=device), self.kernel_size)


def _runs(side: int, kernel_size: int) -> list[_Run]:
    """The tiles of an axis."""
    size = -(-side // -(-side // TILE))  # of tiles about equally large
    runs: list[_Run] = []
    for start in range(0, side, size):
        windows = _windows(torch.arange(start, min(start + size, side)), side, kernel_size)
        patch = int(windows[0])
        tile = _Run(1, start, len(windows), patch, tuple((windows - patch).tolist()), kernel_size)
        last = runs[-1] if runs else None
        if last and (last.windows, last.start - last.patch) == (tile.windows, start - patch):
            runs[-1] = replace(last, count=last.count + 1)
        else:
            runs.append(tile)
    return runs


@dataclass(frozen=True)
class _Block:
    """Tiles of some images, computed together; their axis is (images · rows · columns · heads)."""

    images: slice
    rows: _Run
    columns: _Run

    def queries(self, x: Tensor) -> Tensor:
        """(B, H, W, heads, n) to (tiles, queries, n)."""
        return self._tiles(x, (0, self.rows.size), (0, self.columns.size), keys=False).flatten(0, 3).flatten(1, 2)

    def keys(self, x: Tensor) -> Tensor:
        """(B, H, W, heads, n) to (tiles, keys, n)."""
        sides = (0, self.rows.patch_size), (0, self.columns.patch_size)
        return self._tiles(x, *sides, keys=True).flatten(0, 3).flatten(1, 2)

    def write(self, tiles: Tensor, out: Tensor) -> None:
        """(tiles, queries, n) into (B, H, W, heads, n)."""
        target = self._tiles(out, (0, self.rows.size), (0, self.columns.size), keys=False)
        target.copy_(tiles.view(target.shape))

    def add_to_keys(self, tiles: Tensor, grad: Tensor) -> None:
        """(tiles, keys, n) onto (B, H, W, heads, n), in parts of patches that do not overlap."""
        height, width = self.rows.patch_size, self.columns.patch_size
        tiles = tiles.view(-1, height, width, tiles.shape[-1])
        for y in range(0, height, self.rows.size):
            for x in range(0, width, self.columns.size):
                part = tiles[:, y : y + self.rows.size, x : x + self.columns.size]
                target = self._tiles(grad, (y, part.shape[1]), (x, part.shape[2]), keys=True)
                target += part.reshape(target.shape)

    def _tiles(self, x: Tensor, rows: tuple[int, int], columns: tuple[int, int], keys: bool) -> Tensor:
        """A view of (offset, size) of each tile's queries or keys: (images, rows, columns, heads, size, size, n)."""
        x = x[self.images]
        for axis, run, (offset, size) in ((1, self.rows, rows), (2, self.columns, columns)):
            start = offset + (run.patch if keys else run.start)
            x = x.narrow(axis, start, (run.count - 1) * run.size + size).unfold(axis, size, run.size)
        return x.permute(0, 1, 2, 3, 5, 6, 4)


@dataclass(frozen=True)
class _Region:
    """The tiles of the map with the same bias (heads, queries, keys)."""

    rows: _Run
    columns: _Run
    bias: Tensor

    def blocks(self, q: Tensor) -> Iterator[_Block]:
        budget = CPU_BLOCK_BYTES if q.device.type == 'cpu' else DEVICE_BLOCK_BYTES
        tiles = budget // self.bias.nbytes
        columns = min(self.columns.count, max(1, tiles))
        rows = min(self.rows.count, max(1, tiles // columns))
        images = max(1, tiles // (rows * columns))
        for image in range(0, len(q), images):
            for part in self.rows.parts(rows):
                for other in self.columns.parts(columns):
                    yield _Block(slice(image, image + images), part, other)

    def attention(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The attention weights, (tiles, queries, keys), in the dtype of the bias."""
        logits = (queries @ keys.mT).to(self.bias.dtype)
        logits.view(-1, *self.bias.shape).add_(self.bias)
        return logits.softmax(-1)

    def spread(self, slots: Tensor) -> Tensor:
        """Numbers for the slots of each query's window, (tiles, queries, k²), to (tiles, queries, keys)."""
        rows, columns = (
            torch.tensor(run.windows)[:, None] + torch.arange(run.kernel_size) for run in (self.rows, self.columns)
        )  # (size, k)
        index = rows[:, None, :, None] * self.columns.patch_size + columns[None, :, None, :]
        index = index.reshape(slots.shape[1:]).to(slots.device).expand(slots.shape)
        return slots.new_zeros(*slots.shape[:2], self.bias.shape[-1]).scatter_(-1, index, slots)

    def add_to_rpb(self, grad_bias: Tensor, grad_rpb: Tensor) -> None:
        rows, columns = (run.index(grad_rpb.device) for run in (self.rows, self.columns))
        padded = F.pad(torch.zeros_like(grad_rpb), (0, 1, 0, 1))
        index = rows[:, None, :, None] * padded.shape[-1] + columns[None, :, None, :]
        padded.flatten(1).index_add_(1, index.flatten(), grad_bias.flatten(1))
        grad_rpb += padded[:, :-1, :-1]


def _regions(q: Tensor, rpb: Tensor) -> Iterator[_Region]:
    kernel_size = rpb.shape[-1] // 2 + 1
    table = F.pad(rpb.to(_wide(q)), (0, 1, 0, 1), value=float('-inf'))
    all_rows, all_columns = (_runs(side, kernel_size) for side in q.shape[1:3])
    for rows in all_rows:
        for columns in all_columns:
            index = rows.index(q.device)[:, None, :, None], columns.index(q.device)[None, :, None, :]
            yield _Region(rows, columns, table[:, *index].flatten(3, 4).flatten(1, 2))
