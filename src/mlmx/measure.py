"""What a model is measured on: the run's own validation chunks (``eval/*``) and the yardstick (``heldout/*``)."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mlmx import data, masking, model
from mlmx.config import TrainConfig, WorkError, bind, load_option, require
from mlmx.documents import DocumentSums, Sums
from mlmx.masking import yardstick

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Found = TypeVar("Found")
log = logging.getLogger("mlmx")
YARDSTICK_VERSION = 1


@dataclass(frozen=True)
class HeldoutSource:
    """Where held-out documents come from, and how many; ``source`` is None for the dataset's own or a share."""

    source: partial[Any] | None
    origin: str
    documents: int
    share: float
    allow_overlap: bool

    def split(self, texts: Any) -> data.Split:
        """Training and held-out documents; see `data.split_off`."""
        other = self.source() if self.source else None
        if isinstance(other, dict):
            other = other.get("heldout", other["train"])
        return data.split_off(texts, other, self.origin, self.documents, self.share, self.allow_overlap)


def heldout_source(cfg: TrainConfig) -> HeldoutSource:
    """Bind the ``heldout`` node and what the dataset says of it.

    Raises:
        RequestError: an unknown option, or the training source named as the held-out one.
    """
    dials = bind("heldout", {"name": "heldout_dials", **cfg.heldout}, {"heldout_dials": data.heldout_dials})[0]
    asked, documents, share = dials()
    *_, says = bind("dataset", cfg.dataset, data.DATASETS, data.split_chunks, data.dataset_heldout)
    named, allow_overlap = says()
    wanted = asked or named
    if not wanted:
        return HeldoutSource(None, "the dataset's own held-out split", documents, share, allow_overlap)
    options = load_option("dataset", wanted) if isinstance(wanted, str) else wanted
    source, *_ = bind("heldout.dataset", options, data.DATASETS, data.split_chunks, data.dataset_heldout)
    training, *_ = bind("dataset", cfg.dataset, data.DATASETS, data.split_chunks, data.dataset_heldout)
    origin = wanted if isinstance(wanted, str) else ":".join(str(v) for v in (options["name"], options.get("path")))
    require(
        _call(source) != _call(training),
        f"heldout.dataset={origin}: is the training source itself; name another dataset, or leave it out for "
        "a share of documents that is then not trained on",
    )
    return HeldoutSource(source, f"heldout.dataset={origin}", documents, share, allow_overlap)


def _call(bound: partial[Any]) -> tuple[Any, dict[str, Any]]:
    """A bound function and all its options, those left to their defaults as well."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(bound.func).parameters.items()}
    return bound.func, defaults | bound.keywords


def protocol_id(rows: data.HeldoutChunks, tokenizer: Any) -> str:
    """What ``heldout/*`` was measured on: documents, their tokens, rate, shares and the version of the draws.

    Only runs of one id scored the same targets; runs of different ids are never ranked together.
    """
    what = [
        np.sort(rows.keys).tolist(),
        _tokens_sha256(rows),
        sorted(tokenizer.all_special_ids),
        len(tokenizer),
        [yardstick.RATE, *yardstick.SHARES],
        YARDSTICK_VERSION,
    ]
    return "heldout-" + hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]


def protocol_parts(rows: data.HeldoutChunks, tokenizer: Any) -> dict[str, Any]:
    """What `protocol_id` is made of, part by part, so that two ids can be told apart in words."""
    return {
        "documents": hashlib.sha256(np.sort(rows.keys).astype("<u8").tobytes()).hexdigest()[:12],
        "tokens": _tokens_sha256(rows)[:12],
        "special_tokens": sorted(tokenizer.all_special_ids),
        "vocabulary": len(tokenizer),
        "rate": yardstick.RATE,
        "shares": list(yardstick.SHARES),
        "version": YARDSTICK_VERSION,
    }


def _tokens_sha256(rows: data.HeldoutChunks) -> str:
    digest, offsets = hashlib.sha256(), rows.tokens.offsets
    for number in np.argsort(rows.keys):
        digest.update(rows.tokens.ids[offsets[number] : offsets[number + 1]].astype("<i4").tobytes() + b"|")
    return digest.hexdigest()


@dataclass(frozen=True)
class Material:
    """The data of an experiment, ready to be masked, and the report on it."""

    tokenizer: PreTrainedTokenizerBase
    mask: masking.Masker
    train_chunks: data.Chunks
    eval_chunks: data.Chunks
    heldout: data.HeldoutChunks | None
    report: dict[str, dict[str, Any]]
    examples: tuple[data.Example, ...] = ()


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
        mask: masking.Masker,
        heldout: data.HeldoutChunks | None,
        batch_size: int,
        eval_chunks: data.Chunks | None = None,
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
        from mlmx.training.out_of_memory import brief, is_out_of_memory, release

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
        from mlmx import scoring

        found: dict[str, float] = {}
        if self.eval_chunks is not None:
            batches = scoring.batches_of(self.eval_chunks, self.eval_mask, self.batch_size)
            sums = scoring.score(trained, batches, model.masked_logits)
            found |= {f"eval/{name}": value for name, value in scoring.numbers(sums).items()}
        return found if self.heldout is None else found | self._yardstick(trained, self.heldout)

    def _yardstick(self, trained: PreTrainedModel, heldout: data.HeldoutChunks) -> dict[str, float]:
        from mlmx import scoring

        score = partial(scoring.score_documents, trained, heldout, batch_size=self.batch_size)
        self.documents = score(collate=yardstick.Yardstick(self.vocabulary), masked_logits=model.masked_logits)
        found = {f"heldout/{name}": value for name, value in scoring.numbers(self.documents.sums()).items()}
        words = score(collate=yardstick.WholeWords(self.vocabulary), masked_logits=model.masked_logits)
        if heldout.word_bytes.any():
            found["heldout/bits_per_byte"] = scoring.bits_per_byte(words, heldout.word_bytes)
        return found

    def breakdown(self, trained: PreTrainedModel, training: data.Chunks) -> dict[str, float]:
        """``final/heldout_loss_rare`` and the like: loss and accuracy by word frequency and by piece."""
        from mlmx import scoring

        if self.heldout is None:
            return {}
        per_token = data.token_groups(self.heldout.tokens, training)
        groups, collate = partial(_groups_of, per_token), yardstick.Yardstick(self.vocabulary)
        score = partial(scoring.score_groups, trained, self.heldout, groups, collate, masked_logits=model.masked_logits)
        with fast_kernels(trained):
            found = self.within_memory(lambda: score(batch_size=self.batch_size))
        named: dict[str, Sums] = {}
        for group, sums in found.items():
            for name in (list(data.BANDS)[group // 2], data.PIECES[group % 2]):
                named[name] = named.get(name, Sums()) + sums
        return {
            f"final/heldout_{metric}_{name}": value
            for name in [*data.BANDS, *data.PIECES]
            if name in named
            for metric, value in scoring.numbers(named[name]).items()
            if metric in ("loss", "accuracy")
        }


def fast_kernels(trained: PreTrainedModel) -> contextlib.AbstractContextManager[Any]:
    """The kernels that training uses on the CPU."""
    from mlmx.training.cpu import CpuKernels

    return CpuKernels() if trained.device.type == "cpu" else contextlib.nullcontext()


def _groups_of(per_token: Any, rows: Sequence[Any]) -> Any:
    groups = np.zeros((len(rows), max(len(row["input_ids"]) for row in rows)), np.int8)
    for line, row in zip(groups, rows, strict=True):
        own = per_token[row["start"] : row["start"] + row["length"]]
        line[row["num_prefix"] : row["num_prefix"] + len(own)] = own
    return groups
