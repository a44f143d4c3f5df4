"""How cost grows: speed and memory against chunk size and batch, preparation against corpus size."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmark.bench import Bench, step_in_turns
from benchmark.workers import SIDES, WorkerError

Point = dict[str, Any]
TURNS = 3  # the shape of a curve needs fewer than a figure


def growth(bench: Bench) -> dict[str, list[Point]]:
    """``{"chunk_size": [{"chunk_size": 64, "stock": {"tokens/s": …, "GB": …}, "mlmx": …}, …], …}``."""
    sizes, model = bench.sizes, bench.model(bench.sizes.encoder)
    by_chunk = [
        {"chunk_size": size} | trained(bench, model, chunk_size=size, batch_size=sizes.batch_size)
        for size in sizes.growth_chunk_sizes
    ]
    by_batch = [
        {"batch_size": size} | trained(bench, model, chunk_size=sizes.short, batch_size=size)
        for size in sizes.growth_batch_sizes
    ]
    by_corpus = [{"reviews": number} | prepared(bench, model, number) for number in sizes.growth_reviews]
    return {"chunk_size": by_chunk, "batch_size": by_batch, "reviews": by_corpus}


def trained(bench: Bench, model: Path, **dials: int) -> Point:
    """Speed and peak memory of both sides."""
    found = step_in_turns(bench, min(bench.repeats, TURNS), model=model, precision="auto", **dials)
    speeds = found.tokens_per_second()
    return {side: {"tokens/s": statistics.median(speeds[side]), "GB": found.memory[side] / 1e9} for side in SIDES}


def prepared(bench: Bench, model: Path, number: int) -> Point:
    """Seconds from so many reviews to the first chunk, once each."""
    setup = {"reviews": str(bench.reviews(number)), "model": str(model), "chunk_size": bench.sizes.long, "second": None}
    with bench.pair() as pair:
        found = {side: pair.workers[side].ask("prepare", folder=str(bench.place("cache")), **setup) for side in SIDES}
    if found["stock"]["first"] != found["mlmx"]["first"]:
        raise WorkerError(f"the first chunk of {number} reviews differs between the sides")
    return {side: {"s": found[side]["cold"]} for side in SIDES}
