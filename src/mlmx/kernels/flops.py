"""How much of the machine a training uses: useful floating-point operations against what it can multiply."""

from __future__ import annotations

import statistics
import time
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MEASURED_SECONDS = 1.0  # a processor that only imitates a precision takes that and more for one product


def flops_per_token(model: PreTrainedModel, chunk_size: int, masked_share: float = 1.0) -> float:
    """Useful floating-point operations of a training step per token, forward and backward (Kaplan et al. 2020).

    6 × weights of the encoder's linear layers + 12 × layers × hidden size × chunk size for attention (q kᵀ and p v)
    + 6 × weights of the head × share of positions that are scored. Embedding look-ups, norms, softmax and what a
    cleverer step leaves out count nothing either way.
    """
    encoder, config = model.base_model, model.config
    inside = {id(module) for module in encoder.modules()}
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    body = sum(linear.weight.numel() for linear in linears if id(linear) in inside)
    body *= config.num_hidden_layers // getattr(config, "num_hidden_groups", config.num_hidden_layers)  # ALBERT shares
    head = sum(linear.weight.numel() for linear in linears if id(linear) not in inside)
    attention = 12 * config.num_hidden_layers * config.hidden_size * chunk_size
    return float(6 * body + attention + 6 * head * masked_share)


@cache
def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations per second of this machine's own matrix product, the best of a few."""
    size, rounds = (1024, 9) if device == "cpu" else (8192, 20)
    numbers = torch.Generator(device)  # its own: a training's random state must not depend on who measured before
    left, right = (torch.randn(size, size, device=device, generator=numbers).to(dtype) for _ in range(2))
    out, wait = torch.empty_like(left), torch.cpu.synchronize if device == "cpu" else torch.accelerator.synchronize
    seconds: list[float] = []
    while len(seconds) < rounds and sum(seconds) < MEASURED_SECONDS:
        wait()
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        wait()
        seconds.append(time.perf_counter() - began)
    usual = statistics.quantiles(seconds, n=4)[0] if len(seconds) > 1 else seconds[0]
    return float(2 * size**3 / usual)
