"""How large everything is: as the issue's table has it, or small enough for a test of the harness."""

from __future__ import annotations

from dataclasses import dataclass

MLM_PROBABILITY = 0.15


@dataclass(frozen=True)
class Encoder:
    """A DistilBERT to be made with random weights."""

    layers: int
    hidden: int
    heads: int


@dataclass(frozen=True)
class Sizes:
    """Amounts of one form of the benchmark.

    Attributes:
        long, short: the chunk sizes that the rows call 512 and 128.
        fit_reviews: reviews that the training rows take their chunks from.
        tokens_per_turn: a turn of a training on the CPU is at least one step, and as many as have so many tokens.
        least_seconds: turns of a training on the CPU go on until each side has been timed for so long: whatever else
            is at work on the machine comes and goes in seconds.
        loss_steps: steps of which both sides' losses are compared.
        schedule_steps: steps of the training whose final loss is compared, with ``schedule_encoder``.
        score_chunks: unseen chunks that it is taken on.
        mask_rows, mask_times: chunks of a masked batch, and how many are made per repeat.
        log_steps: steps that are logged to MLflow per repeat; stock pays the same for each, mlmx something at the end.
        jobs: chunk sizes of the sweep; its jobs are these times two learning rates, the first one a warm-up.
        shared_workers: one process per side for all rows; without it every row has fresh ones.
        growth_*: points of ``--scaling``.
    """

    encoder: Encoder
    schedule_encoder: Encoder
    reviews: int
    fit_reviews: int
    long: int
    short: int
    batch_size: int
    tokens_per_turn: int
    least_seconds: float
    loss_steps: int
    schedule_steps: int
    score_chunks: int
    mask_rows: int
    mask_times: int
    log_steps: dict[str, int]
    jobs: tuple[int, ...]
    shared_workers: bool
    growth_chunk_sizes: tuple[int, ...]
    growth_batch_sizes: tuple[int, ...]
    growth_reviews: tuple[int, ...]


FULL = Sizes(
    encoder=Encoder(layers=6, hidden=768, heads=12),
    schedule_encoder=Encoder(layers=2, hidden=128, heads=2),
    reviews=25_000,
    fit_reviews=2_000,
    long=512,
    short=128,
    batch_size=8,
    tokens_per_turn=4096,
    least_seconds=15.0,
    loss_steps=20,
    schedule_steps=200,
    score_chunks=200,
    mask_rows=32,
    mask_times=20,
    log_steps={"stock": 100, "mlmx": 2_000},
    jobs=(64, 128, 256),
    shared_workers=False,
    growth_chunk_sizes=(64, 128, 256, 512),
    growth_batch_sizes=(1, 2, 4, 8, 16, 32),
    growth_reviews=(1_000, 5_000, 25_000, 100_000),
)

QUICK = Sizes(
    encoder=Encoder(layers=1, hidden=32, heads=2),
    schedule_encoder=Encoder(layers=1, hidden=32, heads=2),
    reviews=60,
    fit_reviews=60,
    long=64,
    short=32,
    batch_size=2,
    tokens_per_turn=128,
    least_seconds=60.0,  # longer than the turns may last: as many as there may be
    loss_steps=4,
    schedule_steps=4,
    score_chunks=8,
    mask_rows=4,
    mask_times=2,
    log_steps={"stock": 5, "mlmx": 5},
    jobs=(32,),
    shared_workers=True,
    growth_chunk_sizes=(32,),
    growth_batch_sizes=(1, 2),
    growth_reviews=(20, 40),
)
