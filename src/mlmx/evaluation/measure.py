"""What a model is measured on: a list of evaluators, each a map from the model to named numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from mlmx.config.errors import WorkError
from mlmx.data.chunks import Chunks
from mlmx.data.heldout import BANDS, PIECES, HeldoutChunks, token_groups
from mlmx.data.masking import Masker, Vocabulary
from mlmx.data.protocol import WholeWords, Yardstick, protocol_id
from mlmx.evaluation import scoring
from mlmx.evaluation.bootstrap import DocumentSums, Sums
from mlmx.evaluation.metrics import METRICS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Found = TypeVar("Found")
log = logging.getLogger("mlmx")


# Maps a model to named numbers, so many rows at once, on the same targets each time.
Evaluator = Callable[["PreTrainedModel", int], dict[str, float]]


class Measure:
    """Scores a model by a list of evaluators: ``eval/*``, and ``heldout/*`` of the yardstick.

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
        self.protocol = "none" if heldout is None else protocol_id(heldout, tokenizer)
        self.documents: DocumentSums | None = None
        self.evaluators: list[Evaluator] = []
        if eval_chunks is not None:
            self.evaluators.append(partial(own_validation, eval_chunks, replace(mask, fixed=True)))
        if heldout is not None:
            self.evaluators.append(partial(self._yardstick, heldout))
        if heldout is not None and heldout.word_bytes.any():
            self.evaluators.append(partial(whole_words, heldout, self.vocabulary))

    def __call__(self, trained: PreTrainedModel) -> dict[str, float]:
        """The numbers of all evaluators."""
        return self._numbers(trained, self.evaluators)

    def breakdown(self, trained: PreTrainedModel, training: Chunks) -> dict[str, float]:
        """Those of `word_kinds`; none where nothing is held out."""
        if self.heldout is None:
            return {}
        groups = token_groups(self.heldout.tokens, training)
        return self._numbers(trained, [partial(word_kinds, self.heldout, self.vocabulary, groups)])

    def _numbers(self, trained: PreTrainedModel, evaluators: Sequence[Evaluator]) -> dict[str, float]:
        return self.within_memory(
            lambda: {name: value for each in evaluators for name, value in each(trained, self.batch_size).items()}
        )

    def _yardstick(self, rows: HeldoutChunks, trained: PreTrainedModel, batch_size: int) -> dict[str, float]:
        """``heldout/loss heldout/perplexity heldout/accuracy``, and what plugins measure."""
        self.documents = scoring.score_documents(trained, rows, Yardstick(self.vocabulary), batch_size)
        return _in_section("heldout", self.documents.sums())

    def within_memory(self, scored: Callable[[], Found]) -> Found:
        """What ``scored`` gives, with as many rows at once as fit."""
        from mlmx.kernels.out_of_memory import brief, is_out_of_memory, release  # noqa: PLC0415 (imports torch)

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


def own_validation(chunks: Chunks, mask: Masker, trained: PreTrainedModel, batch_size: int) -> dict[str, float]:
    """``eval/loss eval/perplexity eval/accuracy``, and what plugins measure: the run's own validation chunks."""
    return _in_section("eval", scoring.score(trained, chunks, mask, batch_size))


def whole_words(
    rows: HeldoutChunks, vocabulary: Vocabulary, trained: PreTrainedModel, batch_size: int
) -> dict[str, float]:
    """``heldout/bits_per_byte``: words that are the same for every tokenizer."""
    loss = {"loss": METRICS["loss"]}
    words = scoring.score_documents(trained, rows, WholeWords(vocabulary), batch_size, loss)
    return {"heldout/bits_per_byte": scoring.bits_per_byte(words, rows.word_bytes)}


def word_kinds(
    rows: HeldoutChunks, vocabulary: Vocabulary, groups: NDArray[np.int8], trained: PreTrainedModel, batch_size: int
) -> dict[str, float]:
    """``final/heldout_loss_rare`` and the like: loss and accuracy by word frequency and by piece.

    Args:
        groups: int8[N], see `heldout.token_groups`.
    """
    named: dict[str, Sums] = {}
    for group, sums in scoring.score_groups(trained, rows, groups, Yardstick(vocabulary), batch_size).items():
        for name in (list(BANDS)[group // 2], PIECES[group % 2]):
            named[name] = named.get(name, Sums()) + sums
    return {
        f"final/heldout_{metric}_{name}": value / named[name].tokens
        for name in [*BANDS, *PIECES]
        if name in named
        for metric, value in named[name].totals.items()
    }


def _in_section(section: str, sums: Sums) -> dict[str, float]:
    return {f"{section}/{name}": value for name, value in scoring.numbers(sums).items()}
