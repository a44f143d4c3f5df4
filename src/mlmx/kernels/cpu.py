"""Dropout, attention and linear layers on the CPU at a fraction of their usual cost.

Dropout: torch draws a double per element from one sequential generator, and attention dropout keeps
`scaled_dot_product_attention` off its fused kernels: together a quarter of a training step. Here 8 random bits per
element come from the processor's AES unit (counter mode; Salmon et al. 2011), and attention works through a few heads
at a time, so that their scores stay in the cache. The law is torch's: each element is dropped with probability p, the
others scaled by 1 / (1 - p). p in 256ths lies between two thresholds, of which each row draws one, so that the rate is
exact.

Keys are drawn from torch's own generator, so ``torch.manual_seed`` repeats the masks.

Linear layers: fp32 products go forward through oneDNN and backward through MKL, each where it was the faster.

The norm of all gradients, by which they are clipped: exact and on all cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Tensor = torch.Tensor
Options = dict[str, Any] | None
Kept = Any  # what a forward pass keeps for its backward pass: torch's context, and attributes of ours
TILE = 3 << 19  # elements: three tensors of them fit into a cache of some megabytes, and calls do not count
MOST = 255 / 256  # of the elements can be dropped here
ZEROS = memoryview(bytes(TILE))  # to encrypt
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by their bytes
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]


class CpuKernels(TorchFunctionMode):
    """Inside the block, dropout, attention with dropout and fp32 linear layers on the CPU are those of this module.

    Not for activation checkpointing: what backward passes run again, they run outside of any such mode.
    """

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[Any, ...] = (), kwargs: Options = None
    ) -> object:
        kwargs = kwargs or {}
        if func is functional.dropout:
            return _dropout(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is functional.linear:
            return _linear(*args, **kwargs)
        return func(*args, **kwargs)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
    if not training or not 0 < p <= MOST or inplace or not _is_ours(input) or input.dim() < 2 or not input.numel():
        return functional.dropout(input, p, training, inplace)
    dropped: Tensor = _Dropout.apply(input, p)  # type: ignore[no-untyped-call]
    return dropped


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if not (0 < dropout_p <= MOST and not is_causal and not enable_gqa and query.dim() == 4 and _is_ours(query)):
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled("cpu"):
        lower = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(lower), key.to(lower), value.to(lower)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape).masked_fill_(~attn_mask, -math.inf)
    bias = None if attn_mask is None else attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attended: Tensor = _Attention.apply(query, key, value, bias, dropout_p, scale)  # type: ignore[no-untyped-call]
    return attended


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    ours = input.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not (ours and ONEDNN and input.device.type == "cpu" and input.numel()):
        return functional.linear(input, weight, bias)
    projected: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return projected


def _is_ours(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.bfloat16)


class Draws:
    """Random bytes by the tile, and for each of its rows the threshold below which a byte means "dropped"."""

    def __init__(self, p: float) -> None:
        key = torch.randint(-(2**63), 2**63 - 1, (2,)).numpy().tobytes()
        self.cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self.floor, self.rest = divmod(p * 256, 1)

    def draw(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """int8[N, …] uniform bytes, and int8[N, 1, …]: p of a row's bytes lie below its own on average."""
        drawn, coins = torch.empty(shape, dtype=torch.int8), np.empty(shape[0], np.uint32)
        for out in (drawn.view(-1).numpy().data.cast("B"), coins.data.cast("B")):
            self.cipher.update_into(ZEROS[: len(out)] if len(out) <= len(ZEROS) else bytes(len(out)), out)
        thresholds = (coins < self.rest * 2**32) + np.int8(self.floor - 128)
        return drawn, torch.from_numpy(thresholds).view(-1, *[1] * (len(shape) - 1))


def _bits(x: Tensor) -> Tensor:
    """The same memory as integers, on which arithmetic is several times as fast as on bf16."""
    return x.view(INTEGERS[x.itemsize])


def _positive(x: Tensor, out: Tensor) -> Tensor:
    """x where it is above 0, else 0."""
    torch.clamp(_bits(x), min=0, out=_bits(out))
    return out


class _Dropout(torch.autograd.Function):
    """x[…, D] → x · kept / (1 - p)."""

    @staticmethod
    def forward(ctx: Kept, x: Tensor, p: float) -> Tensor:
        draws, x = Draws(p), x.contiguous()
        drawn = [draws.draw(tile.shape) for tile in _rows(x)]
        ctx.kept, ctx.scale = [bytes_.ge_(thresholds) for bytes_, thresholds in drawn], 1 / (1 - p)
        return _scaled(x, ctx.kept, ctx.scale)

    @staticmethod
    def backward(ctx: Kept, *grads: Tensor) -> tuple[Tensor, None]:
        return _scaled(grads[0].contiguous(), ctx.kept, ctx.scale), None


def _scaled(x: Tensor, kept: list[Tensor], scale: float) -> Tensor:
    """x · scale where ``kept`` is 1, 0 where it is 0."""
    scaled = torch.empty_like(x)
    for tile, ones, out in zip(_rows(x), kept, _rows(scaled), strict=True):
        torch.mul(_bits(tile), ones, out=_bits(out))
        out.mul_(scale)
    return scaled


def _rows(x: Tensor) -> tuple[Tensor, ...]:
    """Views [N, D] of a contiguous tensor, of about `TILE` elements each."""
    return torch.split(x.view(-1, x.shape[-1]), max(1, TILE // x.shape[-1]))


class _Attention(torch.autograd.Function):
    """softmax(q kᵀ · scale + bias), dropped out, times v; all [B, H, T, D], bias [B, H, T, T].

    Saved for the backward pass is one large tensor: probabilities where kept, minus them where dropped.
    """

    @staticmethod
    def forward(
        ctx: Kept, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, p: float, scale: float
    ) -> Tensor:
        query, key, value, heads = *map(_by_head, (query, key, value)), query.shape[1]
        draws = Draws(p)
        signed = query.new_empty((len(query), query.shape[1], key.shape[1]))
        out = query.new_empty((*query.shape[:2], value.shape[2]))
        sign = -(1 << 8 * signed.itemsize - 1)
        with torch.autocast("cpu", enabled=False):
            for at, work, _ in _tiles(signed, heads):
                scores = _product(query[at], key[at].mT, scale, out=work)
                if bias is not None:
                    samples = scores.view(-1, min(heads, len(scores)), *scores.shape[1:])
                    row, head = divmod(at.start, heads)
                    samples.add_(bias[row : row + len(samples), head : head + samples.shape[1]])
                probabilities = torch.softmax(scores, -1, out=signed[at])
                dropped = torch.lt(*draws.draw(scores.shape), out=torch.empty(scores.shape, dtype=torch.int8))
                _bits(probabilities).add_(dropped, alpha=sign)
                _product(_positive(probabilities, out=work), value[at], 1 / (1 - p), out=out[at])
        ctx.save_for_backward(query, key, value, signed)
        ctx.p, ctx.scale, ctx.heads = p, scale, heads
        return _by_sample(out, heads)

    @staticmethod
    def backward(ctx: Kept, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, signed = ctx.saved_tensors
        grad, upscale = _by_head(grads[0]), 1 / (1 - ctx.p)
        d_query, d_key, d_value = map(torch.empty_like, (query, key, value))
        threshold = torch.ops.aten.threshold_backward.grad_input
        softmax_backward = torch.ops.aten._softmax_backward_data.out  # noqa: SLF001 (no public one writes in place)
        with torch.autocast("cpu", enabled=False):
            for at, work, probabilities in _tiles(signed, ctx.heads):
                _product(_positive(signed[at], out=work).mT, grad[at], upscale, out=d_value[at])
                bits = _bits(_product(grad[at], value[at].mT, upscale, out=work))
                threshold(bits, _bits(signed[at]), 0, grad_input=bits)
                torch.abs(signed[at], out=probabilities)
                softmax_backward(work, probabilities, -1, work.dtype, grad_input=work)
                _product(work, key[at], ctx.scale, out=d_query[at])
                _product(work.mT, query[at], ctx.scale, out=d_key[at])
        return *(_by_sample(part, ctx.heads) for part in (d_query, d_key, d_value)), None, None, None


def _product(left: Tensor, right: Tensor, scale: float, out: Tensor) -> Tensor:
    """left @ right · scale, scaled before it is rounded."""
    return torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)


def _by_head(part: Tensor) -> Tensor:
    """[B, H, T, D] → [B · H, T, D], contiguous: products of views that are not copy them, tile by tile."""
    return part.reshape(-1, *part.shape[2:]).contiguous()


def _by_sample(part: Tensor, heads: int) -> Tensor:
    """[B · H, T, D] → [B, H, T, D], laid out as [B, T, H, D], as projections are and what is next wants it."""
    return part.view(-1, heads, *part.shape[1:]).transpose(1, 2).contiguous().transpose(1, 2)


def _tiles(signed: Tensor, heads: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Places of some heads of one sample or of all those of some samples, with two tensors to work in."""
    fit = max(1, TILE // signed[0].numel())
    size = fit // heads * heads or max(part for part in range(1, fit + 1) if heads % part == 0)
    size = min(size, len(signed))
    first, second = torch.empty_like(signed[:size]), torch.empty_like(signed[:size])
    for start in range(0, len(signed), size):
        at = slice(start, min(start + size, len(signed)))
        number = at.stop - start
        yield at, first[:number], second[:number]


class _Linear(torch.autograd.Function):
    """x wᵀ + b."""

    @staticmethod
    def forward(ctx: Kept, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        product = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 (torch asks oneDNN by no other name)
        projected: Tensor = product(x, weight, bias, "none", [], "")
        return projected

    @staticmethod
    def backward(ctx: Kept, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        return (
            grads[0] @ weight if needs_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def total_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """√Σ g² over all gradients, float[]; 0 without any.

    Row by row, then over the rows in fp64: torch adds up the squares of a whole tensor in one float per vector lane and
    on one core, which on the CPU loses 5e-4 of the norm of 66 million gradients, and takes twice the time.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.tensor(0.0)
    norm_of = torch.linalg.vector_norm
    rows = [norm_of(part.flatten(1), dim=1) if part.dim() > 1 else part.flatten() for part in gradients]
    together = torch.cat(rows)
    norm: torch.Tensor = norm_of(together, dtype=torch.float64)
    return norm.to(together.dtype)


def clip(
    parameters: Iterable[torch.nn.Parameter], most: float, optimizer: torch.optim.Optimizer | None = None
) -> torch.Tensor:
    """Scale all gradients so that their norm is at most ``most``; returns the norm before.

    A fused Adam scales them itself when it reads them, which saves a pass over all of them.
    """
    parameters = list(parameters)
    norm = total_norm(parameters)
    beyond = bool(norm > most)  # where nothing is to be scaled, torch multiplies by 1
    if isinstance(optimizer, torch.optim.Adam) and optimizer.defaults.get("fused"):  # AdamW is one
        step: Any = optimizer
        step.grad_scale = (norm.float() + 1e-6) / most if beyond else None  # what it divides by, as torch does
    elif beyond:
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm
