"""Slide Attention as Triton kernels: the tap-wise form of `tapwise.py`, a tile of pixels and a head in each program.

Logits and softmax stay in registers, products of d channels and k² slots use `tl.dot`; only q, k, v and the parameters
are kept for backward. Backward recomputes the attention in three kernels without atomic operations, and tile sizes are
fixed instead of autotuned, so all results are bitwise reproducible:

1. `_query_kernel`, where each pixel gathers from its neighbors: attention and gradient of the logits, both written as
   (B, H, W, heads, k²) since the neighbors need them next, the gradient of q and each tile's part of rpb's gradient.
2. `_key_value_kernel`, where each pixel gathers from the pixels that it is a neighbor of: the gradients of k and v.
3. `_parameter_kernel`, with a fixed number of programs per tap that sum over pixels and heads: the gradients of weight
   and bias, whose parts are summed at the end. Each tap reads the maps again, mostly from the cache.

The shift is not part of the products: for a kernel W = I + D, slot j's own tap adds q · k(p + t_j) to the logit and a_j
· v(p + t_j) to the output, in float32, and only D goes through `tl.dot`. So a small learned part is not rounded away
next to the shift's 1, although products of half-precision maps run on tensor cores in the maps' dtype (those for the
parameters' gradients in TF32). Products of float32 maps are plain float32 ('ieee'). Sums, softmax and everything else
are always float32.

Offsets are 64-bit, so maps may have more than 2³¹ elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs of `_parameter_kernel`: several for each multiprocessor of a large GPU. Each has its own (d, k²) float32
# sums.
PARAMETER_PROGRAMS = 1024


@triton.jit
def _place(tile, height, width, TILE_HEIGHT: tl.constexpr, TILE_WIDTH: tl.constexpr):
    """Index of the first pixel of the tile's image, rows and columns of the tile's pixels; some may be off the map."""
    tiles_down, tiles_across = tl.cdiv(height, TILE_HEIGHT), tl.cdiv(width, TILE_WIDTH)
    image = tile // (tiles_down * tiles_across)
    inside = tl.arange(0, TILE_HEIGHT * TILE_WIDTH)
    y = tile // tiles_across % tiles_down * TILE_HEIGHT + inside // TILE_WIDTH
    x = tile % tiles_across * TILE_WIDTH + inside % TILE_WIDTH
    return image.to(tl.int64) * height * width, y, x


@triton.jit
def _load(pointers, columns, stride, start, y, x, height, width):
    """One row of values for each pixel, zeros off the map: (pixels, columns) in float32."""
    on_map = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    pixels = start + y * width + x
    return tl.load(pointers + pixels[:, None] * stride, mask=on_map[:, None] & columns, other=0.0).to(tl.float32)


@triton.jit
def _store(pointers, columns, stride, start, y, x, height, width, values):
    on_map = (y < height) & (x < width)
    pixels = start + y * width + x
    tl.store(pointers + pixels[:, None] * stride, values, mask=on_map[:, None] & columns)


@triton.jit
def _dot(x, matrix, PRECISION: tl.constexpr):
    """x in float32 times a matrix, in the matrix's dtype."""
    return tl.dot(x.to(matrix.dtype), matrix, input_precision=PRECISION)


@triton.jit
def _merged(weights, kernel, tap, PRECISION: tl.constexpr):
    """Σ_j weights_j · W[c, j, t], the shift included, for D of a tap (channels, slots): (pixels, channels)."""
    own = tl.where(tl.arange(0, kernel.shape[1])[None, :] == tap, weights, 0.0)
    return _dot(weights, tl.trans(kernel), PRECISION) + tl.sum(own, 1)[:, None]


@triton.jit
def _gather(
    factor, pointers, columns, stride, start, y, x, height, width, kernels, KERNEL_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_t Σ_c factor_c · map_c(p + t) · W[c, j, t] + Σ_c factor_c · b[c, j]: (pixels, slots)."""
    SIZE: tl.constexpr = kernels.shape[0] * kernels.shape[1]
    slot = tl.arange(0, kernels.shape[1])[None, :]
    sums = _dot(factor, tl.load(kernels + KERNEL_SIZE * KERNEL_SIZE * SIZE), PRECISION)
    for tap in range(KERNEL_SIZE * KERNEL_SIZE):
        down, right = tap // KERNEL_SIZE - KERNEL_SIZE // 2, tap % KERNEL_SIZE - KERNEL_SIZE // 2
        products = factor * _load(pointers, columns, stride, start, y + down, x + right, height, width)
        sums += _dot(products, tl.load(kernels + tap * SIZE), PRECISION)
        sums += tl.where(slot == tap, tl.sum(products, 1)[:, None], 0.0)
    return sums


@triton.jit
def _spread(
    weights, pointers, columns, stride, start, y, x, height, width, kernels, KERNEL_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_t map_c(p + t) · Σ_j weights_j · W[c, j, t] + Σ_j weights_j · b[c, j]: (pixels, channels)."""
    SIZE: tl.constexpr = kernels.shape[0] * kernels.shape[1]
    sums = _dot(weights, tl.trans(tl.load(kernels + KERNEL_SIZE * KERNEL_SIZE * SIZE)), PRECISION)
    for tap in range(KERNEL_SIZE * KERNEL_SIZE):
        down, right = tap // KERNEL_SIZE - KERNEL_SIZE // 2, tap % KERNEL_SIZE - KERNEL_SIZE // 2
        neighbours = _load(pointers, columns, stride, start, y + down, x + right, height, width)
        sums += neighbours * _merged(weights, tl.load(kernels + tap * SIZE), tap, PRECISION)
    return sums


@triton.jit
def _softmax(logits, columns):
    """Softmax over the slots, without those that only pad the tile."""
    logits = tl.where(columns, logits, float('-inf'))
    powers = tl.exp(logits - tl.max(logits, 1)[:, None])
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def _forward_kernel(
    out, q, k, v, kernels, rpb, mask, scale, heads, height, width, stride, head_stride,
    HEAD_DIMS: tl.constexpr, CHANNELS: tl.constexpr, KERNEL_SIZE: tl.constexpr, SLOTS: tl.constexpr,
    TILE_HEIGHT: tl.constexpr, TILE_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start, y, x = _place(tl.program_id(0), height, width, TILE_HEIGHT, TILE_WIDTH)
    head = tl.program_id(1).to(tl.int64)
    TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    channel, slot = tl.arange(0, CHANNELS), tl.arange(0, SLOTS)
    channels, slots = channel[None, :] < HEAD_DIMS, slot[None, :] < TAPS
    kernels += channel[:, None] * SLOTS + slot[None, :]
    columns = head * head_stride + channel[None, :]

    query = _load(q + columns, channels, stride, start, y, x, height, width)
    logits = _gather(query, k + columns, channels, stride, start, y, x, height, width, kernels, KERNEL_SIZE, PRECISION)
    positions = tl.load(rpb + head * TAPS + slot, mask=slot < TAPS, other=0.0)
    attention = _softmax(scale * (logits + tl.sum(query, 1)[:, None] * positions[None, :]), slots)
    if mask is not None:
        attention *= _load(mask + head * TAPS + slot[None, :], slots, heads * TAPS, start, y, x, height, width)
    result = _spread(
        attention, v + columns, channels, stride, start, y, x, height, width, kernels, KERNEL_SIZE, PRECISION
    )
    out += head * HEAD_DIMS + channel[None, :]
    _store(out, channels, heads * HEAD_DIMS, start, y, x, height, width, result)


@triton.jit
def _query_kernel(
    grad_q, grad_logits, attention_out, grad_rpb, grad_out, q, k, v, kernels, rpb, mask, scale, heads, height, width,
    stride, head_stride, HEAD_DIMS: tl.constexpr, CHANNELS: tl.constexpr, KERNEL_SIZE: tl.constexpr,
    SLOTS: tl.constexpr, TILE_HEIGHT: tl.constexpr, TILE_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The attention that it writes is what the values were weighted with, `grad_logits` that of the unscaled logits."""
    start, y, x = _place(tl.program_id(0), height, width, TILE_HEIGHT, TILE_WIDTH)
    head = tl.program_id(1).to(tl.int64)
    TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    channel, slot = tl.arange(0, CHANNELS), tl.arange(0, SLOTS)
    channels, slots = channel[None, :] < HEAD_DIMS, slot[None, :] < TAPS
    kernels += channel[:, None] * SLOTS + slot[None, :]
    columns = head * head_stride + channel[None, :]
    own_columns = head * HEAD_DIMS + channel[None, :]
    slot_columns = head * TAPS + slot[None, :]

    query = _load(q + columns, channels, stride, start, y, x, height, width)
    logits = _gather(query, k + columns, channels, stride, start, y, x, height, width, kernels, KERNEL_SIZE, PRECISION)
    positions = tl.load(rpb + head * TAPS + slot, mask=slot < TAPS, other=0.0)
    query_sum = tl.sum(query, 1)[:, None]
    attention = _softmax(scale * (logits + query_sum * positions[None, :]), slots)

    grad = _load(grad_out + own_columns, channels, heads * HEAD_DIMS, start, y, x, height, width)
    grad_attention = _gather(
        grad, v + columns, channels, stride, start, y, x, height, width, kernels, KERNEL_SIZE, PRECISION
    )
    dropped = attention
    if mask is not None:
        kept = _load(mask + slot_columns, slots, heads * TAPS, start, y, x, height, width)
        dropped *= kept
        grad_attention *= kept
    grad_attention -= tl.sum(attention * grad_attention, 1)[:, None]
    grad_logit = scale * attention * grad_attention
    _store(attention_out + slot_columns, slots, heads * TAPS, start, y, x, height, width, dropped)
    _store(grad_logits + slot_columns, slots, heads * TAPS, start, y, x, height, width, grad_logit)
    share = tl.program_id(0).to(tl.int64) * heads + head
    tl.store(grad_rpb + share * TAPS + slot, tl.sum(grad_logit * query_sum, 0), mask=slot < TAPS)

    result = _spread(
        grad_logit, k + columns, channels, stride, start, y, x, height, width, kernels, KERNEL_SIZE, PRECISION
    )
    result += tl.sum(grad_logit * positions[None, :], 1)[:, None]
    _store(grad_q + own_columns, channels, heads * HEAD_DIMS, start, y, x, height, width, result)


@triton.jit
def _key_value_kernel(
    grad_k, grad_v, grad_out, q, kernels, grad_logits, attention, heads, height, width, stride, head_stride,
    HEAD_DIMS: tl.constexpr, CHANNELS: tl.constexpr, KERNEL_SIZE: tl.constexpr, SLOTS: tl.constexpr,
    TILE_HEIGHT: tl.constexpr, TILE_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    start, y, x = _place(tl.program_id(0), height, width, TILE_HEIGHT, TILE_WIDTH)
    head = tl.program_id(1).to(tl.int64)
    TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    channel, slot = tl.arange(0, CHANNELS), tl.arange(0, SLOTS)
    channels, slots = channel[None, :] < HEAD_DIMS, slot[None, :] < TAPS
    kernels += channel[:, None] * SLOTS + slot[None, :]
    q += head * head_stride + channel[None, :]
    own_columns = head * HEAD_DIMS + channel[None, :]
    slot_columns = head * TAPS + slot[None, :]

    key_sums = tl.zeros((TILE_HEIGHT * TILE_WIDTH, CHANNELS), tl.float32)
    value_sums = tl.zeros((TILE_HEIGHT * TILE_WIDTH, CHANNELS), tl.float32)
    for tap in range(TAPS):
        # This pixel is tap t of the pixel at p - t.
        up, left = y - (tap // KERNEL_SIZE - KERNEL_SIZE // 2), x - (tap % KERNEL_SIZE - KERNEL_SIZE // 2)
        kernel = tl.load(kernels + tap * CHANNELS * SLOTS)
        query = _load(q, channels, stride, start, up, left, height, width)
        grad_logit = _load(grad_logits + slot_columns, slots, heads * TAPS, start, up, left, height, width)
        key_sums += query * _merged(grad_logit, kernel, tap, PRECISION)
        grad = _load(grad_out + own_columns, channels, heads * HEAD_DIMS, start, up, left, height, width)
        weights = _load(attention + slot_columns, slots, heads * TAPS, start, up, left, height, width)
        value_sums += grad * _merged(weights, kernel, tap, PRECISION)
    _store(grad_k + own_columns, channels, heads * HEAD_DIMS, start, y, x, height, width, key_sums)
    _store(grad_v + own_columns, channels, heads * HEAD_DIMS, start, y, x, height, width, value_sums)


@triton.jit
def _parameter_kernel(
    shares, grad_out, q, k, v, grad_logits, attention, tiles, heads, height, width, stride, head_stride,
    HEAD_DIMS: tl.constexpr, CHANNELS: tl.constexpr, KERNEL_SIZE: tl.constexpr, SLOTS: tl.constexpr,
    TILE_HEIGHT: tl.constexpr, TILE_WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tap = tl.program_id(0)  # fastest axis, so that programs that read the same pixels run at the same time
    TAPS: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE
    channel, slot = tl.arange(0, CHANNELS), tl.arange(0, SLOTS)
    channels, slots = channel[None, :] < HEAD_DIMS, slot[None, :] < TAPS
    down, right = tap // KERNEL_SIZE - KERNEL_SIZE // 2, tap % KERNEL_SIZE - KERNEL_SIZE // 2

    sums = tl.zeros((CHANNELS, SLOTS), tl.float32)
    for item in range(tl.program_id(1), tiles * heads, tl.num_programs(1)):
        start, y, x = _place(item // heads, height, width, TILE_HEIGHT, TILE_WIDTH)
        head = (item % heads).to(tl.int64)
        columns = head * head_stride + channel[None, :]
        own_columns = head * HEAD_DIMS + channel[None, :]
        slot_columns = head * TAPS + slot[None, :]
        query = _load(q + columns, channels, stride, start, y, x, height, width)
        grad = _load(grad_out + own_columns, channels, heads * HEAD_DIMS, start, y, x, height, width)
        if tap < TAPS:  # the last one is the bias, a kernel on ones
            query *= _load(k + columns, channels, stride, start, y + down, x + right, height, width)
            grad *= _load(v + columns, channels, stride, start, y + down, x + right, height, width)
        grad_logit = _load(grad_logits + slot_columns, slots, heads * TAPS, start, y, x, height, width)
        weights = _load(attention + slot_columns, slots, heads * TAPS, start, y, x, height, width)
        # Each tile is summed separately: tensor cores truncate values that they add to a long sum.
        tile_sums = tl.dot(tl.trans(query), grad_logit, input_precision=PRECISION)
        sums += tl.dot(tl.trans(grad), weights, tile_sums, input_precision=PRECISION)
    share = tl.program_id(1) * (TAPS + 1) + tap
    tl.store(shares + share * CHANNELS * SLOTS + channel[:, None] * SLOTS + slot[None, :], sums)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: Tensor,
    scale: float,
    dropout_mask: Tensor | None,
) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    launch = _Launch(q, k, v, weight, bias)
    with torch.cuda.device_of(q):
        _forward_kernel[launch.grid](
            out, *launch.maps, launch.kernels, rpb.contiguous(), dropout_mask, scale, *launch.sizes, **launch.constants
        )
    return out


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: Tensor,
    scale: float,
    dropout_mask: Tensor | None,
    parameters: bool,
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v, and with `parameters` those of weight, bias and rpb."""
    batch, height, width, heads, head_dims = q.shape
    slots = bias.shape[1]
    launch = _Launch(q, k, v, weight, bias)
    query, key, value = launch.maps
    grad_out, rpb = grad_out.contiguous(), rpb.contiguous()
    grad_q, grad_k, grad_v = (torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(3))
    attention, grad_logits = (rpb.new_empty(batch, height, width, heads, slots) for _ in range(2))
    rpb_shares = rpb.new_empty(launch.tiles, heads, slots)
    with torch.cuda.device_of(q):
        _query_kernel[launch.grid](
            grad_q, grad_logits, attention, rpb_shares, grad_out, query, key, value, launch.kernels, rpb, dropout_mask,
            scale, *launch.sizes, **launch.constants,
        )  # fmt: skip
        _key_value_kernel[launch.grid](
            grad_k, grad_v, grad_out, query, launch.kernels, grad_logits, attention, *launch.sizes, **launch.constants
        )
        if not parameters:
            return grad_q, grad_k, grad_v
        programs = min(PARAMETER_PROGRAMS // (slots + 1), launch.tiles * heads)
        shares = rpb.new_empty(programs, *launch.kernels.shape)
        _parameter_kernel[slots + 1, programs](
            shares, grad_out, query, key, value, grad_logits, attention, launch.tiles, *launch.sizes, **launch.constants
        )
    sums = shares.sum(0)[:, :head_dims, :slots]
    grad_weight = sums[:slots].permute(1, 2, 0).contiguous().view(weight.shape)
    return grad_q, grad_k, grad_v, grad_weight, sums[slots].contiguous(), rpb_shares.sum(0)


class _Launch:
    """The common arguments of all kernel launches for a map."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> None:
        batch, height, width, heads, head_dims = q.shape
        slots, kernel_size = weight.shape[1], weight.shape[-1]
        # Views of a module's single projection have one stride for all pixels; other maps are copied.
        self.maps = [x.flatten(0, 2) for x in (q, k, v)]
        if len({x.stride() for x in self.maps}) > 1 or self.maps[0].stride(-1) != 1:
            self.maps = [x.contiguous() for x in self.maps]
        # Powers of two, and at least the minimum of `tl.dot`.
        channels, padded_slots = (max(16, triton.next_power_of_2(size)) for size in (head_dims, slots))
        # (k² + 1, channels, slots): a matrix of the learned part for each tap, and the bias.
        learned = weight.flatten(2) - torch.eye(slots, dtype=weight.dtype, device=weight.device)
        self.kernels = q.new_zeros(slots + 1, channels, padded_slots)
        self.kernels[:slots, :head_dims, :slots] = learned.permute(2, 0, 1)
        self.kernels[slots, :head_dims, :slots] = bias
        # A warp group's matrix instruction needs 64 pixels. Many channels and plain float32 products need more
        # registers than are left then.
        small = q.dtype == torch.float32 or channels > 64
        tile_height, tile_width = (4, 8) if small else (8, 8)
        self.tiles = batch * triton.cdiv(height, tile_height) * triton.cdiv(width, tile_width)
        self.grid = (self.tiles, heads)
        self.sizes = (heads, height, width, *self.maps[0].stride()[:2])
        self.constants = dict(
            HEAD_DIMS=head_dims,
            CHANNELS=channels,
            KERNEL_SIZE=kernel_size,
            SLOTS=padded_slots,
            TILE_HEIGHT=tile_height,
            TILE_WIDTH=tile_width,
            PRECISION='ieee' if q.dtype == torch.float32 else 'tf32',
            num_warps=8 if small or channels > 32 else 4,
            num_stages=1,
        )
