"""What a run's numbers come from, and what of it has changed since: a resumed run must be the same experiment."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from mlmx.config.errors import RequestError, did_you_mean, require
from mlmx.config.schema import TrainConfig

# Keys of `train` that change neither what is learnt nor what is measured. The precision counts as it was resolved.
WITHOUT_EFFECT = (
    "run_name", "note", "example", "tracking", "resume", "save_minutes", "keep", "register", "precision", "sweep",
)  # fmt: skip
TRAINER_WITHOUT_EFFECT = (
    "use_cpu", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "logging_first_step",
    "logging_steps", "logging_strategy", "per_device_eval_batch_size", "save_steps", "save_strategy",
    "save_total_limit",
)  # fmt: skip
MOST_KEYS = 10_000


def dials(cfg: TrainConfig) -> dict[str, Any]:
    """The keys that make a run what it is, flat: ``{"lr": 5e-5, "model.path": …}``."""
    return recorded_dials(asdict(cfg))


def recorded_dials(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same of plain values, also of keys that are not known here; a ValueError of more than any config has."""

    def flat(path: str, value: object) -> Iterable[tuple[str, Any]]:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                yield from flat(f"{path}.{key}" if path else str(key), inner)
        else:
            yield path, value

    kept = {key: value for key, value in values.items() if key not in WITHOUT_EFFECT}
    found = dict(itertools.islice(flat("", kept), MOST_KEYS + 1))
    if len(found) > MOST_KEYS:
        raise ValueError(f"holds more than {MOST_KEYS:,} keys")
    return {key: value for key, value in found.items() if key.removeprefix("trainer.") not in TRAINER_WITHOUT_EFFECT}


def fingerprint(*parts: Mapping[str, Any] | str) -> str:
    """A short name for what a run's numbers come from: 16 hexadecimal digits of the sha256 of its parts.

    >>> fingerprint({"lr": 1e-4, "seed": 2}) == fingerprint({"seed": 2, "lr": 1e-4}) != fingerprint({"lr": 1e-4}, "x")
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with both; one that is missing counts as None.

    >>> differences({"lr": 1, "seed": 2}, {"lr": 3, "seed": 2})
    {'lr': (1, 3)}
    """
    return {key: (before.get(key), now.get(key)) for key in {**before, **now} if before.get(key) != now.get(key)}


def require_allowed(found: Mapping[str, tuple[Any, Any]], allowed: Iterable[str]) -> None:
    """Refuse to continue a run of which more has changed than these keys; ``trainer`` allows ``trainer.max_steps``."""

    def short(value: object) -> str:
        text = str(value)
        return text if len(text) <= 60 else f"{text[:12]}…"

    names = list(allowed)
    left = {key: pair for key, pair in found.items() if not any(f"{key}.".startswith(f"{name}.") for name in names)}
    listed = "; ".join(f"{key} was {short(was)}, is {short(now)}" for key, (was, now) in left.items())
    allowing = f"resume.allow=[{','.join(dict.fromkeys([*names, *left]))}]"
    way_on = f"put it back as it was, or go on all the same, on record, with {allowing}"
    require(not left, f"resume: this is not the run that was interrupted ({listed}); {way_on}")


def without_resume(overrides: Iterable[str]) -> tuple[str, ...]:
    """The overrides that make a run what it is."""
    return tuple(override for override in overrides if not override.startswith("resume."))


def require_names(allowed: Iterable[str]) -> None:
    """Refuse what ``resume.allow`` cannot hold: other names than dials, groups and their keys, and a run's inputs."""
    known = [*(f.name for f in fields(TrainConfig) if f.name not in WITHOUT_EFFECT)]
    known += ["data", "tokenizer", "precision", "processes"]
    for name in allowed:
        if str(name).partition(".")[0] not in known:
            raise RequestError(f"resume.allow={name}: no such dial{did_you_mean(str(name), known)}")
