"""Dropout, attention and linear layers on the CPU at a fraction of their usual cost.

Dropout: torch draws a double per element from one sequential generator, and attention dropout keeps
`scaled_dot_product_attention` off its fused kernels: together a quarter of a training step. Here 8 random bits per
element are drawn in bulk (SFC64, Doty-Humphrey 2010), and attention works through a few heads at a time, so
that their scores stay in the cache. The law is torch's: each element is dropped with probability p, the others scaled
by 1 / (1 - p). p in 256ths lies between two thresholds, of which each row draws one, so that the rate is exact.

Seeds are drawn from torch's own generator, so ``torch.manual_seed`` repeats the masks.

Linear layers: fp32 products go forward through oneDNN and backward through MKL, each where it was the faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Tensor = torch.Tensor
TILE = 3 << 19  # elements: three tensors of them fit into a cache of some megabytes, and calls do not count
ONEDNN = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class CpuKernels(TorchFunctionMode):
    """Inside the block, dropout, attention with dropout and fp32 linear layers on the CPU are those of this module.

    Not for activation checkpointing: what backward passes run again, they run outside of any such mode.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.dropout:
            return _dropout(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is functional.linear:
            return _linear(*args, **kwargs)
        return func(*args, **kwargs)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
    if not training or not 0 < p < 1 or inplace or not _is_ours(input) or input.dim() < 2:
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
    ours = 0 < dropout_p < 1 and not is_causal and not enable_gqa and query.dim() == 4 and _is_ours(query)
    if not ours:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled("cpu"):
        lower = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(lower), key.to(lower), value.to(lower)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape).masked_fill_(~attn_mask, -math.inf)
    bias = None
    if attn_mask is not None:
        bias = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
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


class Bytes:
    """Random bytes by the tile, and for each of its rows the threshold below which a byte means "dropped"."""

    def __init__(self, p: float) -> None:
        seed = int(torch.randint(2**63 - 1, ()).item())
        self.generator = np.random.Generator(np.random.SFC64(seed))
        self.floor, self.rest = divmod(p * 256, 1)

    def draw(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """uint8[N, …] uniform bytes, and float32[N] whole numbers: p of a row's bytes lie below its own on average."""
        count = shape.numel()
        words = self.generator.bit_generator.random_raw(-(-count // 8))
        thresholds = self.floor + (self.generator.random(shape[0], np.float32) < self.rest)
        return torch.from_numpy(words.view(np.uint8)[:count]).view(shape), torch.from_numpy(thresholds).float()


def _above(bytes_: Tensor, thresholds: Tensor, out: Tensor) -> Tensor:
    """Bytes less the threshold of their row, as floats in ``out``: negative where dropped, exact in bf16."""
    return out.copy_(bytes_).sub_(thresholds.to(out.dtype).view(-1, *[1] * (out.dim() - 1)))


class _Dropout(torch.autograd.Function):
    """x[…, D] → x · kept / (1 - p)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        bytes_of, x = Bytes(p), x.contiguous()
        ctx.drawn, ctx.scale = [bytes_of.draw(tile.shape) for tile in _rows(x)], 1 / (1 - p)
        return _keep(x, ctx.drawn, ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _keep(grads[0].contiguous(), ctx.drawn, ctx.scale), None


def _keep(x: Tensor, drawn: list[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """x where its byte is not dropped, scaled; comparing floats is many times faster here than a bool mask."""
    kept = torch.empty_like(x)
    tiles = _rows(x)
    floats = torch.empty_like(tiles[0])
    for tile, out, (bytes_, thresholds) in zip(tiles, _rows(kept), drawn, strict=True):
        above = _above(bytes_, thresholds, floats[: len(tile)])
        torch.ops.aten.threshold_backward.grad_input(tile, above, -0.5, grad_input=out)
        out.mul_(scale)
    return kept


def _rows(x: Tensor) -> tuple[Tensor, ...]:
    """Views [N, D] of a contiguous tensor, of about `TILE` elements each."""
    return torch.split(x.view(-1, x.shape[-1]), max(1, TILE // x.shape[-1]))


class _Attention(torch.autograd.Function):
    """softmax(q kᵀ · scale + bias), dropped out, times v; all [B, H, T, D], bias [B, H, T, T].

    Kept for the backward pass is one large tensor: probabilities where kept, minus them where dropped.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, p: float, scale: float
    ) -> Tensor:
        query, key, value, heads = *map(_by_head, (query, key, value)), query.shape[1]
        bytes_of = Bytes(p)
        signed = query.new_empty((len(query), query.shape[1], key.shape[1]))
        out = query.new_empty((*query.shape[:2], value.shape[2]))
        with torch.autocast("cpu", enabled=False):
            for at, floats, kept in _tiles(signed, heads):
                scores = torch.baddbmm(kept, query[at], key[at].mT, beta=0, alpha=scale, out=kept)
                if bias is not None:
                    _add_bias(scores, bias, at.start, heads)
                torch.softmax(scores, -1, out=signed[at])
                torch.copysign(signed[at], _above(*bytes_of.draw(floats.shape), out=floats), out=signed[at])
                torch.clamp(signed[at], min=0, out=kept)
                torch.bmm(kept, value[at], out=out[at])
        ctx.save_for_backward(query, key, value, signed)
        ctx.p, ctx.scale, ctx.heads = p, scale, heads
        return _by_sample(out.mul_(1 / (1 - p)), heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, signed = ctx.saved_tensors
        grad = _by_head(grads[0] / (1 - ctx.p))
        d_query, d_key, d_value = map(torch.empty_like, (query, key, value))
        threshold = torch.ops.aten.threshold_backward.grad_input
        softmax_backward = torch.ops.aten._softmax_backward_data.out
        with torch.autocast("cpu", enabled=False):
            for at, work, probabilities in _tiles(signed, ctx.heads):
                kept = torch.clamp(signed[at], min=0, out=work)
                torch.bmm(kept.mT, grad[at], out=d_value[at])
                d_kept = torch.bmm(grad[at], value[at].mT, out=work)
                threshold(d_kept, signed[at], 0.0, grad_input=work)
                torch.abs(signed[at], out=probabilities)
                softmax_backward(work, probabilities, -1, work.dtype, grad_input=work)
                torch.bmm(work, key[at], out=d_query[at])
                torch.bmm(work.mT, query[at], out=d_key[at])
        d_query.mul_(ctx.scale)
        d_key.mul_(ctx.scale)
        return *(_by_sample(part, ctx.heads) for part in (d_query, d_key, d_value)), None, None, None


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


def _add_bias(scores: Tensor, bias: Tensor, start: int, heads: int) -> None:
    """Add the bias [B, H, T, T] of the heads from ``start`` on to their scores [H', T, T], in place."""
    samples = scores.view(-1, min(heads, len(scores)), *scores.shape[1:])
    row, head = divmod(start, heads)
    samples.add_(bias[row : row + len(samples), head : head + samples.shape[1]])


class _Linear(torch.autograd.Function):
    """x wᵀ + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        projected: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return projected

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        return (
            grads[0] @ weight if needs_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
