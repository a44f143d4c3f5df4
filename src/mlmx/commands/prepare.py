"""``prepare``: fetch and tokenise ahead of time, report what the data is, and show how it will be masked."""

from __future__ import annotations

import json
import logging
from dataclasses import fields
from typing import Any

from mlmx.commands import describe
from mlmx.config.errors import require
from mlmx.config.schema import Job, PrepareConfig, TrainConfig
from mlmx.experiment import check_training, gather, parts_of, token_cache
from mlmx.models.encoders import load_model
from mlmx.runs.log import log_to

log = logging.getLogger("mlmx")


def settings(cfg: PrepareConfig) -> TrainConfig:
    """The training whose data is prepared."""
    shared = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name != "preview"}
    return TrainConfig(**shared, trainer={"name": "corrected"}, tracking={"name": "none"})


def check(cfg: PrepareConfig) -> None:
    """As ``train`` checks."""
    require(cfg.preview >= 0, f"preview={cfg.preview}: must be 0 or more chunks")
    check_training(settings(cfg))


def prepare(cfg: PrepareConfig, job: Job) -> dict[str, dict[str, Any]]:
    """Fetch model and texts into the libraries' caches, keep the tokens, print the data report and masked samples."""
    train = settings(cfg)
    parts = parts_of(train)
    with log_to(), token_cache() as cache:
        material = gather(train, parts, describe.source_name(train, job), cache)
        load_model(parts.encoder, material.tokenizer, cfg.seed)
        cache.keep()
        log.info("%s", json.dumps(material.report, indent=2, ensure_ascii=False))
        for number in range(min(cfg.preview, len(material.train_chunks))):
            log.info("%s", describe.preview(material.mask, material.train_chunks[number], material.tokenizer))
    return material.report
