"""A small model of every family, and rows for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModelForMaskedLM,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
)

from mlmx.models.head import masked_logits

SIZES = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
COMMON = {**SIZES, "intermediate_size": 64, "max_position_embeddings": 40}
CONFIGS = {
    "distilbert": DistilBertConfig(vocab_size=120, dim=32, hidden_dim=64, n_layers=2, n_heads=2),
    "bert": BertConfig(**COMMON),
    "roberta": RobertaConfig(**COMMON),
    "albert": AlbertConfig(**COMMON, embedding_size=16),
    "electra": ElectraConfig(**COMMON, embedding_size=16),
    "deberta_v2": DebertaV2Config(**COMMON),
    "mpnet": MPNetConfig(**COMMON),
    "modernbert": ModernBertConfig(**COMMON, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1),
}


def batch_of(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 120, (3, 16), generator=generator)
    labels = torch.where(torch.rand(3, 16, generator=generator) < 0.3, ids, -100)
    return {"input_ids": ids, "labels": labels}


def check_head(family: str, device: str, room: int | None) -> None:
    torch.manual_seed(0)
    loaded = AutoModelForMaskedLM.from_config(CONFIGS[family]).double().to(device).eval()
    batch = {name: value.to(device) for name, value in batch_of(1).items()}
    logits, labels = masked_logits(loaded, batch, room)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in loaded.named_parameters() if p.grad is not None}
    loaded.zero_grad()
    everywhere = loaded(input_ids=batch["input_ids"]).logits  # some heads compute their own loss in fp32
    full = torch.nn.functional.cross_entropy(everywhere.flatten(0, 1), batch["labels"].flatten())
    full.backward()
    assert loss.item() == pytest.approx(full.item(), rel=1e-10)
    assert logits.shape == (room or int((batch["labels"] != -100).sum()), 120)
    for name, parameter in loaded.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(ours[name], parameter.grad, rtol=1e-9, atol=1e-12), name


class Rows(torch.utils.data.Dataset):
    """40 rows whose numbers of targets are given; row i is the same whenever it is asked for."""

    epoch = 0

    def __init__(self, counts: list[int]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 120, (40, 16), generator=generator)
        self.labels = torch.full_like(self.ids, -100)
        for row, labels in enumerate(self.labels):
            places = torch.randperm(16, generator=generator)[: counts[row % len(counts)]]
            labels[places] = self.ids[row, places]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class Notes:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)

    def checkpoint(self, folder: Path, step: int, epoch: float) -> None:
        raise AssertionError("nothing is to be saved here")
