"""``experiment=reference`` against the published recipe, written here with the library's own parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import load_dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from mlmx.commands import main
from mlmx.models.encoders import load_model, scratch

CHUNK_SIZE, TRAIN, EVAL, EPOCHS, LR = 64, 64, 16, 3, 1e-3


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A random DistilBERT with dropout: the draws of masks and dropout must fall together too."""
    folder = tmp_path_factory.mktemp("small")
    load_model(scratch(layers=2, hidden_size=32, heads=2, dropout=0.1), tokenizer, seed=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def stock_history(small: Path, corpus: Path, folder: Path) -> list[dict[str, float]]:
    """Loss per epoch of the recipe: map, join, cut, split, mask and train, all by the library."""
    tokenizer = AutoTokenizer.from_pretrained(small)
    reviews = load_dataset("json", data_files=str(corpus), split="train")
    tokenized = reviews.map(lambda rows: dict(tokenizer(rows["text"])), batched=True, remove_columns=["text"])

    def join_and_cut(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: [token for row in column for token in row] for name, column in rows.items()}
        total = len(joined["input_ids"]) // CHUNK_SIZE * CHUNK_SIZE
        return {
            name: [column[first : first + CHUNK_SIZE] for first in range(0, total, CHUNK_SIZE)]
            for name, column in joined.items()
        }

    chunks = tokenized.map(join_and_cut, batched=True)
    split = chunks.train_test_split(train_size=TRAIN, test_size=EVAL, seed=42)
    trainer = Trainer(
        model=AutoModelForMaskedLM.from_pretrained(small),
        args=TrainingArguments(
            output_dir=str(folder),
            eval_strategy="epoch",
            save_strategy="no",
            logging_strategy="epoch",
            learning_rate=LR,
            num_train_epochs=EPOCHS,
            weight_decay=0.01,
            use_cpu=True,
            disable_tqdm=True,
        ),
        data_collator=DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=0.15),
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer.state.log_history


@pytest.mark.long
def test_reference_repeats_the_recipe_loss_for_loss(small: Path, corpus: Path, outputs: Path, tmp_path: Path):
    stock = stock_history(small, corpus, tmp_path / "stock")
    dials = [f"chunk_size={CHUNK_SIZE}", f"lr={LR}", f"epochs={EPOCHS}"]
    data = [f"dataset.path={corpus}", f"dataset.train_chunks={TRAIN}", f"dataset.eval_chunks={EVAL}"]
    parts = ["experiment=reference", f"model.path={small}", "dataset=files", "tracking=none", "trainer.use_cpu=true"]
    assert main.main(["train", *parts, *dials, *data]) == 0

    (metrics,) = outputs.glob("train/*/metrics.jsonl")
    ours = [json.loads(line) for line in metrics.read_text().splitlines()]
    for stock_name, name in (("loss", "train/loss"), ("eval_loss", "eval/loss"), ("grad_norm", "train/grad_norm")):
        theirs = [row[stock_name] for row in stock if stock_name in row]
        found = [row[name] for row in ours if name in row and row["step"] > 0]
        assert len(theirs) == EPOCHS
        assert found == pytest.approx(theirs, rel=1e-5), name
    assert "eval/loss" in ours[0], "the reference is scored before training as well"
    assert ours[0]["step"] == 0


@pytest.mark.long
def test_reference_differs_from_the_corrected_loss(small: Path, corpus: Path, outputs: Path):
    """The parity above is no accident of a setting without effect."""
    data = [f"dataset.path={corpus}", f"dataset.train_chunks={TRAIN}", f"dataset.eval_chunks={EVAL}", "epochs=1"]
    parts = ["experiment=reference", f"model.path={small}", "dataset=files", "tracking=none", "trainer.use_cpu=true"]
    for trainer in ("reference", "default"):
        assert main.main(["train", *parts, f"trainer={trainer}", f"chunk_size={CHUNK_SIZE}", *data]) == 0
    results = [json.loads(path.read_text()) for path in outputs.glob("train/*/result.json")]
    finals = [result["metrics"]["eval/loss"] for result in results]
    assert abs(finals[0] - finals[1]) > 1e-4
