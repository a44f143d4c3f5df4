"""What a model is measured on: the run's own validation chunks (``eval/*``) and the yardstick (``heldout/*``)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mlmx.config.errors import WorkError
from mlmx.data import protocol
from mlmx.data.chunks import Chunks
from mlmx.data.heldout import (
    BANDS,
    PIECES,
    HeldoutChunks,
    token_groups,
)
from mlmx.data.masking import Masker
from mlmx.data.protocol import protocol_id
from mlmx.evaluation.bootstrap import DocumentSums, Sums
from mlmx.models import head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Found = TypeVar("Found")
log = logging.getLogger("mlmx")


class Measure:
    """Scores a model on both; the same targets each time it is called.

    Attributes:
        protocol: what ``heldout/*`` is measured on, as an id.
        batch_size: rows scored at once; halved where memory does not suffice, which moves no score.
        documents: per-document sums of the last call.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mask: Masker,
        heldout: HeldoutChunks | None,
        batch_size: int,
        eval_chunks: Chunks | None = None,
    ) -> None:
        self.heldout = heldout
        self.vocabulary = mask.vocabulary
        self.batch_size = batch_size
        self.eval_chunks = eval_chunks
        self.eval_mask = replace(mask, fixed=True)
        self.protocol = "none" if heldout is None else protocol_id(heldout, tokenizer)
        self.documents: DocumentSums | None = None

    def __call__(self, trained: PreTrainedModel) -> dict[str, float]:
        """``eval/loss eval/perplexity eval/accuracy``, the same of ``heldout/``, and ``heldout/bits_per_byte``."""
        with fast_kernels(trained):
            return self.within_memory(lambda: self._scores(trained))

    def within_memory(self, scored: Callable[[], Found]) -> Found:
        """What ``scored`` gives, with as many rows at once as fit."""
        from mlmx.kernels.out_of_memory import brief, is_out_of_memory, release

        while True:
            try:
                return scored()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = brief(error)
            release()
            if self.batch_size == 1:
                raise WorkError(f"out of memory scoring a single row ({reason}): choose a smaller chunk_size or model")
            self.batch_size = (self.batch_size + 1) // 2
            log.warning("out of memory while scoring (%s): %d rows at once from here on", reason, self.batch_size)

    def _scores(self, trained: PreTrainedModel) -> dict[str, float]:
        from mlmx.evaluation import scoring

        found: dict[str, float] = {}
        if self.eval_chunks is not None:
            batches = scoring.batches_of(self.eval_chunks, self.eval_mask, self.batch_size)
            sums = scoring.score(trained, batches, head.masked_logits)
            found |= {f"eval/{name}": value for name, value in scoring.numbers(sums).items()}
        return found if self.heldout is None else found | self._yardstick(trained, self.heldout)

    def _yardstick(self, trained: PreTrainedModel, heldout: HeldoutChunks) -> dict[str, float]:
        from mlmx.evaluation import scoring

        score = partial(scoring.score_documents, trained, heldout, batch_size=self.batch_size)
        self.documents = score(collate=protocol.Yardstick(self.vocabulary), masked_logits=head.masked_logits)
        found = {f"heldout/{name}": value for name, value in scoring.numbers(self.documents.sums()).items()}
        words = score(collate=protocol.WholeWords(self.vocabulary), masked_logits=head.masked_logits)
        if heldout.word_bytes.any():
            found["heldout/bits_per_byte"] = scoring.bits_per_byte(words, heldout.word_bytes)
        return found

    def breakdown(self, trained: PreTrainedModel, training: Chunks) -> dict[str, float]:
        """``final/heldout_loss_rare`` and the like: loss and accuracy by word frequency and by piece."""
        from mlmx.evaluation import scoring

        if self.heldout is None:
            return {}
        per_token = token_groups(self.heldout.tokens, training)
        groups, collate = partial(_groups_of, per_token), protocol.Yardstick(self.vocabulary)
        score = partial(scoring.score_groups, trained, self.heldout, groups, collate, masked_logits=head.masked_logits)
        with fast_kernels(trained):
            found = self.within_memory(lambda: score(batch_size=self.batch_size))
        named: dict[str, Sums] = {}
        for group, sums in found.items():
            for name in (list(BANDS)[group // 2], PIECES[group % 2]):
                named[name] = named.get(name, Sums()) + sums
        return {
            f"final/heldout_{metric}_{name}": value
            for name in [*BANDS, *PIECES]
            if name in named
            for metric, value in scoring.numbers(named[name]).items()
            if metric in ("loss", "accuracy")
        }


def fast_kernels(trained: PreTrainedModel) -> contextlib.AbstractContextManager[Any]:
    """The kernels that training uses on the CPU."""
    from mlmx.kernels.cpu import CpuKernels

    return CpuKernels() if trained.device.type == "cpu" else contextlib.nullcontext()


def _groups_of(per_token: Any, rows: Sequence[Any]) -> Any:
    groups = np.zeros((len(rows), max(len(row["input_ids"]) for row in rows)), np.int8)
    for line, row in zip(groups, rows, strict=True):
        own = per_token[row["start"] : row["start"] + row["length"]]
        line[row["num_prefix"] : row["num_prefix"] + len(own)] = own
    return groups
