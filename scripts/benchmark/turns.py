"""A real training that takes one step when it is told to, and a watch on what its time goes to."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear
from transformers import TrainerCallback

from benchmark.flops import gemm_shapes
from benchmark.sizes import MLM_PROBABILITY

if TYPE_CHECKING:
    from benchmark.workers import Channel

GEMM_SECONDS = 0.2  # per shape
RSS_BYTES = 1 if sys.platform == "darwin" else 1024  # unit of ru_maxrss


class Turns(TrainerCallback):
    """Pauses a `Trainer` between steps until the parent asks for more.

    Asked ``steps``, it answers with the seconds from there to the end of the last of them: fetching, masking, forward,
    backward and optimizer. The training ends by `SystemExit` when asked to ``stop``.
    """

    def __init__(self, channel: Channel, chunk_size: int) -> None:
        self.channel = channel
        self.chunk_size = chunk_size
        self.begun = False
        self.left = 0
        self.since = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.begun:
            self.begun = True
            self.channel.send(about(args, model.config))
            self.wait(args, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.channel.send(time.perf_counter() - self.since)
            self.wait(args, model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"the corpus is used up after {state.global_step} steps: scoring would be timed as training")

    def wait(self, args: Any, model: Any) -> None:
        while True:
            asked, given = self.channel.receive()
            if asked == "steps":
                self.left, self.since = given["count"], time.perf_counter()
                return
            if asked == "stop":
                raise SystemExit(0)
            answers = {"peak": self.peak, "memory": peak_memory}
            self.channel.send(answers[asked](args, model.config))

    def peak(self, args: Any, config: Any) -> float:
        """The best rate of this model's own matrix products, in FLOP/s, in the precision it trains in."""
        tokens = args.per_device_train_batch_size * self.chunk_size
        widths = widths_of(config)
        widths.pop("layers")
        shapes = gemm_shapes(**widths, tokens=tokens, scored_share=MLM_PROBABILITY)
        return max(gemm_rate(shape, dtype_of(args), args.device) for shape in shapes)


def about(args: Any, config: Any) -> dict[str, Any]:
    """What is being trained, and how."""
    return {"precision": str(dtype_of(args)).removeprefix("torch."), "device": args.device.type} | widths_of(config)


def dtype_of(args: Any) -> torch.dtype:
    """The type that matrix products are computed in."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def widths_of(config: Any) -> dict[str, int]:
    """Layers and widths of a DistilBERT or BERT, as `flops.flops_per_token` names them."""
    intermediate = config.hidden_dim if config.model_type == "distilbert" else config.intermediate_size
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "intermediate": intermediate,
        "vocabulary": config.vocab_size,
    }


def gemm_rate(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of one matrix product, the best of repeats that fill `GEMM_SECONDS`."""
    rows, inner, columns = shape
    inputs, weights = torch.randn(rows, inner), torch.randn(columns, inner)
    inputs, weights = inputs.to(device, dtype), weights.to(device, dtype)
    best, until = 0.0, time.perf_counter() + GEMM_SECONDS
    with torch.no_grad():
        while best == 0.0 or time.perf_counter() < until:
            began = time.perf_counter()
            linear(inputs, weights)
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - began))
    return best


def peak_memory(args: Any, _config: Any) -> int:
    """The most memory this process has held, in bytes: that of the device where there is one."""
    if args.device.type == "cuda":
        return int(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_BYTES


class Stopwatch(TrainerCallback):
    """Seconds of a run that are its own work: steps, and the calls of the methods it is shown (scoring, saving)."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.running = False
        self.since = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.since

    @contextlib.contextmanager
    def watching(self, *methods: tuple[Any, str]) -> Iterator[None]:
        """Inside the block the time of these methods counts; one called by another counts once."""
        own = [getattr(owner, name) for owner, name in methods]
        for (owner, name), method in zip(methods, own, strict=True):
            setattr(owner, name, self._watched(method))
        try:
            yield
        finally:
            for (owner, name), method in zip(methods, own, strict=True):
                setattr(owner, name, method)

    def _watched(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.running:
                return method(*args, **kwargs)
            self.running, began = True, time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.running = False
                self.seconds += time.perf_counter() - began

        return watched
