"""The library's TrainingArguments from the dials and the ``trainer`` group.

This file is light: names and options are checked before torch is imported.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlmx.config.errors import RequestError, did_you_mean, require
from mlmx.config.options import convert
from mlmx.config.schema import BEST_AND_LAST, KEEP_ALL
from mlmx.runs import checkpoints

if TYPE_CHECKING:
    from transformers import TrainingArguments

# corrected: Σ loss ÷ masked tokens of the whole step, dropout seeded by step, our masks and scoring.
# stock: the library's Trainer and collator as they are, to reproduce published recipes loss for loss.
ARITHMETICS = ("corrected", "stock")
# TrainingArguments fields that are set elsewhere, and where.
SET_BY = {
    "learning_rate": "the dial lr",
    "num_train_epochs": "the dial epochs",
    "per_device_train_batch_size": "the dial batch_size",
    "weight_decay": "the dial weight_decay",
    **dict.fromkeys(("seed", "data_seed"), "the dial seed"),
    **dict.fromkeys(("bf16", "fp16"), "the dial precision"),
    "run_name": "the dial run_name",
    "resume_from_checkpoint": "the dial resume",
    "output_dir": "hydra.run.dir",
    "report_to": "the group tracking",
    **dict.fromkeys(("remove_unused_columns", "disable_tqdm", "logging_nan_inf_filter"), "mlmx itself"),
    "restore_callback_states_from_checkpoint": "mlmx itself",
    "eval_on_start": "mlmx itself (every run is scored before training)",
    "dataloader_persistent_workers": "mlmx itself (workers that live on would keep the first epoch's masks)",
    "ignore_data_skip": "mlmx itself (a resumed run goes on with the very next batch)",
    "save_only_model": "mlmx itself (a run could not be resumed without its optimizer)",
    "enable_jit_checkpoint": "mlmx itself (SIGTERM, SIGINT and SIGUSR1 save a checkpoint)",
    "label_smoothing_factor": "nothing: a smoothed loss could not be compared with any other",
    "push_to_hub": "nothing: mlmx uploads no model",
    "hub_token": "HF_TOKEN in the environment, and nothing uses it: mlmx uploads no model",
    "auto_find_batch_size": "nothing: it would change the effective batch",
    "parallelism_config": "nothing: a process holds the whole model",
    **dict.fromkeys(("fsdp", "deepspeed"), "nothing yet: a sharded training could not be resumed"),
}
# The least of counts that the library takes as they are and fails on only once training has begun.
AT_LEAST = {"gradient_accumulation_steps": 1, "per_device_eval_batch_size": 1, "dataloader_num_workers": 0}
AT_MOST = {"dataloader_num_workers": 256, "dataloader_prefetch_factor": 1_000}
MOST = 2**31 - 1  # of any number; no NaN is at most this
PLAIN = (int, float, str, bool, dict, type(None))
# Numbers an optimizer keeps for each weight, where it is not two; adafactor's are sums over rows and columns.
MOMENTS = {"sgd": 0, "adafactor": 0, "adagrad": 1, "rmsprop": 1}


def require_names(options: Mapping[str, Any]) -> None:
    """What can be judged of the ``trainer`` group without importing the library."""
    name = options.get("name")
    choices = f"{', '.join(ARITHMETICS)}{did_you_mean(str(name), ARITHMETICS)}"
    require(name in ARITHMETICS, f"trainer.name={name}: choose one of {choices}")
    for key in options:
        require(key not in SET_BY, f"trainer.{key}: is set by {SET_BY.get(key)}; leave it out of trainer")


def training_arguments(
    options: Mapping[str, Any],
    folder: Path,
    *,
    lr: float,
    epochs: float,
    batch_size: int,
    weight_decay: float,
    seed: int,
    precision: str,
) -> TrainingArguments:
    """The library's TrainingArguments from the ``trainer`` group and the dials; refuses what it or the machine does."""
    import torch  # noqa: PLC0415 (slow)
    import transformers  # noqa: PLC0415 (slow)

    given = _checked_fields(options, inspect.signature(transformers.TrainingArguments).parameters)
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    on_cpu = bool(given.pop("use_cpu", False)) or not accelerated
    on_cuda = torch.cuda.is_available() and not on_cpu
    ok = not given.get("tf32") or torch.cuda.is_available()
    require(ok, "trainer.tf32=true: needs a CUDA device, and there is none; leave it out, or use trainer=cpu")
    resolved = resolve_precision(precision, on_cpu)
    if not on_cpu:
        # Batches are pinned by the loader; their copies then overlap with the step before.
        given.setdefault("accelerator_config", {"non_blocking": True})
    if on_cuda:
        given.setdefault("tf32", False)  # else torch_compile would switch it on, also for precision=fp32
    try:
        made = transformers.TrainingArguments(
            output_dir=str(folder),
            learning_rate=lr,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            weight_decay=weight_decay,
            seed=seed,
            data_seed=seed,  # else the order of rows would depend on what was drawn before training
            eval_on_start=True,
            bf16=resolved == "bf16",
            fp16=resolved == "fp16",
            use_cpu=on_cpu,
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
            logging_nan_inf_filter=False,  # it would log a NaN as the mean of the losses before it
            **given,
        )
    except (ValueError, TypeError, ImportError, OSError, ArithmeticError) as error:
        raise RequestError(f"trainer: transformers.TrainingArguments refuses this: {error}") from error
    # One process seeing several GPUs would silently become DataParallel, which splits batches and losses.
    made._n_gpu = min(1, made.n_gpu)  # noqa: SLF001 (no other sets it)
    use_tf32(on_cuda and bool(made.tf32))
    return made


def use_tf32(wanted: bool) -> None:
    """Whether fp32 matrix products may be TF32's, from here on.

    Torch has an old and a new switch for it, and every reader of the old one, `torch.compile` among them, fails where
    they differ. The library turns the new one alone, for all devices, and leaves it so for the next job of a sweep.
    """
    import torch  # noqa: PLC0415 (slow)

    backends: Any = torch.backends
    backends.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("high" if wanted else "highest")  # turns both


def saves(arguments: TrainingArguments, num_chunks: int, keep: str = KEEP_ALL) -> tuple[int, int]:
    """Checkpoints that a training writes in all, and the most of them that are there at its end."""
    whole = math.floor if arguments.dataloader_drop_last else math.ceil
    batches = whole(num_chunks / (arguments.train_batch_size * arguments.world_size))
    per_epoch = max(math.ceil(batches / arguments.gradient_accumulation_steps), 1)
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * per_epoch)
    strategy, every = _value(arguments.save_strategy), arguments.save_steps
    if strategy == "best":  # at most after each evaluation
        strategy, every = _value(arguments.eval_strategy), arguments.eval_steps or arguments.logging_steps
    every = math.ceil(every * steps) if every < 1 else every
    counts = {"no": 0, "epoch": math.ceil(steps / per_epoch), "steps": math.ceil(steps / max(every, 1))}
    limit = checkpoints.limit_of(keep) or arguments.save_total_limit or counts[strategy]
    bests = int(arguments.load_best_model_at_end) + int(keep == BEST_AND_LAST)  # of two kinds of best
    return counts[strategy], min(counts[strategy], limit + bests)


def optimizer_bytes(arguments: TrainingArguments, weight_bytes: int) -> int:
    """Size of the optimizer's state in a checkpoint; two moments as large as the weights, unless it is known better."""
    return MOMENTS.get(_value(arguments.optim), 2) * weight_bytes


def _value(option: object) -> str:
    return str(getattr(option, "value", option))


def _checked_fields(options: Mapping[str, Any], signature: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """The ``trainer`` group's fields of TrainingArguments, their names and plain types checked."""
    given = {key: value for key, value in options.items() if key != "name"}
    for key, value in given.items():
        near = did_you_mean(key, [name for name in signature if name not in SET_BY])
        require(key in signature, f"trainer.{key}: no field of transformers.TrainingArguments{near}")
        wanted = signature[key].annotation
        # Fields typed by the library's own enums are left to its own checks.
        plain = all(part in PLAIN for part in getattr(wanted, "__args__", (wanted,)))
        given[key] = convert(f"trainer.{key}", value, wanted) if plain else value
        least, most = AT_LEAST.get(key), AT_MOST.get(key, MOST)
        require(least is None or given[key] >= least, f"trainer.{key}={value}: must be at least {least}")
        if isinstance(given[key], (int, float)):
            require(abs(given[key]) <= most, f"trainer.{key}={value}: must be a number of at most {most:,}")
    return given


def resolve_precision(precision: str, on_cpu: bool) -> str:
    """``auto`` → bf16 where the hardware multiplies it natively, else fp32; refuses fp16 without a CUDA device."""
    import torch  # noqa: PLC0415 (slow)

    on_cuda = torch.cuda.is_available() and not on_cpu
    require(precision != "fp16" or on_cuda, "precision=fp16: needs a CUDA device; choose auto, fp32 or bf16")
    if precision != "auto":
        return precision
    native = on_cuda and torch.cuda.get_device_capability() >= (8, 0)
    if on_cpu:
        tells = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, name, bool)() for name in tells)
    return "bf16" if native else "fp32"
