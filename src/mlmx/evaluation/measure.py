"""What a model is measured on: a list of evaluators, each a map from the model to named numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

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


class Evaluator(Protocol):
    """Scores a model, so many rows at once, on the same targets each time."""

    def __call__(self, trained: PreTrainedModel, batch_size: int) -> dict[str, float]: ...


@dataclass(frozen=True)
class OwnValidation:
    """``eval/loss eval/perplexity eval/accuracy`` and those of plugins, on the run's own validation chunks."""

    chunks: Chunks
    mask: Masker

    def __call__(self, trained: PreTrainedModel, batch_size: int) -> dict[str, float]:
        sums = scoring.score(trained, self.chunks, self.mask, batch_size)
        return {f"eval/{name}": value for name, value in scoring.numbers(sums).items()}


@dataclass
class HeldoutDocuments:
    """``heldout/loss heldout/perplexity heldout/accuracy`` and those of plugins, on the yardstick.

    Attributes:
        documents: per-document sums of the last call.
    """

    rows: HeldoutChunks
    vocabulary: Vocabulary
    documents: DocumentSums | None = None

    def __call__(self, trained: PreTrainedModel, batch_size: int) -> dict[str, float]:
        self.documents = scoring.score_documents(trained, self.rows, Yardstick(self.vocabulary), batch_size)
        return {f"heldout/{name}": value for name, value in scoring.numbers(self.documents.sums()).items()}


@dataclass(frozen=True)
class HeldoutWords:
    """``heldout/bits_per_byte``, on whole words that are the same for every tokenizer."""

    rows: HeldoutChunks
    vocabulary: Vocabulary

    def __call__(self, trained: PreTrainedModel, batch_size: int) -> dict[str, float]:
        loss = {"loss": METRICS["loss"]}
        words = scoring.score_documents(trained, self.rows, WholeWords(self.vocabulary), batch_size, loss)
        return {"heldout/bits_per_byte": scoring.bits_per_byte(words, self.rows.word_bytes)}


@dataclass(frozen=True)
class WordKinds:
    """``final/heldout_loss_rare`` and the like: loss and accuracy by word frequency and by piece.

    Attributes:
        groups: int8[N], see `heldout.token_groups`.
    """

    rows: HeldoutChunks
    vocabulary: Vocabulary
    groups: NDArray[np.int8]

    def __call__(self, trained: PreTrainedModel, batch_size: int) -> dict[str, float]:
        named: dict[str, Sums] = {}
        found = scoring.score_groups(trained, self.rows, self.groups, Yardstick(self.vocabulary), batch_size)
        for group, sums in found.items():
            for name in (list(BANDS)[group // 2], PIECES[group % 2]):
                named[name] = named.get(name, Sums()) + sums
        return {
            f"final/heldout_{metric}_{name}": value
            for name in [*BANDS, *PIECES]
            if name in named
            for metric, value in scoring.numbers(named[name]).items()
            if metric in METRICS
        }


class Measure:
    """Scores a model by all of its evaluators.

    Attributes:
        protocol: what ``heldout/*`` is measured on, as an id.
        batch_size: rows scored at once; halved where memory does not suffice, which moves no score.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mask: Masker,
        heldout: HeldoutChunks | None,
        batch_size: int,
        eval_chunks: Chunks | None = None,
    ) -> None:
        self.heldout = None if heldout is None else HeldoutDocuments(heldout, mask.vocabulary)
        self.vocabulary = mask.vocabulary
        self.batch_size = batch_size
        self.protocol = "none" if heldout is None else protocol_id(heldout, tokenizer)
        self.evaluators: list[Evaluator] = []
        if eval_chunks is not None:
            self.evaluators.append(OwnValidation(eval_chunks, replace(mask, fixed=True)))
        if self.heldout is not None:
            self.evaluators.append(self.heldout)
            if self.heldout.rows.word_bytes.any():
                self.evaluators.append(HeldoutWords(self.heldout.rows, self.vocabulary))

    def __call__(self, trained: PreTrainedModel) -> dict[str, float]:
        """The numbers of all evaluators."""
        return self._numbers(trained, self.evaluators)

    def breakdown(self, trained: PreTrainedModel, training: Chunks) -> dict[str, float]:
        """Those of `WordKinds` on the held-out documents."""
        if self.heldout is None:
            return {}
        rows = self.heldout.rows
        return self._numbers(trained, [WordKinds(rows, self.vocabulary, token_groups(rows.tokens, training))])

    @property
    def documents(self) -> DocumentSums | None:
        """Per-document sums of the last call."""
        return None if self.heldout is None else self.heldout.documents

    def _numbers(self, trained: PreTrainedModel, evaluators: Sequence[Evaluator]) -> dict[str, float]:
        def found() -> dict[str, float]:
            numbers = [evaluator(trained, self.batch_size) for evaluator in evaluators]
            return {name: value for some in numbers for name, value in some.items()}

        return self.within_memory(found)

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
