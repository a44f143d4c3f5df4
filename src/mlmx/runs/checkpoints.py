"""Checkpoints that are whole or not there.

A checkpoint is sealed by a manifest of sha256 sums, and whoever reads one compares it with its manifest first. Nothing
in it is a pickle: tensors are safetensors, the rest JSON::

    checkpoints/checkpoint-120/  model.safetensors config.json tokenizer.json …   loads by from_pretrained
                                 optimizer.safetensors trainer_state.json state.json  what resuming needs
                                 manifest.json
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlmx.config import whole
from mlmx.config.errors import require
from mlmx.config.schema import BEST_AND_LAST, KEEP_ALL
from mlmx.runs import disk

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("mlmx")
PREFIX, MANIFEST = "checkpoint-", "manifest.json"
FORMAT = 2  # of state.json
LOSSES = ("heldout/loss", "eval/loss")  # what checkpoints are compared by: the first that any of them has


class DamagedError(ValueError):
    """A checkpoint is not what was written."""


def write(folder: Path, fill: Callable[[Path], None], manifest: bool = True) -> None:
    """A folder with what ``fill`` puts into it, as a whole in place of one of that name, which stays if it fails."""
    clear_half_written(folder.parent, folder.name)
    with disk.writing(folder), whole.folder(folder) as aside:
        fill(aside)
        if manifest:
            files = {path.relative_to(aside).as_posix(): path for path in sorted(aside.rglob("*")) if path.is_file()}
            sums = {name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for name, path in files.items()}
            (aside / MANIFEST).write_text(json.dumps({"files": sums}, indent=1) + "\n", encoding="utf-8")


def verify(folder: Path) -> None:
    """Compare a checkpoint with its manifest; a `DamagedError` says what is missing, too short or changed."""
    if not (folder / MANIFEST).is_file():
        raise DamagedError("it has no manifest")
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        written = [(name, wanted["bytes"], wanted["sha256"]) for name, wanted in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read") from error
    for name, size, sha256 in written:
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{name} is missing")
        if path.stat().st_size != size or _sha256(path) != sha256:
            raise DamagedError(f"{name} is not what was written")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def all_of(checkpoints: Path) -> list[Path]:
    """The checkpoints of a run by their names, newest first."""
    found = [path for path in checkpoints.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The optimizer step a checkpoint was saved at."""
    return int(folder.name.removeprefix(PREFIX))


def newest_whole(checkpoints: Path) -> Path | None:
    """The newest checkpoint that is what was written; half-written ones go, damaged ones are moved aside, and said."""
    clear_half_written(checkpoints)
    for folder in all_of(checkpoints):
        try:
            verify(folder)
            return folder
        except DamagedError as error:
            names = (f"damaged-{folder.name}{f'-{n}' if n > 1 else ''}" for n in itertools.count(1))
            aside = next(path for path in map(folder.with_name, names) if not path.exists())
            folder.rename(aside)
            log.warning("checkpoint %s is damaged (%s); moved to %s", folder.name, error, aside)
    return None


def require_format(checkpoints: Path) -> None:
    """Refuse to go on from checkpoints that another version of mlmx wrote in a form of its own."""
    for folder in all_of(checkpoints):
        found: object = FORMAT
        with contextlib.suppress(OSError, ValueError, AttributeError):  # damaged, which is told when it is verified
            found = json.loads((folder / "state.json").read_text(encoding="utf-8")).get("format")
        form = f"{folder.name} is of format {found}, written by another version of mlmx, and this one reads {FORMAT}"
        require(found == FORMAT, f"resume={folder.parent.parent}: {form}; go on with that version")


def clear_half_written(checkpoints: Path, name: str = f"{PREFIX}*") -> None:
    """Remove what a process that was killed while saving left behind."""
    for leftover in checkpoints.glob(f".{name}.*tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def rotate(checkpoints: Path, limit: int | None, *best: Path) -> None:
    """Keep the newest ``limit`` checkpoints (all if None or 0) and the best; of interim ones only the newest."""
    newest, *older = all_of(checkpoints)
    kept = {folder.resolve() for folder in (newest, *best)}
    interim = [folder for folder in older if is_interim(folder)]
    lasting = [newest, *(folder for folder in older if folder not in interim)]
    beyond = [folder for folder in lasting[limit:] if folder.resolve() not in kept] if limit else []
    for folder in (*interim, *beyond):
        folder.rename(folder.with_name(f".{folder.name}.tmp"))  # one that is half gone no longer bears its name
    clear_half_written(checkpoints)


def flattened(state: object, tensors: dict[str, Tensor], path: str = "") -> object:
    """A nested state as JSON, its tensors put into ``tensors`` under the paths that stand in their places.

    >>> taken = {}
    >>> flattened({"step": 3, 0: (1.5, None)}, taken)
    {'dict': [['step', 3], [0, {'tuple': [1.5, None]}]]}
    """
    import numpy as np  # noqa: PLC0415 (slow, and torch alone needs it)
    import torch

    if isinstance(state, (torch.Tensor, np.ndarray)):
        tensors[path] = torch.as_tensor(state).detach().contiguous().cpu()
        return {"tensor": path, "numpy": isinstance(state, np.ndarray)}
    if isinstance(state, dict):
        return {"dict": [[key, flattened(value, tensors, f"{path}.{key}")] for key, value in state.items()]}
    if isinstance(state, (list, tuple)):
        items = [flattened(value, tensors, f"{path}.{number}") for number, value in enumerate(state)]
        return {"tuple" if type(state) is tuple else "list": items}
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    raise TypeError(f"{path.lstrip('.')}: a {type(state).__name__} cannot be kept in a checkpoint")


def restored(kept: Any, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401 (JSON, and whatever was kept)
    """The state that `flattened` made this of."""
    if not isinstance(kept, dict):
        return kept
    if "tensor" in kept:
        tensor = tensors[kept["tensor"]]
        return tensor.numpy() if kept["numpy"] else tensor
    if "dict" in kept:
        return {key: restored(value, tensors) for key, value in kept["dict"]}
    [(kind, items)] = kept.items()
    made = [restored(item, tensors) for item in items]
    return tuple(made) if kind == "tuple" else made


def limit_of(keep: str) -> int | None:
    """How many of the newest checkpoints stay, whatever they score; None for all of them."""
    return {KEEP_ALL: None, BEST_AND_LAST: 1}[keep] if keep in (KEEP_ALL, BEST_AND_LAST) else int(keep)


def loss_name(scores: Collection[Mapping[str, float]]) -> str | None:
    """By which of `LOSSES` these are compared; None where none of them has one."""
    return next((name for name in LOSSES if any(name in one for one in scores)), None)


def best_step(scores: Mapping[int, Mapping[str, float]]) -> int | None:
    """The step with the lowest held-out loss, else evaluation loss, all of them finite; the earlier of equals.

    >>> best_step({5: {"heldout/loss": 2.0, "eval/loss": 3.0}, 10: {"heldout/loss": 1.5, "eval/loss": math.nan}})
    5
    """
    name = loss_name(scores.values()) or ""
    finite = [step for step, one in scores.items() if all(math.isfinite(one.get(loss, 0.0)) for loss in LOSSES)]
    losses = [(scores[step][name], step) for step in finite if name in scores[step]]
    return min(losses)[1] if losses else None


def scores_of(history: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """The losses of each step by our names, from rows with a ``step``; the library's own are ``eval_loss``."""
    found: dict[int, dict[str, float]] = {}
    for row in history:
        for name in LOSSES:
            value = row.get(name, row.get(name.replace("/", "_")))
            if value is not None:
                found.setdefault(int(row["step"]), {})[name] = float(value)
    return found


def is_interim(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved by a signal or the clock: it is of no use once there is a newer one."""
    try:
        return bool(json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["interim"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
