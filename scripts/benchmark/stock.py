"""The stock side: the published recipe, written with the library's own parts and nothing of mlmx.

``datasets.map`` to tokenise, lists joined by ``sum`` and cut, `DataCollatorForLanguageModeling`, `Trainer`, fp32.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertTokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from benchmark.sizes import MLM_PROBABILITY
from benchmark.turns import Stopwatch, Turns

if TYPE_CHECKING:
    from benchmark.workers import Channel

LEARNING_RATE, WEIGHT_DECAY, EPOCHS = 2e-5, 0.01, 3


# -------------------------------------------------------------------------------------- the recipe


def load_reviews(path: str, folder: str) -> datasets.Dataset:
    """The reviews as the library loads them: a table on disk, whose ``map`` results are kept beside it."""
    datasets.disable_progress_bars()
    return datasets.load_dataset("parquet", data_files=path, cache_dir=folder, split="train")


def tokenized(reviews: datasets.Dataset, tokenizer: Any) -> datasets.Dataset:
    """Step 1: tokens, attention mask and word ids of every review, as lists."""

    def tokenize(rows: dict[str, list[str]]) -> Any:
        encoded = tokenizer(rows["text"])
        encoded["word_ids"] = [encoded.word_ids(number) for number in range(len(rows["text"]))]
        return encoded

    return reviews.map(tokenize, batched=True, remove_columns=["text"])


def grouped(tokens: datasets.Dataset, chunk_size: int) -> datasets.Dataset:
    """Step 2: the lists of 1,000 reviews joined and cut into chunks; the labels are a copy of the ids."""

    def group(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: sum(lists, []) for name, lists in rows.items()}  # noqa: RUF017 (it is what the recipe does)
        total = len(joined["input_ids"]) // chunk_size * chunk_size
        chunks = {
            name: [flat[first : first + chunk_size] for first in range(0, total, chunk_size)]
            for name, flat in joined.items()
        }
        return chunks | {"labels": chunks["input_ids"].copy()}

    return tokens.map(group, batched=True)


def make_arguments(folder: str, device: str, batch_size: int, **others: Any) -> TrainingArguments:
    """Step 3: the recipe's settings."""
    settings: dict[str, Any] = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_strategy": "epoch",
        "learning_rate": LEARNING_RATE,
        "num_train_epochs": EPOCHS,
        "weight_decay": WEIGHT_DECAY,
    }
    own = {"output_dir": folder, "per_device_train_batch_size": batch_size, "use_cpu": device == "cpu"}
    return TrainingArguments(**own, **settings | others)


def make_trainer(arguments: TrainingArguments, model: str, chunks: datasets.Dataset, train: int, test: int) -> Trainer:
    """Step 4: chunks drawn, masked by the library's collator, trained on by its Trainer."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    split = chunks.train_test_split(train_size=train, test_size=test, seed=42)
    return Trainer(
        model=AutoModelForMaskedLM.from_pretrained(model),
        args=arguments,
        data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=MLM_PROBABILITY),
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=tokenizer,
    )


# ------------------------------------------------------------------------------- what may be asked


def make_model(
    _channel: Channel, folder: str, tokenizer: str, layers: int, hidden: int, heads: int, dropout: float
) -> None:
    """A DistilBERT with random weights and the uncased vocabulary, saved for both sides to load."""
    set_seed(0)
    words = DistilBertTokenizer.from_pretrained(tokenizer)
    config = DistilBertConfig(
        n_layers=layers,
        dim=hidden,
        hidden_dim=4 * hidden,
        n_heads=heads,
        dropout=dropout,
        attention_dropout=dropout,
        vocab_size=len(words),
        pad_token_id=words.pad_token_id,
    )
    DistilBertForMaskedLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


def train(channel: Channel, setup: dict[str, Any]) -> None:
    """A training that goes on by `Turns`."""
    reviews = load_reviews(setup["reviews"], setup["folder"])
    chunks = grouped(tokenized(reviews, AutoTokenizer.from_pretrained(setup["model"])), setup["chunk_size"])
    arguments = make_arguments(setup["folder"], setup["device"], setup["batch_size"])
    trainer = make_trainer(arguments, setup["model"], chunks, setup["chunks"], 2)
    trainer.add_callback(Turns(channel, setup["chunk_size"]))
    try:
        trainer.train()
    except SystemExit:
        return


def train_on_batches(_channel: Channel, setup: dict[str, Any], batches: str, learning_rate: float) -> list[float]:
    """The recipe's Trainer on batches that mlmx has masked, to the end; saves the model, returns the losses."""
    kept = np.load(batches)
    rows = [{name: torch.from_numpy(kept[name][row]) for name in kept} for row in range(len(kept["labels"]))]
    arguments = make_arguments(
        setup["folder"],
        setup["device"],
        setup["batch_size"],
        max_steps=len(rows) // setup["batch_size"],
        learning_rate=learning_rate,
        train_sampling_strategy="sequential",
        eval_strategy="no",
        save_strategy="no",
    )
    model = AutoModelForMaskedLM.from_pretrained(setup["model"])
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator)
    losses: list[float] = []
    own_step = trainer.training_step

    def step(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = own_step(*args, **kwargs)
        losses.append(loss.item())
        return loss

    trainer.training_step = step
    trainer.train()
    trainer.save_model(setup["saved"])
    return losses


def score(
    _channel: Channel, model: str, tokenizer_of: str, reviews: str, folder: str, chunk_size: int, chunks: int
) -> float:
    """Cross-entropy per masked token of a saved model, on the same masks for every model, in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    rows = grouped(tokenized(load_reviews(reviews, folder), tokenizer), chunk_size).remove_columns("word_ids")
    collate = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=MLM_PROBABILITY, seed=0)
    scored = AutoModelForMaskedLM.from_pretrained(model).eval()
    total, count = 0.0, 0
    for row in itertools.islice(rows, chunks):
        batch = collate([row])
        with torch.no_grad():
            logits = scored(input_ids=batch["input_ids"]).logits
        total += cross_entropy(logits[0], batch["labels"][0], reduction="sum").item()
        count += int((batch["labels"] != -100).sum())
    return total / count


def prepare(
    _channel: Channel, reviews: str, folder: str, model: str, chunk_size: int, second: int | None
) -> dict[str, Any]:
    """Seconds from reviews to the first chunk with nothing cached, and to that of a second chunk size."""
    texts = load_reviews(reviews, folder)
    tokenizer = AutoTokenizer.from_pretrained(model)
    began = time.perf_counter()
    tokens = tokenized(texts, tokenizer)
    first = grouped(tokens, chunk_size)[0]["input_ids"]
    found = {"cold": time.perf_counter() - began, "first": first}
    if second:
        began = time.perf_counter()
        found |= {"first_of_second": grouped(tokens, second)[0]["input_ids"]}
        found |= {"second": time.perf_counter() - began}
    return found


def mask(
    _channel: Channel, reviews: str, folder: str, model: str, chunk_size: int, rows: int, times: int
) -> dict[str, Any]:
    """Median seconds of one masked batch, from rows in hand to tensors."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    chunks = grouped(tokenized(load_reviews(reviews, folder), tokenizer), chunk_size).remove_columns("word_ids")
    collate = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=MLM_PROBABILITY)
    in_hand = [chunks[row] for row in range(rows)]
    return timed_batches(collate, in_hand, times)


def timed_batches(collate: Any, rows: Any, times: int) -> dict[str, Any]:
    """Median seconds of ``times`` batches after a first one, and the share of tokens that are targets."""
    seconds, share = [], 0.0
    for _ in range(times + 1):
        began = time.perf_counter()
        batch = collate(rows)
        seconds.append(time.perf_counter() - began)
        share = float((batch["labels"] != -100).float().mean())
    return {"seconds": statistics.median(seconds[1:]), "share": share, "shape": list(batch["labels"].shape)}


def work(seconds: float) -> float:
    """Compute for so long, as a training does between two loggings; returns the CPU seconds of it."""
    numbers = np.ones(2**18, np.float32)
    until, cpu = time.perf_counter() + seconds, time.thread_time()
    while time.perf_counter() < until:
        np.sqrt(numbers, out=numbers)
    return time.thread_time() - cpu


def track(_channel: Channel, folder: str, steps: int, step_seconds: float) -> dict[str, float]:
    """Seconds per step of one synchronous MLflow call with the step's numbers, in a fresh sqlite store."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("stock", artifact_location=Path(folder).as_uri()))
    seconds = 0.0
    with mlflow.start_run():
        cpu = time.process_time()
        for step in range(steps):
            cpu += work(step_seconds)
            began = time.perf_counter()
            mlflow.log_metrics(step_numbers(step), step=step, synchronous=True)
            seconds += time.perf_counter() - began
        cpu = time.process_time() - cpu
    return {"seconds": seconds / steps, "cpu_seconds": cpu / steps}


def step_numbers(step: int) -> dict[str, float]:
    """What a step logs."""
    return {"train/loss": 9.0 - step * 1e-3, "train/grad_norm": 1.0 + step * 1e-3, "train/learning_rate": LEARNING_RATE}


def run_job(_channel: Channel, setup: dict[str, Any]) -> float:
    """The whole script once, as a process of its own; returns the seconds of its steps, scoring and saving."""
    watch = Stopwatch()
    reviews = load_reviews(setup["reviews"], setup["folder"])
    chunks = grouped(tokenized(reviews, AutoTokenizer.from_pretrained(setup["model"])), setup["chunk_size"])
    arguments = make_arguments(setup["folder"], setup["device"], setup["batch_size"], num_train_epochs=1)
    trainer = make_trainer(arguments, setup["model"], chunks, setup["chunks"], 2)
    trainer.add_callback(watch)
    with watch.watching((Trainer, "evaluate"), (Trainer, "_save_checkpoint"), (Trainer, "save_model")):
        trainer.train()
        trainer.save_model(setup["saved"])
    return watch.seconds


def facts(_channel: Channel) -> dict[str, Any]:
    """What this side's process computes with."""
    return thread_facts()


def thread_facts() -> dict[str, Any]:
    """Threads, waiting policy and the instruction set torch uses, in the calling process."""
    import os

    names = (
        "OMP_NUM_THREADS",
        "OMP_WAIT_POLICY",
        "GOMP_SPINCOUNT",
        "OMP_PROC_BIND",
        "KMP_AFFINITY",
        "LD_PRELOAD",
        "MALLOC_CONF",
    )
    return {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "fp32 products": torch.get_float32_matmul_precision(),
        "environment": {name: os.environ[name] for name in names if name in os.environ},
    }
