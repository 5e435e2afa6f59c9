"""Slide Attention tap by tap: the sum over slots is moved inside the sum over taps, which avoids k² copies of K and V.

With W the merged kernels, b their biases and r the relative position bias, for each pixel p::

    logit_j = s · [ Σ_t Σ_c q_c · k_c(p + t) · W[c, j, t] + Σ_c q_c · (b[c, j] + r[h, j]) ]
    out_c   = Σ_t v_c(p + t) · Σ_j a_j · W[c, j, t] + Σ_j a_j · b[c, j]

The maps are processed in blocks that fit in the cache: some rows of one image, or several whole images. Only q, k, v
and the parameters are kept for backward, which recomputes the attention block by block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of one block's (pixels, heads, k², d) buffer. On a CPU, the size of two cores' caches; elsewhere, enough work
# for one kernel launch.
CPU_BLOCK_BYTES = 1 << 22
DEVICE_BLOCK_BYTES = 1 << 26


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
    """See `mmslide.ops.slide_attention` for shapes. Computed in weight's dtype."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    taps = _Taps(q, weight)
    for block in taps.blocks():
        query = q[block].to(weight.dtype)
        attention = taps.softmax(query, taps.products(query, taps.windows(k, block, 0), 0), bias, rpb, scale)
        if dropout_mask is not None:
            attention *= slots_first(dropout_mask[block])
        out[block] = taps.total(taps.spread(attention, 0).mul_(taps.windows(v, block, 0)), attention, bias)
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
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    # Neighboring blocks add to the same rows, so these two are accumulated in full precision.
    grad_k, grad_v = (torch.zeros(q.shape, dtype=weight.dtype, device=q.device) for _ in range(2))
    grad_bias, grad_rpb = torch.zeros_like(bias), torch.zeros_like(rpb)
    taps = _Taps(q, weight)
    grad_by_slot = torch.zeros_like(taps.by_slot)
    for block in taps.blocks():
        query, grad = q[block].to(weight.dtype), grad_out[block].to(weight.dtype)
        keys, values = taps.windows(k, block, 0), taps.windows(v, block, 1)
        key_products, value_products = taps.products(query, keys, 0), taps.products(grad, values, 1)

        attention = taps.softmax(query, key_products, bias, rpb, scale)
        grad_attention = taps.gather(value_products).add_(per_slot(grad, bias))
        dropped = attention
        if dropout_mask is not None:
            mask = slots_first(dropout_mask[block])
            dropped = attention * mask
            grad_attention *= mask
        grad_attention -= (attention * grad_attention).sum(0)
        grad_logits = grad_attention.mul_(attention).mul_(scale)

        if parameters:
            grad_by_slot.addmm_(grad_logits.flatten(1), key_products.view(-1, taps.by_slot.shape[1]))
            grad_by_slot.addmm_(dropped.flatten(1), value_products.view(-1, taps.by_slot.shape[1]))
            grad_bias.addmm_(query.flatten(0, -2).t(), grad_logits.flatten(1).t())
            grad_bias.addmm_(grad.flatten(0, -2).t(), dropped.flatten(1).t())
            grad_rpb += (query.sum(-1) * grad_logits).sum((1, 2, 3)).t()

        spread = taps.spread(grad_logits, 1)
        total = taps.total(torch.mul(spread, keys, out=key_products), grad_logits, bias)
        grad_q[block] = total.add_((grad_logits * rpb.t()[:, None, None, None]).sum(0).unsqueeze(-1))
        taps.scatter(spread.mul_(query[..., None, None, :]), grad_k, block)
        taps.scatter(taps.spread(dropped, 0).mul_(grad[..., None, None, :]), grad_v, block)
    grads = grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
    if not parameters:
        return grads
    slots, kernel_size = weight.shape[1], weight.shape[-1]
    grad_weight = grad_by_slot.view(slots, kernel_size, kernel_size, -1).permute(3, 0, 1, 2).contiguous()
    return *grads, grad_weight, grad_bias, grad_rpb


def per_slot(x: Tensor, bias: Tensor) -> Tensor:
    """Σ_c x_c · b[c, j]: (images, rows, W, heads, d) to (k², images, rows, W, heads)."""
    return (bias.t() @ x.reshape(-1, x.shape[-1]).t()).view(-1, *x.shape[:-1])


def slots_first(x: Tensor) -> Tensor:
    """(images, rows, W, heads, k²) to (k², images, rows, W, heads)."""
    return x.movedim(-1, 0)


Block = tuple[slice, slice]  # some images and some of their rows


class _Taps:
    """The steps shared by forward and backward, for one map size.

    Blocks of channels are (images, rows, W, heads, d), of taps (images, rows, W, heads, k, k, d), of slots (k², images,
    rows, W, heads): a softmax over such a short last axis would be 20 times slower.
    """

    def __init__(self, q: Tensor, weight: Tensor) -> None:
        self.batch, self.height, self.width, self.heads, self.head_dims = q.shape
        self.kernel_size = weight.shape[-1]
        self.pad = self.kernel_size // 2
        # (slot, tap · channel): one matrix for all taps; MKL multiplies its transpose 2.5 times faster than a copy.
        self.by_slot = weight.permute(1, 2, 3, 0).reshape(weight.shape[1], -1)
        row_bytes = self.width * self.heads * self.by_slot.shape[1] * weight.element_size()
        budget = CPU_BLOCK_BYTES if q.device.type == 'cpu' else DEVICE_BLOCK_BYTES
        rows = max(1, budget // max(1, row_bytes))
        self.rows = min(self.height, rows)
        self.images = max(1, min(self.batch, rows // max(1, self.height)))
        # Reused by all blocks, since new memory causes page faults.
        self.buffers: list[Tensor] = []
        self.maps: list[Tensor] = []
        self.sums = self.by_slot.new_empty(self.images * self.rows * self.width * self.heads, self.head_dims)

    def blocks(self) -> Iterator[Block]:
        for image in range(0, self.batch, self.images):
            for row in range(0, self.height, self.rows):
                yield (
                    slice(image, min(image + self.images, self.batch)),
                    slice(row, min(row + self.rows, self.height)),
                )

    def windows(self, x: Tensor, block: Block, number: int) -> Tensor:
        """The k×k zero-padded neighbors of each pixel, an overlapping view: (images, rows, W, heads, k, k, d)."""
        images, rows = block
        padded = self.padded(number, images.stop - images.start, rows.stop - rows.start)
        source, target = self.halo(rows)
        padded[:, : target.start] = 0
        padded[:, target, self.pad : self.pad + self.width] = x[images, source]
        padded[:, target.stop :] = 0
        image, row, column, head, channel = padded.stride()
        return padded.as_strided(
            (len(padded), rows.stop - rows.start, *x.shape[2:4], self.kernel_size, self.kernel_size, self.head_dims),
            (image, row, column, head, row, column, channel),
        )

    def halo(self, rows: slice) -> tuple[slice, slice]:
        """The rows of the map covered by a block and its halo, and their position in the result of `padded`."""
        first, last = max(0, rows.start - self.pad), min(self.height, rows.stop + self.pad)
        offset = first - (rows.start - self.pad)
        return slice(first, last), slice(offset, offset + last - first)

    def padded(self, number: int, images: int, rows: int) -> Tensor:
        """Memory for a block and its halo, zero left and right: (images, rows + 2 pad, W + 2 pad, heads, d)."""
        while len(self.maps) <= number:
            height, width = self.rows + 2 * self.pad, self.width + 2 * self.pad
            self.maps.append(self.by_slot.new_zeros(self.images, height, width, self.heads, self.head_dims))
        return self.maps[number][:images, : rows + 2 * self.pad]

    def buffer(self, number: int, pixels: int) -> Tensor:
        """Memory for a block of taps, (pixels · heads, k² · d)."""
        while len(self.buffers) <= number:
            most = self.images * self.rows * self.width
            self.buffers.append(self.by_slot.new_empty(most * self.heads, self.by_slot.shape[1]))
        return self.buffers[number][: pixels * self.heads]

    def products(self, x: Tensor, windows: Tensor, buffer: int) -> Tensor:
        """x_c(p) · y_c(p + t): (images, rows, W, heads, k, k, d)."""
        products = self.buffer(buffer, x.shape[:3].numel()).view(windows.shape)
        return torch.mul(x[..., None, None, :], windows, out=products)

    def gather(self, products: Tensor) -> Tensor:
        """Σ_t Σ_c products[t, c] · W[c, j, t]: (k², images, rows, W, heads)."""
        return (self.by_slot @ products.view(-1, self.by_slot.shape[1]).t()).view(-1, *products.shape[:4])

    def spread(self, a: Tensor, buffer: int) -> Tensor:
        """Σ_j a_j · W[c, j, t]: (images, rows, W, heads, k, k, d)."""
        shape = (*a.shape[1:], self.kernel_size, self.kernel_size, self.head_dims)
        out = self.buffer(buffer, a.shape[1:4].numel())
        return torch.mm(a.flatten(1).t(), self.by_slot, out=out).view(shape)

    def total(self, products: Tensor, a: Tensor, bias: Tensor) -> Tensor:
        """Σ_t products[t, c] + Σ_j a_j · b[c, j]: (images, rows, W, heads, d)."""
        out = self.sums[: products.shape[:3].numel() * self.heads]
        torch.sum(products.view(len(out), -1, self.head_dims), dim=1, out=out)
        return out.addmm_(a.flatten(1).t(), bias.t()).view(*products.shape[:4], -1)

    def softmax(self, query: Tensor, products: Tensor, bias: Tensor, rpb: Tensor, scale: float) -> Tensor:
        """The attention weights from q_c(p) · k_c(p + t): (k², images, rows, W, heads)."""
        logits = self.gather(products).add_(per_slot(query, bias)).add_(query.sum(-1) * rpb.t()[:, None, None, None])
        return logits.mul_(scale).softmax(0)

    def scatter(self, contributions: Tensor, grad: Tensor, block: Block) -> None:
        """Adds each pixel's contributions to its k×k neighbors, a block of taps, to grad (B, H, W, heads, d)."""
        images, rows = block
        count = rows.stop - rows.start
        padded = self.padded(2, images.stop - images.start, count).zero_()
        for i in range(self.kernel_size):
            for j in range(self.kernel_size):
                padded[:, i : i + count, j : j + self.width] += contributions[..., i, j, :]
        target, source = self.halo(rows)
        grad[images, target] += padded[:, source, self.pad : self.pad + self.width]
