"""Where training leans on private names of its libraries, all of them are on one list, and there."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from accelerate import Accelerator
from transformers import TrainingArguments

from mlmx.training import trainer

# What training leans on and no library promises to keep: private attributes, and private methods with the parameters
# that they are given there, in this order.
PRIVATE = (
    (transformers.Trainer, "_run_epoch()"),
    (transformers.Trainer, "_clip_grad_norm(model)"),
    (transformers.Trainer, "_get_grad_norm(model, grad_norm)"),
    (
        transformers.Trainer,
        (
            "_maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, "
            "learning_rate)"
        ),
    ),
    (transformers.Trainer, "_determine_best_metric(metrics, trial)"),
    (transformers.Trainer, "_save(output_dir, state_dict)"),
    (transformers.Trainer, "_save_checkpoint(model, trial)"),
    (transformers.Trainer, "_load_from_checkpoint(resume_from_checkpoint, model)"),
    (transformers.Trainer, "_load_optimizer_and_scheduler(checkpoint)"),
    (transformers.Trainer, "_load_scaler(checkpoint)"),
    (transformers.Trainer, "_load_rng_state(checkpoint)"),
    (transformers.Trainer, "_tr_loss"),
    (transformers.Trainer, "_total_loss_scalar"),
    (transformers.Trainer, "_globalstep_last_logged"),
    (TrainingArguments, "_n_gpu"),
    (Accelerator, "_original_forward"),
    (torch.optim.lr_scheduler.LambdaLR, "_last_lr"),
    (torch.cpu, "_is_avx512_bf16_supported()"),
    (torch.cpu, "_is_amx_tile_supported()"),
)
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in Path(trainer.__file__).parent.glob("*.py")}


def stored(source: str) -> set[str]:
    """Names of the attributes that code assigns to."""
    nodes = ast.walk(ast.parse(source))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}


def wrong(owner: type | ModuleType, name: str) -> str | None:
    """What is not as the list says, with the version of the library."""
    module = getattr(owner, "__module__", owner.__name__)
    library = module.partition(".")[0]
    of = f"{library} {importlib.metadata.version(library)}: {owner.__name__}.{name.partition('(')[0]}"
    if not name.endswith(")"):
        there = hasattr(owner, name) or name in stored(inspect.getsource(sys.modules[module]))
        return None if there else f"{of} is gone"
    method, _, parameters = name.removesuffix(")").partition("(")
    if not hasattr(owner, method):
        return f"{of} is gone"
    wanted = parameters.split(", ") if parameters else []
    found = [name for name in inspect.signature(getattr(owner, method)).parameters if name != "self"]
    return None if found[: len(wanted)] == wanted else f"{of} takes {', '.join(found)}, no longer {parameters}"


@pytest.mark.parametrize(("owner", "name"), PRIVATE, ids=[name.partition("(")[0] for _, name in PRIVATE])
def test_the_libraries_have_what_training_leans_on(owner: type | ModuleType, name: str):
    assert wrong(owner, name) is None


class Moved:
    def _save(self, folder: str) -> None:
        self._saved = folder


Moved.__module__ = "transformers.trainer"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("_load(folder)", "Moved._load is gone"),
        ("_loss", "Moved._loss is gone"),
        ("_save(output_dir, state_dict)", "Moved._save takes folder, no longer output_dir, state_dict"),
    ],
)
def test_what_is_gone_or_changed_is_said_with_the_version(name: str, said: str):
    assert wrong(Moved, name) == f"transformers {transformers.__version__}: {said}"


def is_private(name: object) -> bool:
    """``os._exit`` is none, and ``_`` is no name."""
    one = isinstance(name, str) and name.isidentifier() and name.startswith("_") and not name.startswith("__")
    return one and name not in ("_exit", "_")


def leaned_on() -> set[str]:
    """Private names that training reads, calls or overrides, and does not define itself."""
    used, own = set(), set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.Constant):
                used.add(node.value)  # of a __dict__
            elif isinstance(node, ast.FunctionDef):
                own.add(node.name)
    theirs = {*dir(transformers.Trainer), *stored(inspect.getsource(transformers.Trainer))}
    overridden = vars(trainer.Trainer).keys() & theirs
    return {name for name in (used - own) | (used & theirs) | overridden if is_private(name)}


def test_the_list_is_whole_and_holds_nothing_else():
    """What is defined here by a name that the library has as well counts: it would be an override."""
    assert leaned_on() == {name.partition("(")[0] for _, name in PRIVATE}
