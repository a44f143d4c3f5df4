"""From a config to the parts of an experiment: options bound and checked, then data gathered.

Shared by the commands that look at data: ``train``, ``prepare`` and ``evaluate``.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mlmx.config.errors import RequestError, require
from mlmx.config.options import bind
from mlmx.config.own_files import load_option
from mlmx.config.paths import outputs_dir
from mlmx.config.schema import Heldout, TrainConfig
from mlmx.data import cache, chunks, masking
from mlmx.data.cache import TokenCache
from mlmx.data.chunks import CHUNKINGS, Chunks, cut, require_amounts, split_chunks
from mlmx.data.examples import Example, choose_examples
from mlmx.data.hashing import content_sha256
from mlmx.data.heldout import DatasetHeldout, HeldoutChunks, Split, heldout_chunks, split_off
from mlmx.data.masking import MASKINGS, Masker, masker, rate_schedule, replacement_shares, require_budget
from mlmx.data.protocol import protocol_parts
from mlmx.data.report import data_report
from mlmx.data.texts import DATASETS, quick_check, read
from mlmx.data.tokens import kept_tokens
from mlmx.evaluation import metrics
from mlmx.models.encoders import MODELS, Encoder, encoder_of, load_tokenizer, require_fit, require_there
from mlmx.runs import identity
from mlmx.tracking.store import Store, bound_store
from mlmx.training.arguments import require_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_cache() -> TokenCache:
    """The tokens kept below outputs/cache; used as a context."""
    return cache.token_cache(outputs_dir() / "cache")


@dataclass(frozen=True)
class Parts:
    """The group options of a config as functions with their options filled in, all checked."""

    encoder: Encoder
    source: partial[Any]
    split: partial[Any]
    chunking: partial[Any]
    strategy: partial[Any]
    shares: tuple[float, float]
    final_probability: float | None
    store: Store | None
    heldout: Heldout
    heldout_source: partial[Any] | None  # None: the dataset's own split, or a share of it
    heldout_origin: str
    allow_overlap: bool


def parts_of(cfg: TrainConfig) -> Parts:
    """Bind every group of a config; `RequestError` for an unknown name or option, a wrong type or value."""
    (encoder,) = bind("model", cfg.model, MODELS)
    source, split, of_dataset = bind("dataset", cfg.dataset, DATASETS, split_chunks, DatasetHeldout)
    (chunking,) = bind("chunking", cfg.chunking, CHUNKINGS)
    strategy, shares, schedule = bind("masking", cfg.masking, MASKINGS, replacement_shares, rate_schedule)
    store = bound_store(cfg.tracking)
    require_names(cfg.trainer)
    if cfg.trainer["name"] == "stock" and not (cfg.masking == {"name": "token"} and cfg.chunking == {"name": "concat"}):
        with_it = "it goes with masking=token and chunking=concat, both without options"
        raise RequestError(f"trainer.name=stock: is the library's own collator on joined documents; {with_it}")
    says: DatasetHeldout = of_dataset()
    other, origin = None, "the dataset's own held-out split"
    if asked := cfg.heldout.dataset or says.heldout:
        options = load_option("dataset", asked) if isinstance(asked, str) else asked
        other, *_ = bind("heldout.dataset", options, DATASETS, split_chunks, DatasetHeldout)
        named = asked if isinstance(asked, str) else ":".join(str(v) for v in (options["name"], options.get("path")))
        origin = f"heldout.dataset={named}"
        if _call(other) == _call(source):
            instead = "name another dataset, or leave it out for a share of documents that is then not trained on"
            raise RequestError(f"{origin}: is the training source itself; {instead}")
    bound = encoder_of(encoder), source, split, chunking, strategy, shares(), schedule()
    return Parts(*bound, store, cfg.heldout, other, origin, says.allow_overlap)


def _call(bound: partial[Any]) -> tuple[Any, dict[str, Any]]:
    """A bound function and all its options, those left to their defaults as well."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(bound.func).parameters.items()}
    return bound.func, defaults | bound.keywords


def _texts_of(parts: Parts) -> Split:
    """Training and held-out documents; see `split_off`."""
    texts, found = read(parts.source), read(parts.heldout_source) if parts.heldout_source else {}
    source, wanted = found.get("heldout", found["train"]) if found else texts.get("heldout"), parts.heldout
    return split_off(texts["train"], source, parts.heldout_origin, wanted.documents, wanted.share, parts.allow_overlap)


def texts_sha256(parts: Parts) -> dict[str, str | None]:
    """Hashes of the texts that a run would be trained and measured on, as in data.json's ``content_sha256``."""
    texts = _texts_of(parts)
    held = None if texts.heldout is None else content_sha256(texts.heldout)
    return {"corpus": content_sha256(texts.train), "heldout": held}


def check_training(cfg: TrainConfig) -> None:
    """Everything that can be judged before torch is imported and anything is written."""
    parts = parts_of(cfg)
    identity.require_names(cfg.resume.allow)
    if cfg.on_nan != "stop" and cfg.trainer["name"] == "stock":
        can = "trainer.name=stock takes every step as the library does and can only stop"
        raise RequestError(f"on_nan={cfg.on_nan}: {can}; leave on_nan out, or choose trainer=default")
    if cfg.register is not None and parts.store is None:
        why = "the registry is MLflow's, and tracking=none leaves it out"
        raise RequestError(f"register={cfg.register}: {why}; choose tracking=local or tracking=server")
    require("[MASK]" in cfg.example, f"example={cfg.example!r}: holds no [MASK] to fill")
    require_amounts(**parts.split.keywords)
    require_fit(parts.encoder, cfg.chunk_size)
    require_budget("mlm_probability", cfg.mlm_probability, cfg.chunk_size)
    require_budget("masking.final_probability", parts.final_probability or 1.0, max(cfg.chunk_size, 4))
    masking.try_out(parts.strategy)
    chunks.try_out(parts.chunking, cfg.chunk_size)
    for source in filter(None, (parts.source, parts.heldout_source)):
        quick_check(source)
    require_there(parts.encoder)
    metrics.try_out()


def gather(cfg: TrainConfig, parts: Parts, source_name: str, cache: TokenCache) -> Material:
    """texts → tokens → chunks, and the masker over them; tokens that are made are written once the cache may `keep`.

    Raises:
        RequestError: a model or text that does not fit, too few chunks, held-out texts among the training ones.
    """
    tokenizer = load_tokenizer(parts.encoder, cfg.chunk_size)
    rates = cfg.mlm_probability, cfg.seed, parts.shares, parts.final_probability, cfg.epochs
    mask = masker(parts.strategy, tokenizer, *rates)
    texts = _texts_of(parts)
    rows = cut(parts.chunking, kept_tokens(texts.train, tokenizer, cache), cfg.chunk_size)
    train_chunks, eval_chunks = parts.split(rows)
    heldout = None if texts.heldout is None else heldout_chunks(texts.heldout, tokenizer, cfg.chunk_size, cache)
    splits = {"train": train_chunks, "eval": eval_chunks}
    report = data_report(source_name, texts, tokenizer, parts.chunking, rows, splits, heldout)
    if heldout is not None:
        report["heldout"]["protocol_parts"] = protocol_parts(heldout, tokenizer)
    examples = () if texts.heldout is None else choose_examples(texts.heldout, tokenizer)
    return Material(tokenizer, mask, train_chunks, eval_chunks, heldout, report, examples)


@dataclass(frozen=True)
class Material:
    """The data of an experiment, ready to be masked, and the report on it."""

    tokenizer: PreTrainedTokenizerBase
    mask: Masker
    train_chunks: Chunks
    eval_chunks: Chunks
    heldout: HeldoutChunks | None
    report: dict[str, dict[str, Any]]
    examples: tuple[Example, ...]
