"""``evaluate``: score a run, or any masked-LM folder, with the run's protocol or on other texts."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from mlmx import data, describe, model, runs, tracking
from mlmx.config import EvaluateConfig, Job, RequestError, TrainConfig, bind
from mlmx.measure import Measure
from mlmx.parts import gather, parts_of

log = logging.getLogger("mlmx")


def check(cfg: EvaluateConfig) -> None:
    """The run or folder is there, and so is what it is to be scored on."""
    folder, settings, _ = resolve(cfg)
    model.require_fit(model.pretrained(path=str(folder)), settings.chunk_size)
    data.quick_check(parts_of(settings).source)
    bind("tracking", cfg.tracking, tracking.TRACKINGS)


def resolve(cfg: EvaluateConfig) -> tuple[Path, TrainConfig, runs.Run | None]:
    """The model's folder, the settings to score it with, and the run it belongs to (None for a bare folder)."""
    folder = Path(cfg.run).expanduser()
    run = None if (folder / "config.json").is_file() else runs.find(cfg.run)
    if run is None and not (cfg.dataset and cfg.chunk_size):
        raise RequestError(
            f"run={cfg.run}: is a model's folder, not a run; say what to score it on, "
            "for example chunk_size=128 dataset=imdb_packaged"
        )
    folder = run.model if run else folder
    made = run.config() if run else TrainConfig(chunking={"name": "concat"}, masking={"name": "token"})
    settings = replace(
        made,
        model={"name": "pretrained", "path": str(folder)},
        dataset=cfg.dataset or made.dataset,
        chunk_size=cfg.chunk_size or made.chunk_size,
        trainer={"name": "corrected"},  # scoring has one arithmetic
        tracking={"name": "none"},
    )
    return folder, settings, run


def evaluate(cfg: EvaluateConfig, job: Job) -> dict[str, float]:
    """Print the scores; a run's own MLflow run gets them as ``evaluate/…``."""
    folder, settings, run = resolve(cfg)
    parts = parts_of(settings)
    with runs.log_to():
        material = gather(settings, parts, describe.source_name(settings, job))
        loaded = model.load_model(parts.encoder, material.tokenizer, settings.seed)
        loaded.to(device())  # type: ignore[arg-type]
        measure = Measure(material, cfg.batch_size)
        scored = measure(loaded)
        log.info("%s\n%s", folder, describe.scores(scored, material.report, measure.protocol))
        if run is not None:
            record(cfg, run, scored)
    return scored


def record(cfg: EvaluateConfig, run: runs.Run, scored: dict[str, float]) -> None:
    """Add the score to the run's folder and to its own MLflow run."""
    result = run.read_json("result.json")
    last = run.metrics()[-1]
    metrics = {f"evaluate/{name}": value for name, value in scored.items()}
    run.append_metrics(last["step"], last["epoch"], metrics)
    run.write_json("result.json", result | {"metrics": result["metrics"] | metrics})
    store = bind("tracking", cfg.tracking, tracking.TRACKINGS)[0]()
    tracking.add_metrics(store, result.get("run_id"), last["step"], metrics)


def device() -> str:
    """CUDA, then MPS, then the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
