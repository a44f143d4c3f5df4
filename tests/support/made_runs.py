"""Run folders without a training: what `compare` reads, written in milliseconds."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mlmx.evaluation.bootstrap import DocumentSums
from mlmx.runs.run import HELDOUT_FILE, Run

CONFIG: dict[str, Any] = {
    "chunk_size": 128,
    "mlm_probability": 0.15,
    "lr": 2e-05,
    "epochs": 3.0,
    "batch_size": 8,
    "weight_decay": 0.01,
    "seed": 42,
    "on_nan": "stop",
    "run_name": None,
    "note": None,
    "resume": {"run": None, "allow": []},
    "heldout": {"dataset": None, "documents": 50, "share": 0.02},
    "model": {"name": "packaged", "path": "minilm", "revision": "0" * 40},
    "dataset": {"name": "packaged_reviews", "source": "imdb"},
    "chunking": {"name": "concat"},
    "masking": {"name": "token"},
    "trainer": {"name": "corrected", "use_cpu": True},
    "tracking": {"name": "local", "experiment": "mlmx"},
}
PARTS = {"documents": "d1", "tokens": "t1", "special_tokens": [0], "vocabulary": 30522, "rate": 0.15, "version": 1}


def made(
    folder: Path,
    dials: Mapping[str, Any] | None = None,
    *,
    loss: float | None = 2.5,
    noise: float = 0.01,
    status: str = "FINISHED",
    protocol: str = "heldout-0123456789ab",
    parts: Mapping[str, Any] | None = None,
    documents: int = 50,
    epochs: int = 3,
    metrics: Mapping[str, float] | None = None,
) -> Run:
    """A run folder as `train` leaves it; ``loss=None`` has no held-out documents.

    Args:
        dials: flat, as on the command line.
        noise: by how much the run's loss moves from document to document, beside what all runs share.
    """
    folder.mkdir(parents=True)
    run, config = Run(folder), yaml.safe_load(yaml.safe_dump(CONFIG))
    for key, value in (dials or {}).items():
        *groups, name = key.split(".")
        node = config
        for group in groups:
            node = node[group]
        node[name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    rng = np.random.default_rng(zlib.crc32(str(loss).encode()))
    last = {"eval/loss": 2.0, "eval/perplexity": 7.39, "train/loss": 2.2, "train/tokens_per_second": 2475.5}
    heldout: dict[str, float] = {}
    if loss is not None:
        shared = np.random.default_rng(0)
        tokens = shared.integers(20, 60, documents)
        losses = shared.normal(0, 0.5, documents) + rng.normal(0, noise, documents)
        losses += loss - (losses * tokens).sum() / tokens.sum()
        sums = DocumentSums(np.arange(documents, dtype=np.uint64), tokens, {"loss": losses * tokens})
        heldout = {"heldout/loss": sums.sums().totals["loss"] / sums.sums().tokens}
        heldout |= {"heldout/perplexity": float(np.exp(heldout["heldout/loss"])), "heldout/bits_per_byte": loss / 3}
        if status == "FINISHED":
            sums.save(folder / HELDOUT_FILE)
    rows = [{"step": 0, "epoch": 0.0, "eval/loss": 4.0, **({"heldout/loss": 4.0} if heldout else {})}]
    for epoch in range(1, epochs + 1):
        fading = 2.0 ** -(epoch - 1) - 2.0 ** -(epochs - 1)
        rows.append({"step": 10 * epoch, "epoch": float(epoch), "train/loss": 2.2 + fading})
        own = {name: value + fading for name, value in heldout.items() if name == "heldout/loss"}
        rows.append({"step": 10 * epoch, "epoch": float(epoch), "eval/loss": 2.0 + fading, **own})
    if status == "FINISHED":
        rows[-1] |= last | heldout | dict(metrics or {})
    if status != "FAILED":
        for row in rows:
            run.append_line("metrics.jsonl", {"time": "2026-01-01T00:00:00+00:00", **row})
    ended = {**last, **heldout, **(metrics or {})} if status == "FINISHED" else {}
    result = {"status": status, "resumable": status == "KILLED", "run_id": None, "run_name": "a name"}
    run.write_json(
        "result.json",
        {**result, "protocol": protocol if heldout else "none", "metrics": ended, "seconds": {"total": 90.0}},
    )
    counts = {"source": "reviews", "documents": documents, "tokens": 2000, "chunks": 60}
    report: dict[str, Any] = {"eval": {**counts, "sha256": f"chunks of {config['chunk_size']}"}}
    if heldout:
        report["heldout"] = {**counts, "sha256": "d1", "protocol_parts": PARTS | dict(parts or {})}
    run.write_json("data.json", report)
    run.write_json("inputs.json", {"precision": "fp32", "processes": 1})
    params = {"model": "minilm", "chunk_size": str(config["chunk_size"]), "lr": str(config["lr"])}
    tags = {"mlmx.folder": str(folder), "mlmx.protocol": protocol}
    told = {"name": "a name", "tags": tags, "params": params, "started": 1_700_000_000_000 + len(str(folder))}
    run.write_json("mlflow.json", told | {"ended": None, "run_id": None})
    return run


def checkpoint(run: Run, step: int, epoch: float, weights: bytes | None = None) -> Path:
    """A whole checkpoint as far as tracking looks at it."""
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights or f"weights {step}".encode())
    texts = {"config.json": "{}", "tokenizer.json": "{}", "optimizer.safetensors": "moments"}
    texts |= {"trainer_state.json": json.dumps({"epoch": epoch}), "state.json": json.dumps({"interim": False})}
    for name, text in {**texts, "manifest.json": "{}"}.items():  # which says that it is whole
        (folder / name).write_text(text)
    return folder
