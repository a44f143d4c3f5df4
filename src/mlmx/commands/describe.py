"""What a run says of itself: to the person, in its folder and in MLflow."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlmx.config import own_files
from mlmx.config.labels import IGNORE_INDEX
from mlmx.config.schema import Job, TrainConfig
from mlmx.config.trust import TRUST_FLAG, trusted_code
from mlmx.data.chunks import Chunks
from mlmx.data.masking import Masker
from mlmx.models.fill import fill_masks
from mlmx.runs.provenance import NOTE, PARENT
from mlmx.runs.records import Status
from mlmx.runs.run import Run
from mlmx.tracking.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

Report = Mapping[str, Mapping[str, Any]]  # as in data.json
Scores = Mapping[str, float]


def choice(group: str, cfg: TrainConfig, job: Job) -> str:
    """The chosen option of a group (``minilm``), or the folder's or file's name where a path was given."""
    path = next((o.partition("=")[2] for o in job.overrides if o.lstrip("+").startswith(f"{group}.path=")), None)
    if path and group == "model":
        return Path(path).name
    return str(job.choices.get(group) or getattr(cfg, group).get("name"))


def run_name(cfg: TrainConfig, job: Job) -> str:
    """``chunk 128 · mask 0.15 · lr 0.0005 · minilm · imdb_packaged``: what sweeps vary first, lists cut the end off."""
    if cfg.run_name:
        return cfg.run_name
    dials = (f"chunk {cfg.chunk_size}", f"mask {cfg.mlm_probability:g}", f"lr {cfg.lr:g}")
    return " · ".join([*dials, choice("model", cfg, job), choice("dataset", cfg, job)])


def source_name(cfg: TrainConfig, job: Job) -> str:
    """Where the texts come from: the dataset's option and, for hub data and files, its path."""
    path = cfg.dataset.get("path")
    paths = [path] if isinstance(path, str) else (path or [])
    return ":".join([choice("dataset", cfg, job), *map(str, paths)])


def introduction(
    cfg: TrainConfig, job: Job, report: Report, arguments: TrainingArguments, model: PreTrainedModel
) -> str:
    """The three lines a run opens with."""
    corpus, train, evaluation, heldout = report["corpus"], report["train"], report["eval"], report.get("heldout")
    scored = "nothing is held out, so this run has no heldout/* numbers to be compared by"
    if heldout is not None:
        scored = f"{heldout['source']}: {heldout['documents']:,} documents, {heldout['tokens']:,} tokens"
    size = sum(p.numel() for p in model.parameters()) / 1e6
    return (
        f"run      {run_name(cfg, job)}\n"
        f"data     {corpus['source']}: {corpus['documents']:,} documents, {corpus['tokens']:,} tokens, "
        f"{corpus['chunks']:,} chunks of {cfg.chunk_size}; {train['chunks']:,} to train on, "
        f"{evaluation['chunks']:,} to evaluate on\n"
        f"heldout  {scored}\n"
        f"model    {choice('model', cfg, job)}, {size:.1f} M parameters, on {arguments.device.type} "
        f"in {precision(arguments)}; {cfg.epochs:g} epochs of batch "
        f"{arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size}, lr {cfg.lr:g}"
    )


def precision(arguments: TrainingArguments) -> str:
    """The precision training runs in: ``bf16`` or ``fp16`` (autocast over fp32 weights), or ``fp32``."""
    return "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32"


def masked_sample(mask: Masker, chunks: Chunks, tokenizer: PreTrainedTokenizerBase) -> str:
    """A decoded chunk as the model will see it, and the tokens it has to find."""
    batch = mask([chunks[0]])
    inputs, labels = batch["input_ids"][0], batch["labels"][0]
    targets = tokenizer.convert_ids_to_tokens([int(label) for label in labels if label != IGNORE_INDEX])
    more = "" if len(targets) <= 12 else f" … ({len(targets)} in all)"
    return f"masked   {tokenizer.decode(inputs)}\ntargets  {' '.join(targets[:12])}{more}"


def preview(mask: Masker, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """A chunk with its targets marked, as seen → as it is: ``this was a ⟦[MASK] → great⟧ ⟦xylophone → film⟧``."""
    batch = mask([row])
    pieces = []
    for seen, label in zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True):
        shown = tokenizer.convert_ids_to_tokens(seen)
        pieces.append(str(shown) if label == IGNORE_INDEX else f"⟦{shown} → {tokenizer.convert_ids_to_tokens(label)}⟧")
    return " ".join(pieces)


def fills(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """``This is a great [MASK].  →  movie 31.2 %, film 20.1 %, …``."""
    masks = fill_masks(model, tokenizer, text, 5)
    lines = [", ".join(f"{fill.token} {fill.probability:.1%}" for fill in mask) for mask in masks]
    return f"{text}  →  {'; '.join(lines)}"


def params(
    cfg: TrainConfig, job: Job, arguments: TrainingArguments, model: PreTrainedModel, report: Report
) -> dict[str, Any]:
    """The dials and what deviates, flat; numbers stay numbers. Everything else is in config.yaml."""
    groups = {name: choice(name, cfg, job) for name in ("model", "dataset", "chunking", "masking", "trainer")}
    dials = ("chunk_size", "mlm_probability", "lr", "epochs", "batch_size", "weight_decay", "seed")
    given = dict(override.lstrip("+").partition("=")[::2] for override in job.overrides)
    deviating = {key: value for key, value in given.items() if "." in key and not key.startswith("hydra")}
    return {
        **{name: getattr(cfg, name) for name in dials},
        **groups,
        "precision": precision(arguments),
        "device": arguments.device.type,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "lr_scheduler_type": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
        "optim": str(getattr(arguments.optim, "value", arguments.optim)),
        "train_chunks": report["train"]["chunks"],
        "eval_chunks": report["eval"]["chunks"],
        "parameters": sum(p.numel() for p in model.parameters()),
        **deviating,
    }


def command_line(job: Job) -> str:
    """The command that makes this run again."""
    code = trusted_code()
    flags = [] if code is None else [f"{TRUST_FLAG}={code}"]
    flags += ["--config-dir", str(job.folder / own_files.FOLDER)] if job.own else []
    return shlex.join(["python", "-m", "mlmx", "train", *flags, *job.overrides])


def tags(cfg: TrainConfig, job: Job, report: Report, protocol: str) -> dict[str, str]:
    """Tags that are not about the machine: data, protocol, experiment and the user's note."""
    command = command_line(job)
    found = {
        "mlmx.command": command,
        "mlmx.data_sha256": report["corpus"]["sha256"],
        "mlmx.protocol": protocol,
        "mlmx.folder": str(job.folder),
        NOTE: f"`{command}`" + (f"\n\n{cfg.note}" if cfg.note else ""),
        "mlmx.sweep": job.sweep,
        PARENT: job.parent,
        "mlmx.experiment": job.choices.get("experiment"),
    }
    return {name: str(value) for name, value in found.items() if value}


def by_word(found: Scores) -> str:
    """``words    held-out loss: unseen 9.38, rare 9.06, …``."""
    prefix = "final/heldout_loss_"
    parts = [f"{name.removeprefix(prefix)} {value:.2f}" for name, value in found.items() if name.startswith(prefix)]
    return f"words    held-out loss by word frequency and piece: {', '.join(parts)}"


def scores(found: Scores, report: Report, protocol: str) -> str:
    """A line per section: what was scored, and its numbers."""
    lines = []
    for section in [name for name in ("eval", "heldout") if name in report]:
        own = "  ".join(f"{name} {value:,.6g}" for name, value in found.items() if name.startswith(f"{section}/"))
        lines.append(f"{section:<9}{report[section]['source']}, {report[section]['chunks']:,} chunks: {own}")
    return "\n".join([*lines, f"protocol {protocol}"])


def outcome(run: Run, status: str, resumable: bool, before: Scores, after: Scores, store: Store | None) -> str:
    """How a run ended, its numbers before training and after it, and what to do next, in markdown."""
    folder = shlex.quote(str(run.folder))
    both = [name for name in after if name in before and name.startswith(("eval/", "heldout/"))]
    rows = [f"| {name} | {before[name]:,.5g} | {after[name]:,.5g} |" for name in both]
    table = ["| | before training | after |", "|---|---|---|", *rows, ""] if rows else []
    commands = [f"python -m mlmx train resume={folder}"] if resumable else []
    if status == Status.FINISHED:
        where = "" if store is None or store.artifacts is not None else f"tracking=server tracking.uri={store.uri} "
        commands += [f"python -m mlmx predict run={folder} 'text=This is a great [MASK].'"]
        commands += [f"python -m mlmx compare {where}experiment={shlex.quote(store.experiment)}"] if store else []
    return "\n".join([f"**{status}**", "", *table, *(f"    {command}" for command in commands)]).strip()


def ending(run: Run, metrics: Scores, seconds: Scores, store: Store | None) -> str:
    """The last lines: numbers, folder, what to do next."""
    numbers = [f"{name} {value:,.5g}" for name, value in metrics.items() if name.startswith(("eval/", "heldout/"))]
    lines = [
        f"done     {'  '.join(numbers)}  ({seconds['total']:.0f} s)",
        f"folder   {run.folder}",
        f"fill     python -m mlmx predict run={shlex.quote(str(run.folder))} 'text=This is a great [MASK].'",
    ]
    if store is not None and store.artifacts is not None:
        lines.append("compare  python -m mlmx ui")
    elif store is not None:
        lines.append(f"compare  {store.uri}")
    return "\n".join(lines)
