"""From a config to the parts of an experiment: options bound and checked, then data gathered.

Shared by the commands that look at data: ``train``, ``prepare`` and ``evaluate``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from mlmx import data, identity, masking, model, sweeps, tracking, training
from mlmx.config import TrainConfig, bind, require
from mlmx.measure import HeldoutSource, Material, heldout_source, protocol_parts
from mlmx.places import outputs_dir
from mlmx.runs import Run


def token_cache() -> data.TokenCache:
    """The tokens kept below outputs/cache; used as a context."""
    return data.token_cache(outputs_dir() / "cache")


@dataclass(frozen=True)
class Parts:
    """The group options of a config as functions with their options filled in, all checked."""

    encoder: model.Encoder
    source: partial[Any]
    split: partial[Any]
    chunking: partial[Any]
    heldout: HeldoutSource
    strategy: partial[Any]
    shares: tuple[float, float]
    final_probability: float | None
    store: tracking.Store | None


def parts_of(cfg: TrainConfig) -> Parts:
    """Bind every group of a config.

    Raises:
        RequestError: an unknown name or option, a wrong type or value.
    """
    (encoder,) = bind("model", cfg.model, model.MODELS)
    source, split, _ = bind("dataset", cfg.dataset, data.DATASETS, data.split_chunks, data.dataset_heldout)
    (chunking,) = bind("chunking", cfg.chunking, data.CHUNKINGS)
    strategy, shares, schedule = bind(
        "masking", cfg.masking, masking.MASKINGS, masking.replacement_shares, masking.rate_schedule
    )
    (store,) = bind("tracking", cfg.tracking, tracking.TRACKINGS)
    training.require_names(cfg.trainer)
    require(
        cfg.trainer["name"] != "stock" or (cfg.masking == {"name": "token"} and cfg.chunking == {"name": "concat"}),
        "trainer.name=stock: is the library's own collator on joined documents; it goes with masking=token and "
        "chunking=concat, both without options",
    )
    heldout = heldout_source(cfg)
    return Parts(encoder(), source, split, chunking, heldout, strategy, shares(), schedule(), store())


def store_of(run: Run) -> tracking.Store | None:
    """Where a run of this or an earlier day is recorded besides its folder; None where nowhere, or nobody can tell."""
    try:
        (store,) = bind("tracking", run.config().tracking, tracking.TRACKINGS)
    except Exception:  # of another version, torn, or gone meanwhile
        return None
    found: tracking.Store | None = store()
    return found


def resume_of(cfg: TrainConfig) -> tuple[str | None, list[str]]:
    """The folder of the run to go on with, if any, and what may have changed about it."""
    found: tuple[str | None, list[str]] = bind(
        "resume", {"name": "resume_dials", **cfg.resume}, {"resume_dials": identity.resume_dials}
    )[0]()
    return found


def reuse_of(cfg: TrainConfig) -> bool:
    """Whether a sweep that is issued again takes up what it has."""
    found: bool = bind("sweep", {"name": "sweep_dials", **cfg.sweep}, {"sweep_dials": sweeps.sweep_dials})[0]()
    return found


def texts_sha256(parts: Parts) -> dict[str, str | None]:
    """Hashes of the texts that a run would be trained and measured on, as in data.json's ``content_sha256``."""
    texts = parts.heldout.split(parts.source())
    return {
        "corpus": data.content_sha256(texts.train),
        "heldout": None if texts.heldout is None else data.content_sha256(texts.heldout),
    }


def check_training(cfg: TrainConfig) -> None:
    """Everything that can be judged before torch is imported and anything is written."""
    parts = parts_of(cfg)
    resume_of(cfg)
    reuse_of(cfg)
    require(
        cfg.on_nan == "stop" or cfg.trainer["name"] != "stock",
        f"on_nan={cfg.on_nan}: trainer.name=stock takes every step as the library does and can only stop; leave on_nan "
        "out, or choose trainer=default",
    )
    require(
        cfg.register is None or parts.store is not None,
        f"register={cfg.register}: the registry is MLflow's, and tracking=none leaves it out; choose tracking=local or "
        "tracking=server",
    )
    require("[MASK]" in cfg.example, f"example={cfg.example!r}: holds no [MASK] to fill")
    data.require_amounts(**parts.split.keywords)
    model.require_fit(parts.encoder, cfg.chunk_size)
    masking.require_budget("mlm_probability", cfg.mlm_probability, cfg.chunk_size)
    masking.require_budget("masking.final_probability", parts.final_probability or 1.0, max(cfg.chunk_size, 4))
    masking.try_out(parts.strategy)
    for source in filter(None, (parts.source, parts.heldout.source)):
        data.quick_check(source)
    model.require_there(parts.encoder)


def gather(cfg: TrainConfig, parts: Parts, source_name: str, cache: data.TokenCache) -> Material:
    """texts → tokens → chunks, and the masker over them.

    Args:
        cache: where tokens come from; what is made is written once the caller lets it `keep`.

    Raises:
        RequestError: a model or text that does not fit, too few chunks, held-out texts among the training ones.
    """
    tokenizer = model.load_tokenizer(parts.encoder, cfg.chunk_size)
    mask = masking.masker(
        parts.strategy, tokenizer, cfg.mlm_probability, cfg.seed, parts.shares, parts.final_probability, cfg.epochs
    )
    texts = parts.heldout.split(parts.source())
    chunks = parts.chunking(cache.tokens(texts.train, tokenizer), cfg.chunk_size)
    train_chunks, eval_chunks = parts.split(chunks)
    heldout = None if texts.heldout is None else data.heldout_chunks(texts.heldout, tokenizer, cfg.chunk_size, cache)
    splits = {"train": train_chunks, "eval": eval_chunks}
    report = data.data_report(source_name, texts, tokenizer, parts.chunking, chunks, splits, heldout)
    if heldout is not None:
        report["heldout"]["protocol_parts"] = protocol_parts(heldout, tokenizer)
    examples = () if texts.heldout is None else data.choose_examples(texts.heldout, tokenizer)
    return Material(tokenizer, mask, train_chunks, eval_chunks, heldout, report, examples)
