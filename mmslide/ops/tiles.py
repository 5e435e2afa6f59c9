"""Neighborhood attention in tiles, in plain tensor operations, on any device.

The queries of a square tile share the patch of keys that covers all their windows, so a tile is one dense attention
whose bias is -inf outside the windows. The bias is the same for all tiles in the same position relative to the border.
Several tiles are processed at a time; backward recomputes the attention weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 7  # queries per side: with smaller tiles, patches overlap more; with larger ones, more is masked
# Bytes of the logits at a time. On a CPU, the size of two cores' caches; elsewhere, enough work for a kernel launch.
CPU_BLOCK_BYTES = 1 << 22
DEVICE_BLOCK_BYTES = 1 << 26


def forward(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, scale: float, dropout_mask: Tensor | None) -> Tensor:
    """See `mmslide.ops.neighborhood_attention` for shapes; dropout_mask is (B, H, W, heads, k²)."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for region in _regions(q, rpb):
        for block in region.blocks(q):
            queries, keys, values = block.queries(q) * scale, block.keys(k), block.keys(v)
            attention = region.attention(queries, keys)
            if dropout_mask is not None:
                attention *= region.spread(block.queries(dropout_mask))
            block.write(attention.to(q.dtype) @ values, out)
    return out


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rpb: Tensor,
    scale: float,
    dropout_mask: Tensor | None,
    parameters: bool,
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v, and with `parameters` that of rpb."""
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    # Patches overlap, so these are sums.
    grad_k, grad_v = (torch.zeros(q.shape, dtype=wide(q), device=q.device) for _ in range(2))
    grad_rpb = torch.zeros(rpb.shape, dtype=wide(q), device=q.device)
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
    grads = grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
    return (*grads, grad_rpb.to(rpb.dtype)) if parameters else grads


def whole_map(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, scale: float, dropout_p: float) -> Tensor:
    """All tiles at once, in operations whose sizes may be known only at run time: for export and forward mode.

    More than five dimensions occur only between reshaping and permuting, which Core ML fuses.
    """
    height, width = q.shape[1:3]
    kernel_size = rpb.shape[-1] // 2 + 1

    def positions(side: int) -> tuple[Tensor, Tensor, Tensor]:
        """For each tile: the queries (tiles, t), the keys (tiles, p), and the bias index of each pair (tiles, t, p)."""
        count = (side + TILE - 1) // TILE
        query = torch.arange(count, device=q.device)[:, None] * TILE + torch.arange(TILE, device=q.device)
        query = query.clamp(max=side - 1)
        window = _windows(query, side, kernel_size)
        key = window[:, :1] + torch.arange(TILE + kernel_size - 1, device=q.device)
        return query, key.clamp(max=side - 1), _bias_index(query, key[:, None], window, kernel_size)

    def pick(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(B, H, W, heads, d) to (B, tiles, heads, rows · columns of a tile, d)."""
        x = x[:, rows.flatten()][:, :, columns.flatten()].unflatten(2, columns.shape).unflatten(1, rows.shape)
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 2)  # (B, down, rows, across, columns, heads, d)

    (query_y, key_y, bias_y), (query_x, key_x, bias_x) = positions(height), positions(width)
    queries, keys, values = pick(q, query_y, query_x), pick(k, key_y, key_x), pick(v, key_y, key_x)
    table = F.pad(rpb.to(wide(q)), (0, 1, 0, 1), value=float('-inf'))
    bias = table[:, bias_y][..., bias_x].permute(1, 4, 0, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(0, 1)
    attention = F.dropout((scale * queries @ keys.mT + bias).softmax(-1), dropout_p).to(q.dtype)
    out = (attention @ values).unflatten(3, (TILE, TILE)).unflatten(1, (query_y.shape[0], query_x.shape[0]))
    return out.permute(0, 1, 4, 2, 5, 3, 6).flatten(3, 4).flatten(1, 2)[:, :height, :width]


def _windows(position: Tensor, side: int, kernel_size: int) -> Tensor:
    """The start of the windows of queries at these positions on an axis."""
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


def wide(x: Tensor) -> torch.dtype:
    """The dtype of bias and softmax."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class _Run:
    """Consecutive tiles on an axis in equivalent positions: tile j has the queries starting at `start + j · size`."""

    count: int
    start: int
    size: int
    patch: int  # start of the first tile's keys
    windows: tuple[int, ...]  # start of each query's window in its tile's patch
    kernel_size: int

    @property
    def patch_size(self) -> int:
        return self.windows[-1] + self.kernel_size

    def parts(self, count: int) -> Iterator['_Run']:
        """Yields several tiles at a time."""
        for first in range(0, self.count, count):
            offset = first * self.size
            yield replace(
                self,
                count=min(count, self.count - first),
                start=self.start + offset,
                patch=self.patch + offset,
            )

    def index(self, device: torch.device) -> Tensor:
        """The bias index of each pair in a tile: (size, patch_size)."""
        query = torch.arange(self.size, device=device) + self.start - self.patch
        key = torch.arange(self.patch_size, device=device)
        return _bias_index(query, key, torch.tensor(self.windows, device=device), self.kernel_size)


def _runs(side: int, kernel_size: int) -> list[_Run]:
    """The tiles of an axis."""
    size = -(-side // -(-side // TILE))  # of tiles with about equal size
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
        """Writes (tiles, queries, n) into (B, H, W, heads, n)."""
        target = self._tiles(out, (0, self.rows.size), (0, self.columns.size), keys=False)
        target.copy_(tiles.view(target.shape))

    def add_to_keys(self, tiles: Tensor, grad: Tensor) -> None:
        """Adds (tiles, keys, n) to (B, H, W, heads, n), in parts of non-overlapping patches."""
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
        """Values for the slots of each query's window, (tiles, queries, k²), to (tiles, queries, keys)."""
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
    table = F.pad(rpb.to(wide(q)), (0, 1, 0, 1), value=float('-inf'))
    all_rows, all_columns = (_runs(side, kernel_size) for side in q.shape[1:3])
    for rows in all_rows:
        for columns in all_columns:
            row, column = rows.index(q.device)[:, None, :, None], columns.index(q.device)[None, :, None, :]
            yield _Region(rows, columns, table[:, row, column].flatten(3, 4).flatten(1, 2))
