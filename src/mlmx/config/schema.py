"""What a user may ask for: one dataclass per command, composed by Hydra, plain and checked from then on."""

from __future__ import annotations

import functools
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from mlmx.config.errors import did_you_mean, require
from mlmx.config.options import convert
from mlmx.config.paths import conf_dir
from mlmx.config.redaction import refuse_code, refuse_secrets, refuse_unwritable
from mlmx.config.trust import with_trusted_revision

Options = dict[str, Any]
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
ON_NAN = ("stop", "skip", "rollback")  # what becomes of a training step whose loss or gradient is not finite
OUT_SUFFIXES = (".html", ".png", ".csv", ".md")
KEEP_ALL, BEST_AND_LAST = "all", "best+last"  # or a whole number: which checkpoints stay
MOST_EPOCHS = 1_000_000
MOST_ROWS = 1_000_000  # of a batch
RESUME: Options = {"run": None, "allow": []}
HELDOUT: Options = {"dataset": None, "documents": 400, "share": 0.02}


@dataclass
class TrainConfig:
    """Dials of ``train``; the groups below them are free mappings that `bind` checks."""

    chunk_size: int = 512
    mlm_probability: float = 0.15
    lr: float = 2e-5
    epochs: float = 3
    batch_size: int = 8
    weight_decay: float = 0.01
    seed: int = 42
    precision: str = "auto"
    on_nan: str = "stop"
    run_name: str | None = None
    note: str | None = None
    example: str = "This is a great [MASK]."
    save_minutes: float | None = 15
    keep: str = KEEP_ALL
    register: str | None = None
    resume: Options = field(default_factory=lambda: dict(RESUME), metadata={"group": False})
    sweep: Options = field(default_factory=lambda: {"reuse": True})
    heldout: Options = field(default_factory=lambda: dict(HELDOUT), metadata={"group": False})
    model: Options = field(default_factory=dict)
    dataset: Options = field(default_factory=dict)
    chunking: Options = field(default_factory=dict)
    masking: Options = field(default_factory=dict)
    trainer: Options = field(default_factory=dict)
    tracking: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            self.chunk_size >= 3,
            f"chunk_size={self.chunk_size}: a chunk needs at least 3 tokens (two can be nothing but special "
            "tokens); give a whole number from 3 up to what the model can hold",
        )
        require(
            0 < self.mlm_probability < 1,
            f"mlm_probability={self.mlm_probability:g}: the share of tokens to mask must lie between 0 and 1, "
            "both excluded; the usual value is 0.15",
        )
        require(0 < self.lr < math.inf, f"lr={self.lr:g}: must be a number greater than 0; the default is 2e-05")
        require(
            0 < self.epochs <= MOST_EPOCHS,
            f"epochs={self.epochs:g}: must be a number greater than 0 and at most {MOST_EPOCHS:,}; the default is 3",
        )
        require(
            1 <= self.batch_size <= MOST_ROWS,
            f"batch_size={self.batch_size}: must be at least 1 and at most {MOST_ROWS:,}; the default is 8",
        )
        require(
            0 <= self.weight_decay < math.inf,
            f"weight_decay={self.weight_decay:g}: must be 0 or more; the default is 0.01",
        )
        require(0 <= self.seed < 2**32, f"seed={self.seed}: must lie between 0 and 4294967295")
        for name, choices in (("precision", PRECISIONS), ("on_nan", ON_NAN)):
            value = getattr(self, name)
            near = did_you_mean(value, choices)
            require(value in choices, f"{name}={value}: choose one of {', '.join(choices)}{near}")
        require(
            self.save_minutes is None or 0 < self.save_minutes < math.inf,
            f"save_minutes={self.save_minutes}: must be greater than 0, or null for none; the default is 15",
        )
        require_keep(self.keep, self.trainer)
        require(
            self.register is None or bool(re.fullmatch(r"\w[\w .\-]{0,199}", self.register)),
            f"register={self.register!r}: is no name for a registered model; use letters, digits, spaces and . _ -, "
            "at most 200 characters, the first a letter or digit",
        )


def require_keep(keep: str, trainer: Mapping[str, Any]) -> None:
    """Refuse a ``keep`` that says nothing, or another thing than ``trainer.save_total_limit``."""
    choices = (BEST_AND_LAST, KEEP_ALL)
    require(
        keep in choices or (keep.isascii() and keep.isdecimal() and 1 <= int(keep) <= MOST_EPOCHS),
        f"keep={keep}: choose {BEST_AND_LAST}, {KEEP_ALL}, or how many of the newest checkpoints stay, a whole number "
        f"from 1{did_you_mean(keep, choices)}",
    )
    require(
        keep == KEEP_ALL or trainer.get("save_total_limit") is None,
        f"keep={keep}: trainer.save_total_limit={trainer.get('save_total_limit')} says it another way; leave that out",
    )


@dataclass
class PrepareConfig:
    """Dials of ``prepare``: those of ``train`` that decide what the data is."""

    chunk_size: int = 512
    mlm_probability: float = 0.15
    seed: int = 42
    preview: int = 0
    heldout: Options = field(default_factory=lambda: dict(HELDOUT), metadata={"group": False})
    model: Options = field(default_factory=dict)
    dataset: Options = field(default_factory=dict)
    chunking: Options = field(default_factory=dict)
    masking: Options = field(default_factory=dict)


@dataclass
class EvaluateConfig:
    """Dials of ``evaluate``."""

    run: str = "last"
    chunk_size: int | None = None
    batch_size: int = 32
    dataset: Options = field(default_factory=dict)
    tracking: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            1 <= self.batch_size <= MOST_ROWS,
            f"batch_size={self.batch_size}: must be at least 1 and at most {MOST_ROWS:,}",
        )
        require(
            self.chunk_size is None or self.chunk_size >= 3,
            f"chunk_size={self.chunk_size}: a chunk needs at least 3 tokens",
        )


@dataclass
class PredictConfig:
    """Dials of ``predict``."""

    run: str = "last"
    text: list[str] = field(default_factory=list)
    top_k: int = 5

    def __post_init__(self) -> None:
        require(self.top_k >= 1, f"top_k={self.top_k}: must be at least 1; the default is 5")


@dataclass
class UiConfig:
    """Dials of ``ui``."""

    host: str = "127.0.0.1"
    port: int = 5000
    expose: bool = False
    tracking: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            bool(re.fullmatch(r"[A-Za-z0-9._:-]+", self.host)),
            f"host={self.host!r}: is no name or address; the default is 127.0.0.1",
        )
        require(1 <= self.port <= 65535, f"port={self.port}: must lie between 1 and 65535")


@dataclass
class DoctorConfig:
    """Dials of ``doctor``."""

    tracking: Options = field(default_factory=dict)


@dataclass
class SyncConfig:
    """Dials of ``sync``."""

    run: str = "last"
    tracking: Options = field(default_factory=dict)


@dataclass
class CompareConfig:
    """Dials of ``compare``."""

    runs: list[str] = field(default_factory=list)
    sweep_folder: str | None = None
    sort: str = "heldout/loss"
    out: list[str] = field(default_factory=list)
    tracking: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            not (self.runs and self.sweep_folder),
            f"runs=[{','.join(self.runs)}] and sweep={self.sweep_folder}: each says which runs to compare; give one of "
            "them",
        )
        for path in self.out:
            suffix = Path(path).suffix.lower()
            require(
                suffix in OUT_SUFFIXES,
                f"out={path}: cannot be written; the name ends with one of {', '.join(OUT_SUFFIXES)}",
            )


Config = (
    TrainConfig | PrepareConfig | EvaluateConfig | PredictConfig | UiConfig | DoctorConfig | SyncConfig | CompareConfig
)
CONFIGS: dict[str, type[Config]] = {
    "train": TrainConfig,
    "prepare": PrepareConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "ui": UiConfig,
    "doctor": DoctorConfig,
    "sync": SyncConfig,
    "compare": CompareConfig,
}


@dataclass(frozen=True)
class Job:
    """Where and how a command was asked for, beside its dials."""

    folder: Path
    overrides: tuple[str, ...] = ()
    choices: Mapping[str, str] = field(default_factory=dict)
    sweep: Path | None = None  # the folder of the sweep that it is a job of
    parent: str | None = None  # and that sweep's MLflow run


@functools.cache
def register_schemas() -> None:
    """Make each root's dataclass known to Hydra as ``<command>_schema``.

    The groups accept any key at composition (``trainer.warmup_steps=10`` needs no ``+``): `bind` checks
    them against the function that will take them, which says more than "key not in struct".
    """
    for command, schema in CONFIGS.items():
        node = OmegaConf.structured(schema)
        for name in open_nodes(schema):
            node[name]._set_flag("struct", False)
        ConfigStore.instance().store(name=f"{command}_schema", node=node)


def group_names(schema: type[Config]) -> list[str]:
    """Root keys that are config groups.

    >>> group_names(UiConfig)
    ['tracking']
    """
    return [name for name in open_nodes(schema) if schema.__dataclass_fields__[name].metadata.get("group", True)]


def open_nodes(schema: type[Config]) -> list[str]:
    """Root keys that take any key at composition and are checked by `bind`: the groups, and ``heldout``."""
    return [f.name for f in fields(schema) if f.type == "Options"]


def to_config(command: str, composed: DictConfig) -> Config:
    """Hydra's composition as a plain dataclass, every root key checked (``+key=…`` slips past Hydra)."""
    known = [f.name for f in fields(CONFIGS[command])]
    for key in map(str, composed):
        require(
            key in known,
            f"{key}: unknown key{did_you_mean(key, known)} (python -m mlmx {command} --help lists them)",
        )
    plain = typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    refuse_code(plain)
    refuse_unwritable(plain)
    # What predict is given is shown again and written nowhere.
    refuse_secrets({key: value for key, value in plain.items() if (command, key) != ("predict", "text")})
    return from_plain(command, with_trusted_revision(plain))


def from_plain(command: str, values: Mapping[str, Any]) -> Config:
    """A command's dataclass from plain values, types converted and checked."""
    schema = CONFIGS[command]
    checked = {}
    hints = typing.get_type_hints(schema)
    for name, value in values.items():
        require(name in hints, f"{name}: unknown key{did_you_mean(name, hints)}")
        checked[name] = convert(name, value, hints[name])
    return schema(**checked)


def load_option(group: str, option: str) -> Options:
    """A shipped option of a group (``conf/dataset/imdb.yaml``) as plain values, for use in another place."""
    folder = conf_dir() / group
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    require(
        option in known,
        f"{group}={option}: no such option{did_you_mean(option, known)} (options: {', '.join(known)})",
    )
    return typing.cast(Options, OmegaConf.to_container(OmegaConf.load(folder / f"{option}.yaml"), resolve=True))
