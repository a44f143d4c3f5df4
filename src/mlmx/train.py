"""``train``: texts → tokens → chunks → masked batches → model → training → numbers → tracking."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mlmx import data, describe, masking, model, provenance, runs, tracking, training
from mlmx.config import Job, TrainConfig, bind, require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

log = logging.getLogger("mlmx")


@dataclass(frozen=True)
class Parts:
    """The group options of a config as functions with their options filled in, all checked."""

    encoder: model.Encoder
    source: partial[Any]
    split: partial[Any]
    chunking: partial[Any]
    strategy: partial[Any]
    shares: tuple[float, float]
    store: tracking.Store | None


@dataclass(frozen=True)
class Ready:
    """Everything a training needs; making it has refused whatever can be refused."""

    arguments: TrainingArguments
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    mask: masking.Masker
    train_chunks: data.Chunks
    eval_chunks: data.Chunks
    report: dict[str, dict[str, Any]]


def parts_of(cfg: TrainConfig) -> Parts:
    """Bind every group of a config.

    Raises:
        RequestError: an unknown name or option, a wrong type or value.
    """
    (encoder,) = bind("model", cfg.model, model.MODELS)
    source, split = bind("dataset", cfg.dataset, data.DATASETS, data.split_chunks)
    (chunking,) = bind("chunking", cfg.chunking, data.CHUNKINGS)
    strategy, shares = bind("masking", cfg.masking, masking.MASKINGS, masking.replacement_shares)
    (store,) = bind("tracking", cfg.tracking, tracking.TRACKINGS)
    training.require_names(cfg.trainer)
    require(
        cfg.trainer["name"] != "stock" or (cfg.masking == {"name": "token"} and cfg.chunking == {"name": "concat"}),
        "trainer.name=stock: is the library's own collator on joined documents; it goes with masking=token and "
        "chunking=concat, both without options",
    )
    return Parts(encoder(), source, split, chunking, strategy, shares(), store())


def check(cfg: TrainConfig) -> None:
    """Everything that can be judged before torch is imported and anything is written."""
    parts = parts_of(cfg)
    require("[MASK]" in cfg.example, f"example={cfg.example!r}: holds no [MASK] to fill")
    data.require_amounts(**parts.split.keywords)
    model.require_fit(parts.encoder, cfg.chunk_size)
    data.quick_check(parts.source)
    model.require_there(parts.encoder)


def train(cfg: TrainConfig, job: Job) -> float:
    """One run, from the baseline to the saved model; returns its last ``eval/loss``."""
    parts, clock = parts_of(cfg), Clock()
    with runs.log_to():
        ready = prepare(cfg, job, parts, clock)
        run = runs.begin(job.folder, cfg, job.overrides)
        with runs.log_to_file(run), recorded(run, parts.store, clock) as tracker:
            announce(cfg, job, ready, tracker)
            fills = partial(describe.fills, ready.model, ready.tokenizer, cfg.example, model.fill_masks)
            before = fills()
            fit(cfg, ready, run, tracker)
            clock.lap("train")
            log.info("before training  %s\nafter training   %s", before, fills())
            tracker.plots = draw_plots(run, describe.run_name(cfg, job))
        log.info("%s", describe.ending(run, tracker.last, clock.seconds, tracker.store))
    return tracker.last.get("eval/loss", math.nan)


def prepare(cfg: TrainConfig, job: Job, parts: Parts, clock: Clock) -> Ready:
    """Load and check all parts of the run; writes nothing.

    Raises:
        RequestError: an option the library refuses, a model or text that does not fit, too few chunks.
    """
    arguments = training.arguments(
        cfg.trainer,
        runs.Run(job.folder).checkpoints,
        lr=cfg.lr,
        epochs=cfg.epochs,
        batch_size=cfg.batch_size,
        weight_decay=cfg.weight_decay,
        seed=cfg.seed,
        precision=cfg.precision,
    )
    tokenizer = model.load_tokenizer(parts.encoder, cfg.chunk_size)
    mask = masking.masker(parts.strategy, tokenizer, cfg.mlm_probability, cfg.seed, parts.shares)
    tokens = data.tokenize(parts.source(), tokenizer)
    chunks = parts.chunking(tokens, cfg.chunk_size)
    train_chunks, eval_chunks = parts.split(chunks)
    report = describe.data_report(describe.source_name(cfg, job), chunks, train_chunks, eval_chunks)
    clock.lap("data")
    loaded = model.load_model(parts.encoder, tokenizer, cfg.seed)
    model.prompt_of(loaded, tokenizer, cfg.example)
    clock.lap("model")
    return Ready(arguments, tokenizer, loaded, mask, train_chunks, eval_chunks, report)


def announce(cfg: TrainConfig, job: Job, ready: Ready, tracker: tracking.Tracker) -> None:
    """Say what is about to happen, to the person, the run folder and MLflow."""
    protocol = describe.protocol_id(cfg, ready.report)
    log.info("%s", describe.introduction(cfg, job, ready.report, ready.arguments, ready.model))
    log.info("%s", describe.masked_sample(ready.mask, ready.train_chunks, ready.tokenizer))
    tracker.start(
        describe.run_name(cfg, job),
        protocol,
        describe.params(cfg, job, ready.arguments, ready.model, ready.report),
        describe.tags(cfg, job, ready.report, protocol) | provenance.tags(),
        ready.report,
    )


def fit(cfg: TrainConfig, ready: Ready, run: runs.Run, tracker: tracking.Tracker) -> None:
    """Train from the baseline to the last epoch and save the model."""
    from mlmx.scoring import batches_of, numbers, score
    from mlmx.training.engine import make_trainer, run_and_save

    fixed = replace(ready.mask, fixed=True)

    def scores(trained: PreTrainedModel) -> dict[str, float]:
        batches = batches_of(ready.eval_chunks, fixed, ready.arguments.per_device_eval_batch_size)
        return numbers(score(trained, batches, model.masked_logits))

    trainer = make_trainer(
        cfg.trainer["name"],
        ready.arguments,
        model=ready.model,
        tokenizer=ready.tokenizer,
        train_chunks=ready.train_chunks,
        eval_chunks=ready.eval_chunks,
        mask=ready.mask,
        mlm_probability=cfg.mlm_probability,
        masked_logits=model.masked_logits,
        scores=scores,
        recorder=tracker,
    )
    run_and_save(trainer, run.model)


def draw_plots(run: runs.Run, title: str) -> list[Any]:
    """The run's curves as PNG files."""
    from mlmx.tracking.plots import draw

    return draw(run.metrics(), run.plots, title)


@contextlib.contextmanager
def recorded(run: runs.Run, store: tracking.Store | None, clock: Clock) -> Iterator[tracking.Tracker]:
    """A tracker whose run ends, however it ends, with its true status in the folder and in MLflow."""
    tracker, status = tracking.Tracker(run, store), "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status, clock.seconds)


@dataclass
class Clock:
    """Seconds spent per part of a run."""

    seconds: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def lap(self, name: str) -> None:
        """Book the time since the last lap under ``name``."""
        spent = time.monotonic() - self.began - sum(v for k, v in self.seconds.items() if k != "total")
        self.seconds[name] = round(spent, 3)
        self.seconds["total"] = round(time.monotonic() - self.began, 3)
