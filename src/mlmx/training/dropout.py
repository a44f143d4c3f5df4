"""Dropout on the CPU at a fraction of its usual cost.

torch draws a double per element from one sequential generator, and attention dropout keeps
`scaled_dot_product_attention` off its fused kernels: together a quarter of a training step. Here 8 random bits per
element are drawn in bulk (SFC64, Doty-Humphrey 2010), and attention works through one sample after the other, so that
its scores stay in the cache. The law is torch's: each element is dropped with probability p, the others scaled by
1 / (1 - p). p in 256ths lies between two thresholds, of which each tile draws one, so that the rate is exact.

Seeds are drawn from torch's own generator, so ``torch.manual_seed`` repeats the masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Tensor = torch.Tensor


class FastDropout(TorchFunctionMode):
    """Inside the block, dropout and attention with dropout on CPU tensors are those of this module.

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
    bias = None if attn_mask is None else attn_mask.to(query.dtype)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    attended: Tensor = _Attention.apply(query, key, value, bias, dropout_p, scale)  # type: ignore[no-untyped-call]
    return attended


def _is_ours(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.bfloat16)


class Bytes:
    """Random bytes by the tile, and the threshold below which a tile's bytes mean "dropped"."""

    def __init__(self, p: float) -> None:
        seed = int(torch.randint(2**63 - 1, ()).item())
        self.generator = np.random.Generator(np.random.SFC64(seed))
        self.floor, self.rest = divmod(p * 256, 1)

    def draw(self, shape: torch.Size) -> tuple[Tensor, float]:
        """uint8[shape] uniform bytes, and a bound between two of their values: p of them lie below it."""
        count = shape.numel()
        words = self.generator.bit_generator.random_raw(-(-count // 8))
        threshold = self.floor + (self.generator.random() < self.rest)
        return torch.from_numpy(words.view(np.uint8)[:count]).view(shape), threshold - 0.5


class _Dropout(torch.autograd.Function):
    """x[B, …] → x · kept / (1 - p)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        bytes_of, x = Bytes(p), x.contiguous()
        drawn = [bytes_of.draw(row.shape) for row in x]
        ctx.bytes, ctx.bounds, ctx.scale = [tile for tile, _ in drawn], [bound for _, bound in drawn], 1 / (1 - p)
        return _keep(x, ctx.bytes, ctx.bounds, ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _keep(grads[0].contiguous(), ctx.bytes, ctx.bounds, ctx.scale), None


def _keep(x: Tensor, tiles: list[Tensor], bounds: list[float], scale: float) -> Tensor:
    """x where its byte is above the bound, scaled; comparing floats is many times faster here than a bool mask."""
    kept = torch.empty_like(x)
    floats = torch.empty_like(x[0])
    for row, out, tile, bound in zip(x, kept, tiles, bounds, strict=True):
        floats.copy_(tile)
        torch.ops.aten.threshold_backward.grad_input(row, floats, bound, grad_input=out)
        out.mul_(scale)
    return kept


class _Attention(torch.autograd.Function):
    """softmax(q kᵀ · scale + bias), dropped out, times v; all [B, H, T, D], bias broadcast to [B, H, T, T].

    Kept for the backward pass is one tensor: probabilities where kept, minus them where dropped.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, p: float, scale: float
    ) -> Tensor:
        batch, heads, length, _ = query.shape
        bytes_of = Bytes(p)
        signed = query.new_empty((batch, heads, length, key.shape[2]))
        # The layout [B, T, H, D] is what the caller wants next.
        out = query.new_empty((batch, length, heads, value.shape[3])).transpose(1, 2)
        floats, kept = torch.empty_like(signed[0]), torch.empty_like(signed[0])
        with torch.autocast("cpu", enabled=False):
            for row in range(batch):
                scores = torch.baddbmm(kept, query[row], key[row].mT, beta=0, alpha=scale, out=kept)
                if bias is not None:
                    scores.add_(bias[row % len(bias)])
                torch.softmax(scores, -1, out=signed[row])
                tile, bound = bytes_of.draw(floats.shape)
                torch.copysign(signed[row], floats.copy_(tile).sub_(bound), out=signed[row])
                torch.clamp(signed[row], min=0, out=kept)
                out[row] = torch.bmm(kept, value[row])
        ctx.save_for_backward(query, key, value, signed)
        ctx.p, ctx.scale = p, scale
        return out.mul_(1 / (1 - p))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, signed = ctx.saved_tensors
        grad = grads[0] / (1 - ctx.p)
        d_query, d_key, d_value = (_like_projection(part) for part in (query, key, value))
        work, probabilities = torch.empty_like(signed[0]), torch.empty_like(signed[0])
        threshold = torch.ops.aten.threshold_backward.grad_input
        softmax_backward = torch.ops.aten._softmax_backward_data.out
        with torch.autocast("cpu", enabled=False):
            for row in range(len(query)):
                kept = torch.clamp(signed[row], min=0, out=work)
                d_value[row] = torch.bmm(kept.mT, grad[row])
                d_kept = torch.bmm(grad[row], value[row].mT, out=work)
                threshold(d_kept, signed[row], 0.0, grad_input=work)
                torch.abs(signed[row], out=probabilities)
                softmax_backward(work, probabilities, -1, work.dtype, grad_input=work)
                d_query[row] = torch.bmm(work, key[row]).mul_(ctx.scale)
                d_key[row] = torch.bmm(work.mT, query[row]).mul_(ctx.scale)
        return d_query, d_key, d_value, None, None, None


def _like_projection(part: Tensor) -> Tensor:
    """An empty [B, H, T, D] laid out as [B, T, H, D], as projections are and their gradients are wanted."""
    batch, heads, length, size = part.shape
    return part.new_empty((batch, length, heads, size)).transpose(1, 2)
