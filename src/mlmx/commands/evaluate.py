"""``evaluate``: score a run, or any masked-LM folder, with the run's protocol or on other texts."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from mlmx.commands import describe
from mlmx.config.errors import RequestError, path_of
from mlmx.config.paths import is_below_outputs, outputs_dir
from mlmx.config.schema import EvaluateConfig, Job, TrainConfig
from mlmx.data.heldout import choose, heldout_chunks, split_off
from mlmx.data.masking import masker
from mlmx.data.texts import quick_check, read
from mlmx.evaluation import metrics
from mlmx.evaluation.measure import Measure
from mlmx.experiment import Parts, gather, parts_of, token_cache
from mlmx.kernels import memory
from mlmx.models.encoders import load_model, load_tokenizer, require_fit, trained_from
from mlmx.runs import records
from mlmx.runs.log import log_to
from mlmx.runs.run import Run, find_run
from mlmx.tracking.store import bound_store
from mlmx.tracking.tracker import add_metrics

log = logging.getLogger("mlmx")


def check(cfg: EvaluateConfig) -> None:
    """The run or folder is there, and so is what it is to be scored on."""
    _, settings, _, parts = resolve(cfg)
    require_fit(parts.encoder, settings.chunk_size)
    quick_check(parts.source)
    bound_store(cfg.tracking)
    metrics.try_out()


def resolve(cfg: EvaluateConfig) -> tuple[Path, TrainConfig, Run | None, Parts]:
    """The model's folder, the settings to score it with, the run it belongs to (None for a bare folder), the parts."""
    folder = path_of("run", cfg.run)
    run = None if (folder / "config.json").is_file() else find_run(cfg.run)
    if run is None and not (cfg.dataset and cfg.chunk_size):
        on = "say what to score it on, for example chunk_size=128 dataset=imdb_packaged"
        raise RequestError(f"run={cfg.run}: is a model's folder, not a run; {on}")
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
    parts = parts_of(settings)
    # The run's model may need the code of the model it was trained from.
    encoder = trained_from(parts.encoder, made.model if run else settings.model)
    return folder, settings, run, replace(parts, encoder=encoder)


def evaluate(cfg: EvaluateConfig, job: Job) -> dict[str, float]:
    """Print the scores, and keep them with the run."""
    import torch

    memory.keep_freed()
    folder, settings, run, parts = resolve(cfg)
    source_name = describe.source_name(settings, job)
    with log_to():
        with token_cache() as cache:
            if cfg.dataset:
                # All of its documents are held out but those that the run was trained on.
                tokenizer = load_tokenizer(parts.encoder, settings.chunk_size)
                mask = masker(parts.strategy, tokenizer, settings.mlm_probability, settings.seed)
                texts = read(parts.source)
                documents, most, left_out = texts.get("heldout", texts["train"]), settings.heldout.documents, 0
                if run is not None:
                    trained = read(parts_of(run.config()).source)
                    split = split_off(trained["train"], documents, source_name, most, 0, allow_overlap=True)
                    assert split.heldout is not None
                    chosen, left_out = split.heldout, split.left_out
                else:
                    chosen = choose(documents, most)
                heldout = heldout_chunks(chosen, tokenizer, settings.chunk_size, cache)
                report = {"heldout": {"source": source_name, "chunks": len(heldout), "left_out_for_overlap": left_out}}
                measure = Measure(tokenizer, mask, heldout, cfg.batch_size)
            else:
                made = gather(settings, parts, source_name, cache)
                tokenizer, report = made.tokenizer, made.report
                measure = Measure(tokenizer, made.mask, made.heldout, cfg.batch_size, made.eval_chunks)
            loaded = load_model(parts.encoder, tokenizer, settings.seed)
            if run is not None:  # a bare folder is scored without a trace
                cache.keep()
        has_mps = torch.backends.mps.is_available()
        loaded.to("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")  # type: ignore[arg-type]
        scored = measure(loaded)
        log.info("%s\n%s", folder, describe.scores(scored, report, measure.protocol))
        if run is not None and is_below_outputs(run.folder):
            record(cfg, run, settings.chunk_size, measure.protocol, scored)
        elif run is not None:
            log.info("not kept with the run: it lies outside %s; MLMX_OUTPUTS=<folder> moves that", outputs_dir())
    return scored


def record(cfg: EvaluateConfig, run: Run, chunk_size: int, protocol: str, scored: dict[str, float]) -> None:
    """Keep the scores with the run: on its own protocol in its results and in its MLflow run, others in a file.

    ``evaluations.jsonl`` has a line per evaluation with what was scored, so that no number goes without it.
    """
    result = run.result()
    line = {"dataset": dict(cfg.dataset) or "own", "chunk_size": chunk_size, "protocol": protocol, **scored}
    run.append_line("evaluations.jsonl", line)
    if protocol != result.protocol or chunk_size != run.config().chunk_size:
        return
    last = {"step": 0, "epoch": 0.0} | (run.metrics() or [{}])[-1]
    own = {f"evaluate/{name}": value for name, value in scored.items()}
    run.append_metrics(last["step"], last["epoch"], own)
    records.write(replace(result, metrics=result.metrics | own), run.folder)
    add_metrics(bound_store(cfg.tracking), run)
