import torch
from torch import Tensor
from torch.autograd import forward_ad

from .autocast import without_autocast
from .backends import BACKENDS, check_backend, choose_backend


def slide_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Slide Attention (CVPR 2023, arXiv 2304.04237, section 4): each pixel attends to its k×k deformed neighbors.

    K_j(p) = Σ_t weight[c, j, t] · k[c, p + t] + bias[c, j] for slot j, V_j likewise from v, and:

        out = Σ_j softmax_j(scale · Σ_c q[c] · (K_j[c] + rpb[head, j])) · V_j

    Taps outside the map are zeros and take part in the softmax.

    Args:
        q, k, v: (B, H, W, heads, d), one floating-point dtype.
        weight: (d, k², k, k), slot then tap, the sum of the fixed shift and the learned path, shared by all heads and
            by K and V; float32 (or float64) for any dtype of q, since a half-precision sum would lose a small learned
            part.
        bias: (d, k²), dtype of weight.
        rpb: (heads, k²), added to K, dtype of weight.
        scale: multiplies the logits; None is d ** -0.5.
        dropout_p: probability of zeroing an attention weight, as in `scaled_dot_product_attention`.
        backend: 'native' (compiled CPU kernels for float32, bfloat16 and float16 with float32 arithmetic; extra memory
            only for each thread's sums of the kernels' gradients and, in half precision, float32 gradients of k and v),
            'tapwise' (extra memory at most the size of the inputs, forward and backward), 'triton' (GPU kernels; extra
            memory of 2·k² float32 numbers per pixel and head in backward, none in forward), 'gpu' ('triton' if it
            passes a check on the device, else 'tapwise'), 'unrolled' (plain operations, for tracing and export; stores
            many maps in training), 'conv' (one convolution; stores K and V k² times), 'reference' (likewise; reads like
            the equation). None selects one with `choose_backend`.

    Returns:
        (B, H, W, heads, d), dtype of q. Computed in the wider of q's and weight's dtypes, also under autocast.

    Raises:
        ValueError: shapes or dtypes are inconsistent, or the backend is unknown or does not support the arguments.
    """
    _check(q, k, v, weight, bias, rpb, dropout_p)
    check_backend('backend', backend)
    if backend is None:
        backend = choose_backend(q, weight)
    chosen = BACKENDS[backend]
    if reason := chosen.refusal(q, weight):
        raise ValueError(f"backend '{backend}' {reason}; use None for the best supported one")
    if chosen.widens and forward_ad._current_level >= 0:  # a custom operator would lose tangents silently
        raise ValueError(
            f"backend '{backend}' has no forward-mode derivatives; use 'conv', or None for the best one that has"
        )
    if not q.numel():
        chosen = BACKENDS['reference']  # convolutions and kernels do not support empty maps
    if scale is None:
        scale = q.shape[-1] ** -0.5

    dtype = torch.promote_types(q.dtype, weight.dtype)
    dropout_mask = None
    if dropout_p > 0:
        keep = torch.rand(*q.shape[:-1], weight.shape[1], device=q.device) >= dropout_p
        dropout_mask = keep.to(dtype) / (1 - dropout_p)
    maps = (q, k, v) if chosen.widens else (q.to(dtype), k.to(dtype), v.to(dtype))
    with without_autocast(q):
        parameters = (weight.to(dtype), bias.to(dtype), rpb.to(dtype))
        return chosen.run(*maps, *parameters, scale, dropout_mask).to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, rpb: Tensor, dropout_p: float) -> None:
    if q.ndim != 5 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            'q, k and v must all be (B, H, W, heads, d), got '
            f'q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}'
        )
    devices = {x.device for x in (q, k, v, weight, bias, rpb)}
    if len(devices) > 1:
        raise ValueError(f'q, k, v, weight, bias and rpb must be on one device, got {sorted(map(str, devices))}')
    heads, head_dims = q.shape[-2:]
    kernel_size = weight.shape[-1]
    slots = kernel_size**2
    if kernel_size % 2 == 0 or weight.shape != (head_dims, slots, kernel_size, kernel_size):
        raise ValueError(
            f'weight must be (d, k², k, k) with d = {head_dims} as in q and k odd, got {tuple(weight.shape)}'
        )
    if bias.shape != (head_dims, slots):
        raise ValueError(f'bias must be (d, k²) = {(head_dims, slots)}, got {tuple(bias.shape)}')
    if rpb.shape != (heads, slots):
        raise ValueError(f'rpb must be (heads, k²) = {(heads, slots)}, got {tuple(rpb.shape)}')
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f'q, k and v must share one floating-point dtype, got {q.dtype}, {k.dtype}, {v.dtype}')
    if weight.dtype not in (torch.float32, torch.float64) or bias.dtype != weight.dtype or rpb.dtype != weight.dtype:
        raise ValueError(
            'weight, bias and rpb must all be float32 (or all float64): merge the shift and the learned kernels before '
            f'any rounding; got {weight.dtype}, {bias.dtype}, {rpb.dtype}'
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f'dropout_p must be in [0, 1), got {dropout_p=}')
