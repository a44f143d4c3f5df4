"""``predict``: fill the masks of texts with a run's model."""

from __future__ import annotations

import sys

from mlmx.config.errors import RequestError, require
from mlmx.config.schema import Job, PredictConfig
from mlmx.config.trust import trusted_code
from mlmx.models.encoders import Encoder, load_model, load_tokenizer, pretrained, trained_from
from mlmx.models.fill import fill_masks
from mlmx.runs.run import find_run


def check(cfg: PredictConfig) -> None:
    """The run is there and finished, and every text holds a mask."""
    _encoder(cfg)
    waits = not cfg.text and sys.stdin and sys.stdin.isatty()
    require(not waits, 'text: missing; give text="This is a great [MASK]."')
    _require_masks(cfg.text)


def _require_masks(texts: list[str]) -> None:
    for text in texts:
        require("[MASK]" in text or "<mask>" in text, f"text={text!r}: holds no [MASK] to fill")


def _encoder(cfg: PredictConfig) -> Encoder:
    run = find_run(cfg.run)
    encoder = pretrained(path=str(run.model))
    return encoder if trusted_code() is None else trained_from(encoder, run.config().model)


def predict(cfg: PredictConfig, job: Job) -> None:
    """Print the likeliest tokens for each mask of each text; texts may come on standard input, one a line."""
    try:
        texts = cfg.text or [line.strip() for line in sys.stdin or () if line.strip()]
    except UnicodeDecodeError as error:
        raise RequestError(f"text: standard input is no UTF-8 ({error})") from error
    require(bool(texts), "text: standard input holds no line; give text=… or lines with a [MASK]")
    _require_masks(texts)
    encoder = _encoder(cfg)
    tokenizer = load_tokenizer(encoder, chunk_size=3)
    loaded = load_model(encoder, tokenizer, seed=0)
    for text in texts:
        masks = fill_masks(loaded, tokenizer, text, cfg.top_k)
        print(text)
        for number, fills in enumerate(masks, start=1):
            for fill in fills:
                print(f"  {f'mask {number}  ' if len(masks) > 1 else ''}{fill.probability:7.2%}  {fill.token}")
