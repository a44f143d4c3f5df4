"""A sample's mask in an epoch is one and the same however training is cut up, distributed or restarted."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mlmx.data.chunks import concat
from mlmx.data.masking import Masker, Rows, column, masker, token
from mlmx.data.texts import files
from mlmx.data.tokens import tokenize
from mlmx.models.encoders import load_model, scratch
from mlmx.models.head import masked_logits
from mlmx.training.arguments import training_arguments
from tests.support.models import Notes
from tests.support.processes import run_distributed

ROWS = 24


class Recording:
    """A masker that notes what it hands out, from whatever process it is called in."""

    def __init__(self, mask: Masker, folder: Path) -> None:
        self.mask = mask
        self.folder = folder

    def __call__(self, rows: Rows) -> dict[str, torch.Tensor]:
        assert isinstance(rows, dict), "rows of one length are taken in one go"
        batch = self.mask(rows)
        numbers = zip(column(rows, "epoch"), column(rows, "sample"), strict=True)
        for (epoch, sample), inputs, labels in zip(numbers, batch["input_ids"], batch["labels"], strict=True):
            pair = np.stack([inputs.numpy(), labels.numpy()])
            name = f"{epoch}-{sample}.npy"
            before = self.folder / name
            if before.exists():
                assert np.array_equal(np.load(before), pair), f"{name} was masked otherwise before"
            np.save(before, pair)
        return batch


def train(folder: Path, corpus: Path, tokenizer_folder: Path, batch_size: int, **options: int) -> None:
    from transformers import AutoTokenizer

    from mlmx.training.trainer import Trainer

    folder.mkdir(exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    texts = files(path=str(corpus))["train"].select(range(20))
    chunks = concat(tokenize(texts, tokenizer), 32)
    chunks = chunks.select(np.arange(ROWS))
    mask = masker(partial(token), tokenizer, 0.15, 42)
    dials = {"lr": 1e-3, "epochs": 2, "batch_size": batch_size, "weight_decay": 0.0, "seed": 42, "precision": "fp32"}
    fixed = {"name": "corrected", "save_strategy": "no", "logging_strategy": "no", "use_cpu": True}
    trainer = Trainer(
        "corrected",
        training_arguments({**fixed, **options}, folder / "checkpoints", **dials),
        model=load_model(scratch(layers=1, hidden_size=16, heads=1), tokenizer, seed=0),
        tokenizer=tokenizer,
        train_chunks=chunks,
        eval_chunks=chunks,
        mask=Recording(mask, folder),
        mlm_probability=0.15,
        masked_logits=masked_logits,
        scores=lambda trained: {},
        recorder=Notes(),
    )
    trainer.train()


def masks_of(folder: Path) -> dict[str, bytes]:
    return {path.name: np.load(path).tobytes() for path in folder.glob("*.npy")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, corpus: Path, uncased: Path) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected")
    train(folder, corpus, uncased, batch_size=8)
    found = masks_of(folder)
    assert len(found) == 2 * ROWS, "every sample, in each of two epochs"
    assert len(set(found.values())) == 2 * ROWS, "epochs differ"
    return found


@pytest.mark.parametrize(
    ("batch_size", "options"),
    [
        (8, {}),  # a restart: another process state, the same masks
        (3, {}),
        (4, {"gradient_accumulation_steps": 2}),
        (8, {"dataloader_num_workers": 1}),
        (5, {"dataloader_num_workers": 2}),
    ],
)
def test_masks_are_the_same_token_for_token(
    tmp_path: Path, corpus: Path, uncased: Path, expected: dict[str, bytes], batch_size: int, options: dict[str, int]
):
    torch.manual_seed(batch_size)
    train(tmp_path / "masks", corpus, uncased, batch_size, **options)
    assert masks_of(tmp_path / "masks") == expected


def one_of_two(rank: int, folder: Path, corpus: Path, uncased: Path) -> None:
    train(folder / str(rank), corpus, uncased, batch_size=4)


@pytest.mark.long
def test_two_processes_share_out_the_same_masks(
    tmp_path: Path, corpus: Path, uncased: Path, expected: dict[str, bytes]
):
    run_distributed(one_of_two, tmp_path, corpus, uncased)
    halves = [masks_of(tmp_path / rank) for rank in ("0", "1")]
    assert halves[0].keys() != halves[1].keys()
    assert halves[0] | halves[1] == expected
