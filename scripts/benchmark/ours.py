"""The mlmx side: its own commands where there is one, else its own stages. Nothing here makes it faster.

Everything that depends on how mlmx is built inside stands in this file.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from transformers import AutoTokenizer, Trainer

from benchmark.sizes import MLM_PROBABILITY
from benchmark.stock import load_reviews, step_numbers, thread_facts, timed_batches, work
from benchmark.turns import Stopwatch, Turns
from mlmx.commands import main
from mlmx.commands import train as command
from mlmx.data.cache import TokenCache
from mlmx.data.chunks import concat
from mlmx.data.masking import masker, token
from mlmx.data.tokens import kept_tokens, tokenize
from mlmx.evaluation.measure import Measure
from mlmx.runs import checkpoints
from mlmx.runs.log import log_to, log_to_file
from mlmx.runs.run import Run
from mlmx.tracking.store import Store
from mlmx.tracking.tracker import Tracker
from mlmx.training import trainer as training
from mlmx.training.arguments import resolve_precision

if TYPE_CHECKING:
    from benchmark.workers import Channel


# --------------------------------------------------------------------------------- the real command


def run_train(setup: dict[str, Any], *overrides: str) -> None:
    """``mlmx train`` with a setup's model and dials."""
    model = ["model=minilm"] if setup["minilm"] else ["model=distilbert", f"model.path={setup['model']}"]
    trainer = {"cpu": "cpu", "cuda": "default" if setup["precision"] == "fp32" else "gpu"}[setup["device"]]
    arguments = [
        *model,
        f"dataset.train_chunks={setup['chunks']}",
        "dataset.eval_chunks=2",
        f"batch_size={setup['batch_size']}",
        f"precision={setup['precision']}",
        f"mlm_probability={MLM_PROBABILITY}",
        f"trainer={trainer}",
        f"tracking={setup['tracking']}",
    ]
    code = main.main(["train", *arguments, *overrides])
    if code:
        raise RuntimeError(f"mlmx train ended with {code}")


def on_reviews(setup: dict[str, Any]) -> list[str]:
    """The benchmark's reviews, none of them held out."""
    return ["dataset=files", f"dataset.path={setup['reviews']}", "heldout.share=0", f"chunk_size={setup['chunk_size']}"]


@contextlib.contextmanager
def changed(prepare: Callable[[Trainer], None]) -> Iterator[None]:
    """Inside the block, ``prepare`` is called with every trainer that mlmx makes."""
    own = training.Trainer

    def made(*args: Any, **kwargs: Any) -> Any:
        trainer = own(*args, **kwargs)
        prepare(trainer)
        return trainer

    training.Trainer = made
    try:
        yield
    finally:
        training.Trainer = own


# ------------------------------------------------------------------------------- what may be asked


def train(channel: Channel, setup: dict[str, Any]) -> None:
    """A training that goes on by `Turns`."""
    with changed(lambda trainer: trainer.add_callback(Turns(channel, setup["chunk_size"]))):
        run_train(setup, *on_reviews(setup))


def train_to_end(
    _channel: Channel, setup: dict[str, Any], batches: str, learning_rate: float, steps: int
) -> list[float]:
    """A training of some steps; keeps its masked batches for the other side, saves its model, returns its losses."""
    losses: list[float] = []
    kept: dict[str, list[Any]] = {"input_ids": [], "labels": []}

    def record(trainer: Trainer) -> None:
        own_step = trainer.training_step

        def step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            for name, rows in kept.items():
                rows.append(inputs[name].cpu().numpy().copy())
            loss = own_step(model, inputs, *args, **kwargs)
            losses.append(loss.item())
            return loss

        trainer.training_step = step

    saved = Path(setup["saved"])
    with changed(record), mock.patch.dict(os.environ, MLMX_OUTPUTS=str(saved.parent)):
        dials = [f"trainer.max_steps={steps}", "trainer.save_strategy=no", "trainer.eval_strategy=no"]
        run_train(setup, *on_reviews(setup), f"lr={learning_rate}", *dials, f"hydra.run.dir={saved}")
    np.savez(batches, **{name: np.concatenate(rows) for name, rows in kept.items()})
    return losses


def prepare(
    _channel: Channel, reviews: str, folder: str, model: str, chunk_size: int, second: int | None
) -> dict[str, Any]:
    """Seconds from reviews to the first chunk with nothing cached, and to that of a second chunk size."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def first_chunk(size: int) -> tuple[float, list[int]]:
        texts = load_reviews(reviews, folder)  # a table of its own each time, of which nothing is known yet
        began = time.perf_counter()
        with TokenCache(Path(folder) / "tokens") as cache:
            chunk = concat(kept_tokens(texts, tokenizer, cache), size)[0]["input_ids"]
            cache.keep()
        return time.perf_counter() - began, chunk.tolist()

    seconds, first = first_chunk(chunk_size)
    found = {"cold": seconds, "first": first}
    if second:
        found["second"], found["first_of_second"] = first_chunk(second)
    return found


def mask(
    _channel: Channel, reviews: str, folder: str, model: str, chunk_size: int, rows: int, times: int
) -> dict[str, Any]:
    """Median seconds of one masked batch, from rows in hand to tensors."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    chunks = concat(tokenize(load_reviews(reviews, folder), tokenizer), chunk_size)
    collate = masker(partial(token), tokenizer, MLM_PROBABILITY, seed=42)
    return timed_batches(collate, chunks.__getitems__(range(rows)), times)  # as torch's DataLoader asks for them


def track(_channel: Channel, folder: str, steps: int, step_seconds: float) -> dict[str, float]:
    """Seconds per step that tracking takes from training: logging, and what the end has to wait for because of it.

    ``cpu_seconds`` are those of all threads, also where training does not wait for them.
    """
    store = Store(f"sqlite:///{folder}/mlflow.db", "mlmx", Path(folder) / "mlartifacts")
    _making_the_store, empty = (logged(store, Path(folder) / name, 0, step_seconds) for name in ("first", "empty"))
    full = logged(store, Path(folder) / "run", steps, step_seconds)
    waited = max(full["ending"] - empty["ending"], 0.0)
    cpu = max(full["cpu"] - empty["cpu"], 0.0)
    return {"seconds": (full["logging"] + waited) / steps, "cpu_seconds": cpu / steps}


def logged(store: Store, folder: Path, steps: int, step_seconds: float) -> dict[str, float]:
    """Seconds that logging so many steps and then ending the run take from the training thread, and CPU seconds."""
    folder.mkdir(parents=True)
    run, logging = Run(folder), 0.0
    with log_to(), log_to_file(run):
        tracker = Tracker(run, store)
        tracker.start("benchmark", "none", {}, {}, {})
        cpu = time.process_time()
        for step in range(steps):
            cpu += work(step_seconds)
            began = time.perf_counter()
            tracker.log(step, 0.0, step_numbers(step))
            logging += time.perf_counter() - began
        began = time.perf_counter()
        tracker.finish("FINISHED", {})
        ending = time.perf_counter() - began
    return {"logging": logging, "ending": ending, "cpu": time.process_time() - cpu}


def sweep(channel: Channel, setup: dict[str, Any], chunk_sizes: list[int]) -> None:
    """``mlmx train -m`` that pauses after each job; a job's answer is its seconds beyond steps, scoring and saving."""
    watch, own_train, began = Stopwatch(), command.train, time.perf_counter()

    def train_and_wait(*args: Any) -> Any:
        nonlocal began
        value = own_train(*args)
        channel.send(time.perf_counter() - began - watch.seconds)
        asked, _ = channel.receive()
        if asked == "stop":
            raise SystemExit(0)
        began, watch.seconds = time.perf_counter(), 0.0
        return value

    scoring = (Measure, "__call__"), (Measure, "breakdown")
    saving = (training.Trainer, "_save_checkpoint"), (checkpoints, "write")
    reviews = ["dataset=imdb_packaged"] if setup["packaged"] else ["dataset=files", f"dataset.path={setup['reviews']}"]
    dials = [f"chunk_size={','.join(map(str, chunk_sizes))}", "lr=2e-5,5e-5", "epochs=1", "heldout.documents=20"]
    command.train = train_and_wait
    try:
        with changed(lambda trainer: trainer.add_callback(watch)), watch.watching(*scoring, *saving):
            run_train(setup, "-m", *reviews, *dials)
    finally:
        command.train = own_train


def precisions(_channel: Channel, device: str) -> list[str]:
    """Every precision that is shipped and that this machine is meant to train in."""
    chosen = resolve_precision("auto", on_cpu=device == "cpu")
    return sorted({"fp32", chosen} | ({"bf16", "fp16"} if device == "cuda" else set()))


def facts(_channel: Channel) -> dict[str, Any]:
    """What this side's process computes with."""
    return thread_facts() | {"precision=auto on the CPU": resolve_precision("auto", on_cpu=True)}
