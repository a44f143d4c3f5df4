"""How a step's loss is computed: corrected for masked LM, or by the library as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, TrainingArguments

from mlmx.config.labels import IGNORE_INDEX
from mlmx.kernels.cpu import CpuKernels
from mlmx.kernels.memory import Batch

# Logits and labels of a batch's masked positions, in so many rows.
MaskedLogits = Callable[[torch.nn.Module, Batch, int | None], tuple[torch.Tensor, torch.Tensor]]
ROWS = 32  # to a multiple of which the rows of targets are filled up: two tiles of AMX


class Corrected:
    """Loss = Σ cross-entropy ÷ masked tokens of the whole effective batch, over micro-batches and processes.

    The library multiplies loss and gradient by the accumulation steps for every masked-LM head that takes
    ``**kwargs`` without using them (huggingface/transformers#47688).
    """

    def __init__(self, arguments: TrainingArguments, masked_logits: MaskedLogits, most_targets: int | None) -> None:
        self.args, self.masked_logits = arguments, masked_logits
        self.most_targets = most_targets if arguments.device.type == "cuda" else None  # more than a batch can have

    def drawing(self, model: torch.nn.Module, step: int, *place: int) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch, of this number within the step, or of a part of it."""
        # Dropout is a function of (seed, step, place within the step, process), not of what was drawn before.
        torch.manual_seed(hash((self.args.seed, step, *place, self.args.process_index)) & (2**63 - 1))
        # Such a mode reaches neither what a compiler traces nor what a backward pass runs again.
        beyond = self.args.torch_compile or getattr(model, "is_activation_checkpointing", False)
        return CpuKernels() if self.args.device.type == "cpu" and not beyond else contextlib.nullcontext()

    def loss(
        self, model: torch.nn.Module, inputs: Batch, num_items: torch.Tensor | int | None, share: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss, float[], and logits; ``share``: rows of this batch, of how many in a whole one.

        ``num_items``: targets of the whole effective batch; None for those of this one.
        """
        # Rows of few shapes, since kernels are made for each; on a GPU of one, so that nothing waits for the device and
        # compiled code is made once.
        if self.most_targets:
            rows = -(-self.most_targets * share[0] // share[1])
        else:
            rows = -(-int(inputs["labels"].ne(IGNORE_INDEX).sum()) // ROWS) * ROWS
        logits, labels = self.masked_logits(model, inputs, rows)
        total = cross_entropy(logits.float(), labels, reduction="sum")
        count = labels.ne(IGNORE_INDEX).sum() if num_items is None else num_items
        # max: an effective batch without targets has loss 0, not NaN.
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        if self.args.average_tokens_across_devices:
            loss = loss * self.args.world_size  # DDP averages gradients: undo it
        return loss, logits


def stock_batch(collate: DataCollatorForLanguageModeling, rows: Any) -> Any:  # noqa: ANN401 (as the library's)
    """What the stock collator makes of chunks (see `Chunks`), of which it knows ids and attention, int64[T] each."""
    own = rows["input_ids"] if isinstance(rows, dict) else [row["input_ids"] for row in rows]
    ids = [torch.tensor(row, dtype=torch.long) for row in own]
    return collate([{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids])


@contextlib.contextmanager
def in_full_precision(model: PreTrainedModel) -> Iterator[None]:
    """The model's own ``forward`` inside the block: accelerate wraps it in autocast for mixed precision.

    Scores are taken in fp32 whatever a run trains in, so that ``evaluate`` on the saved model repeats them.
    """
    wrapped, own = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    if own is None:
        yield
        return
    model.forward = own
    try:
        yield
    finally:
        model.forward = cast(Any, wrapped)
