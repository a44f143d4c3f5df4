"""What a model is measured on: its own validation chunks, and the yardstick of held-out documents."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from mlmx.config.errors import WorkError
from mlmx.data.chunks import Chunks
from mlmx.data.heldout import BANDS, PIECES, HeldoutChunks, token_groups
from mlmx.data.masking import Masker
from mlmx.data.protocol import WholeWords, Yardstick, protocol_id
from mlmx.evaluation import scoring
from mlmx.evaluation.bootstrap import DocumentSums, Sums
from mlmx.evaluation.metrics import METRICS
from mlmx.kernels.memory import brief, is_out_of_memory, release

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Found = TypeVar("Found")
log = logging.getLogger("mlmx")


class Measure:
    """Scores a model: ``eval/*`` on its own validation chunks, and ``heldout/*`` by the yardstick.

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
        self.heldout, self.eval_chunks, self.mask = heldout, eval_chunks, replace(mask, fixed=True)
        self.vocabulary, self.batch_size = mask.vocabulary, batch_size
        self.protocol = "none" if heldout is None else protocol_id(heldout, tokenizer)
        self.documents: DocumentSums | None = None

    def __call__(self, trained: PreTrainedModel) -> dict[str, float]:
        """Loss, perplexity, accuracy and what plugins measure, of both; ``heldout/bits_per_byte``."""
        return self.within_memory(lambda: self._scores(trained))

    def _scores(self, trained: PreTrainedModel) -> dict[str, float]:
        found, size, rows = dict[str, float](), self.batch_size, self.heldout
        if self.eval_chunks is not None:
            sums = scoring.score(trained, self.eval_chunks, self.mask, size)
            found |= {f"eval/{name}": value for name, value in scoring.numbers(sums).items()}
        if rows is not None:
            self.documents = scoring.score_documents(trained, rows, Yardstick(self.vocabulary), size)
            found |= {f"heldout/{name}": value for name, value in scoring.numbers(self.documents.sums()).items()}
            if rows.word_bytes.any():  # words that are the same for every tokenizer
                loss = {"loss": METRICS["loss"]}
                words = scoring.score_documents(trained, rows, WholeWords(self.vocabulary), size, loss)
                found["heldout/bits_per_byte"] = scoring.bits_per_byte(words, rows.word_bytes)
        return found

    def breakdown(self, trained: PreTrainedModel, training: Chunks) -> dict[str, float]:
        """``final/heldout_loss_rare`` and the like: loss and accuracy by word frequency and by piece, if there are."""
        if (rows := self.heldout) is None:
            return {}
        groups, yardstick = token_groups(rows.tokens, training), Yardstick(self.vocabulary)
        found = self.within_memory(lambda: scoring.score_groups(trained, rows, groups, yardstick, self.batch_size))
        named = dict.fromkeys([*BANDS, *PIECES], Sums())
        for group, sums in found.items():
            for name in (list(BANDS)[group // 2], PIECES[group % 2]):
                named[name] += sums
        return {
            f"final/heldout_{metric}_{name}": value / sums.tokens
            for name, sums in named.items()
            for metric, value in sums.totals.items()
        }

    def within_memory(self, scored: Callable[[], Found]) -> Found:
        """What ``scored`` gives, with as many rows at once as fit."""
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
