"""The table: what is measured on both sides, what mlmx must reach, and what is aimed at."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from benchmark.bench import Bench, Stepped, step_in_turns, stepped
from benchmark.flops import flops_per_token
from benchmark.sizes import MLM_PROBABILITY
from benchmark.workers import SIDES, Worker

COMPARISONS: dict[str, Callable[[float, float], float]] = {
    "mlmx ÷ stock": lambda stock, mlmx: mlmx / stock,
    "stock ÷ mlmx": lambda stock, mlmx: stock / mlmx,
    "mlmx": lambda stock, mlmx: mlmx,
    "difference ÷ stock": lambda stock, mlmx: abs(mlmx - stock) / stock,
}


@dataclass(frozen=True)
class Goal:
    """What is compared, and the bounds for it; without any the row is for information."""

    compared: str
    sign: str
    must: float | None
    aim: float | None = None

    def reached(self, value: float, bound: float | None) -> bool:
        return bound is None or (value >= bound if self.sign == "≥" else value <= bound)


@dataclass(frozen=True)
class Reading:
    """What was measured: samples by side, what else has to hold, and what is worth knowing beside the figure.

    Attributes:
        at_peak: what would be compared if mlmx computed nothing but useful products, at the measured peak.
    """

    samples: dict[str, list[float]]
    holds: dict[str, bool] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    at_peak: float | None = None

    def value(self, side: str) -> float:
        return statistics.median(self.samples[side])


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    what: str
    unit: str
    goal: Goal
    measure: Callable[[Bench], Reading]


# ------------------------------------------------------------------------------------------ training


def speed(bench: Bench, **setup: Any) -> Reading:
    """Tokens per second of a training step."""
    found = stepped(bench, **setup)
    reading = Reading(found.tokens_per_second(), notes={"about": found.about, "memory": found.memory})
    at_peak = max(found.peak["mlmx"]) / useful_flops(found, setup["chunk_size"]) / reading.value("stock")
    return replace(reading, at_peak=at_peak)


def useful_flops(found: Stepped, chunk_size: int) -> float:
    """Useful operations per token of a training."""
    widths = {name: found.about["mlmx"][name] for name in ("layers", "hidden", "intermediate", "vocabulary")}
    return flops_per_token(**widths, chunk_size=chunk_size, scored_share=MLM_PROBABILITY)


def train_512_fp32(bench: Bench) -> Reading:
    """Speed in the same precision, and that the losses are the same."""
    sizes = bench.sizes
    timed = speed(bench, model=bench.model(sizes.encoder), chunk_size=sizes.long, precision="fp32")
    losses = losses_on_same_batches(bench)
    worst = max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(losses["mlmx"], losses["stock"], strict=True))
    notes = timed.notes | {"losses": losses, "largest relative difference": worst}
    same = {f"losses of {sizes.loss_steps} steps equal to 1e-5": worst <= 1e-5}
    return replace(timed, holds=same, notes=notes)


def losses_on_same_batches(bench: Bench) -> dict[str, list[float]]:
    """Losses per step, dropout off: mlmx trains and keeps its masked batches, the stock Trainer trains on them."""
    sizes = bench.sizes
    model = bench.model(sizes.encoder, dropout=0.0)
    steps, same = sizes.loss_steps, {"precision": "fp32", "batch_size": sizes.batch_size}
    setup = bench.setup(model=model, chunk_size=sizes.long, steps=steps, **same)
    return trained_on_same_batches(bench, setup, steps, learning_rate=2e-5)


def trained_on_same_batches(
    bench: Bench, setup: dict[str, Any], steps: int, learning_rate: float
) -> dict[str, list[float]]:
    """Both sides' losses; the saved models are in ``<saved>/model`` (mlmx) and ``<saved>-stock``."""
    kept = {"batches": setup["saved"] + ".npz", "learning_rate": learning_rate}
    with bench.pair() as pair:
        ours = pair.workers["mlmx"].ask("train_to_end", setup=setup, steps=steps, **kept)
        theirs = setup | {"saved": setup["saved"] + "-stock"}
        return {"mlmx": ours, "stock": pair.workers["stock"].ask("train_on_batches", setup=theirs, **kept)}


def gemm_share(bench: Bench, precision: str) -> Reading:
    """Useful FLOP/s of a step as a share of the matrix peak that the same process reached between steps."""
    sizes = bench.sizes
    found = stepped(bench, model=bench.model(sizes.encoder), chunk_size=sizes.long, precision=precision)
    flops = useful_flops(found, sizes.long)
    peak = {side: max(found.peak[side]) for side in SIDES}
    shares = {side: [flops * speed / peak[side] for speed in found.tokens_per_second()[side]] for side in SIDES}
    return Reading(shares, notes={"FLOP per token": flops, "peak FLOP/s": peak, "about": found.about})


def memory_512(bench: Bench) -> Reading:
    """Peak memory of a fresh process that trains a few steps, tracking included."""
    setup = {"model": bench.model(bench.sizes.encoder), "chunk_size": bench.sizes.long, "precision": "auto"}
    found = [step_in_turns(bench, 1, tracking="local", **setup).memory for _ in range(min(bench.repeats, 2))]
    return Reading({side: [one[side] / 1e9 for one in found] for side in SIDES})


def final_loss(bench: Bench) -> Reading:
    """Loss of the trained models on the same unseen masked chunks, after the same steps; mlmx in every precision."""
    sizes = bench.sizes
    same = {"model": bench.model(sizes.schedule_encoder), "chunk_size": sizes.short, "batch_size": 2 * sizes.batch_size}
    with bench.pair() as pair:
        precisions = pair.workers["mlmx"].ask("precisions", device=bench.device)
    models: dict[str, str] = {}
    for precision in precisions:
        setup = bench.setup(**same, steps=sizes.schedule_steps, precision=precision)
        losses = trained_on_same_batches(bench, setup, sizes.schedule_steps, learning_rate=5e-4)
        assert len(losses["stock"]) == len(losses["mlmx"]) == sizes.schedule_steps
        models |= {precision: setup["saved"] + "/model", "stock": setup["saved"] + "-stock"}
    with bench.pair() as pair:
        texts = {"reviews": str(bench.reviews(min(400, sizes.reviews), last=True)), "folder": str(bench.place("score"))}
        texts["tokenizer_of"] = str(same["model"])
        amount = {"chunk_size": sizes.short, "chunks": sizes.score_chunks}
        ask = pair.workers["stock"].ask
        scores = {name: ask("score", model=model, **texts, **amount) for name, model in models.items()}
    stock = scores.pop("stock")
    worst = max(scores, key=lambda precision: abs(scores[precision] - stock))
    return Reading({"stock": [stock], "mlmx": [scores[worst]]}, notes={"loss": scores, "furthest": worst})


# -------------------------------------------------------------------------------------------- data


def prepared(bench: Bench) -> dict[str, list[dict[str, Any]]]:
    """Both preparations of both sides, every repeat with empty caches; once for the rows that read it."""
    sizes = bench.sizes
    if "prepared" not in bench.made:
        setup = {"reviews": str(bench.reviews(sizes.reviews)), "model": str(bench.model(sizes.encoder))}
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        with bench.pair() as pair:
            for _ in range(bench.repeats):
                for side in SIDES:
                    place = {"folder": str(bench.place("cache")), "chunk_size": sizes.long, "second": sizes.long // 2}
                    found[side].append(pair.workers[side].ask("prepare", **setup, **place))
        bench.made["prepared"] = found
    return bench.made["prepared"]


def preparation(bench: Bench, name: str, chunk: str) -> Reading:
    found = prepared(bench)
    same = all(one[chunk] == found["stock"][0][chunk] for side in SIDES for one in found[side])
    return Reading({side: [one[name] for one in found[side]] for side in SIDES}, {"the same first chunk": same})


def data_cold(bench: Bench) -> Reading:
    return preparation(bench, "cold", "first")


def data_second(bench: Bench) -> Reading:
    return preparation(bench, "second", "first_of_second")


def masking(bench: Bench) -> Reading:
    """Milliseconds of one masked batch."""
    sizes = bench.sizes
    setup = {
        "reviews": str(bench.reviews(sizes.fit_reviews)),
        "model": str(bench.model(sizes.encoder)),
        "chunk_size": sizes.long,
        "rows": sizes.mask_rows,
        "times": sizes.mask_times,
    }
    with bench.pair() as pair:
        turns = [pair.in_turn("mask", folder=str(bench.place("cache")), **setup) for _ in range(bench.repeats)]
    shapes = {tuple(turn[side]["shape"]) for turn in turns for side in SIDES}
    shares = {side: [turn[side]["share"] for turn in turns] for side in SIDES}
    return Reading(
        {side: [turn[side]["seconds"] * 1e3 for turn in turns] for side in SIDES},
        {"batches of the same shape": shapes == {(sizes.mask_rows, sizes.long)}},
        {"share of targets": shares},
    )


# ---------------------------------------------------------------------------------------- around it


TRACKED = ("seconds", "cpu_seconds")


def tracking(bench: Bench) -> Reading:
    """Milliseconds that tracking takes from a step."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with bench.pair() as pair:
        for _ in range(bench.repeats):
            for side in SIDES:
                steps = bench.sizes.log_steps[side]
                given = {"folder": str(bench.place("store")), "steps": steps, "step_seconds": 0.005}
                found[side].append(pair.workers[side].ask("track", **given))
    waited, cpu = ({side: [one[name] * 1e3 for one in found[side]] for side in SIDES} for name in TRACKED)
    return Reading(waited, notes={"CPU milliseconds of all threads, per step": cpu})


def sweep_job(bench: Bench) -> Reading:
    """Seconds of a further job beyond its steps, scoring and saving: of one process, and of a fresh one each."""
    sizes = bench.sizes
    same = {"batch_size": sizes.batch_size, "chunk_size": sizes.short, "steps": 4, "tracking": "local"}
    setup = bench.setup(model=bench.model(sizes.schedule_encoder), **same)
    setup |= {"packaged": sizes.reviews == 25_000, "reviews": str(bench.reviews(sizes.reviews))}
    samples: dict[str, list[float]] = {side: [] for side in SIDES}
    with bench.pair() as pair:
        ours = pair.workers["mlmx"]
        ours.send("sweep", setup=setup, chunk_sizes=sizes.jobs)
        if not sizes.shared_workers:  # the library keeps its tokens on disk; later processes find them
            fresh_process(bench, setup)
        first = ours.receive()
        for _ in range(min(bench.repeats, 2 * len(sizes.jobs) - 1)):
            samples["stock"].append(fresh_process(bench, setup))
            samples["mlmx"].append(ours.ask("next"))
        ours.ask("stop")
    return Reading(samples, notes={"first job of the sweep": first})


def fresh_process(bench: Bench, setup: dict[str, Any]) -> float:
    """Seconds of a stock process from start to answer, without those of its steps, scoring and saving."""
    began = time.perf_counter()
    worker = Worker("stock", bench.place("stock"))
    try:
        own = worker.ask("run_job", setup=setup)
    finally:
        worker.close()
    return time.perf_counter() - began - own


RECIPE_IMPORTS = (
    "from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, "
    "TrainingArguments; from datasets import load_dataset"
)
STARTS = {
    "bare": (["-c", "pass"], 0),
    "stock": (["-c", RECIPE_IMPORTS], 0),
    "help": (["-m", "mlmx", "train", "--help"], 0),
    "config_error": (["-m", "mlmx", "train", "experiment=demo", "chunk_sze=256"], 2),
}


def start_up(bench: Bench, name: str) -> Reading:
    """Seconds of a process beyond those of the bare interpreter; stock is a script that has done its imports."""
    if "starts" not in bench.made:
        turns = [{start: wall(bench, *STARTS[start]) for start in STARTS} for _ in range(bench.repeats)]
        bench.made["starts"] = turns
    turns = bench.made["starts"]
    sides = {"stock": "stock", "mlmx": name}
    return Reading({side: [turn[start] - turn["bare"] for turn in turns] for side, start in sides.items()})


def wall(bench: Bench, arguments: list[str], code: int) -> float:
    env = os.environ | {"MLMX_OUTPUTS": str(bench.folder / "outputs"), "HF_HOME": str(bench.folder / "hf")}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, env=env, check=False)
    seconds = time.perf_counter() - began
    if done.returncode != code:
        raise RuntimeError(f"{arguments}: exit code {done.returncode}, expected {code}: {done.stderr.decode()[-300:]}")
    return seconds


# ------------------------------------------------------------------------------------------ the table

ROWS: dict[str, Row] = {
    "train_512_fp32": Row(
        "training, chunk 512, fp32, same losses",
        "tokens/s",
        Goal("mlmx ÷ stock", "≥", 1.4, 1.5),
        train_512_fp32,
    ),
    "train_128_shipped": Row(
        "training as shipped, chunk 128",
        "tokens/s",
        Goal("mlmx ÷ stock", "≥", 2.7, 3.5),
        lambda bench: speed(
            bench, model=bench.model(bench.sizes.encoder), chunk_size=bench.sizes.short, precision="auto"
        ),
    ),
    "train_512_shipped": Row(
        "training as shipped, chunk 512",
        "tokens/s",
        Goal("mlmx ÷ stock", "≥", 2.8, 4),
        lambda bench: speed(
            bench, model=bench.model(bench.sizes.encoder), chunk_size=bench.sizes.long, precision="auto"
        ),
    ),
    "minilm_128_shipped": Row(
        "training as shipped, MiniLM, chunk 128",
        "tokens/s",
        Goal("mlmx ÷ stock", "≥", 4, 6),
        lambda bench: speed(bench, model=None, chunk_size=bench.sizes.short, precision="auto"),
    ),
    "gemm_share": Row(
        "share of the measured GEMM peak, chunk 512, fp32",
        "share",
        Goal("mlmx", "≥", 0.55, 0.80),
        lambda bench: gemm_share(bench, "fp32"),
    ),
    "gemm_share_shipped": Row(
        "the same as shipped", "share", Goal("mlmx", "≥", None), lambda bench: gemm_share(bench, "auto")
    ),
    "memory_512": Row("peak memory, 8×512", "GB", Goal("mlmx ÷ stock", "≤", 0.75, 0.60), memory_512),
    "data_cold": Row("reviews → first chunk of 512, cold", "s", Goal("stock ÷ mlmx", "≥", 4, 25), data_cold),
    "data_second": Row("second chunk size, warm", "s", Goal("mlmx", "≤", 0.3, 0.05), data_second),
    "masking": Row("one masked batch 32×512", "ms", Goal("mlmx", "≤", 0.5, 0.3), masking),
    "tracking": Row("tracking, per step", "ms", Goal("mlmx", "≤", 0.2, 0.05), tracking),
    "sweep_job": Row(
        "a further job, beyond its steps, scoring and saving", "s", Goal("mlmx", "≤", 0.5, 0.25), sweep_job
    ),
    "help": Row(
        "`--help`, beyond a bare interpreter",
        "s",
        Goal("mlmx", "≤", 0.15, 0.05),
        lambda bench: start_up(bench, "help"),
    ),
    "config_error": Row(
        "a configuration error, beyond a bare interpreter",
        "s",
        Goal("mlmx", "≤", 1, 0.5),
        lambda bench: start_up(bench, "config_error"),
    ),
    "final_loss": Row(
        "final loss after the same schedule, every precision",
        "nats",
        Goal("difference ÷ stock", "≤", 0.005),
        final_loss,
    ),
}
