"""What a user may ask for: one dataclass per command, composed by Hydra, plain and checked from then on.

The default of a dial stands in ``conf/<command>.yaml``, and only there.
"""

from __future__ import annotations

import functools
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from mlmx.config import own_files
from mlmx.config.errors import did_you_mean, require
from mlmx.config.options import convert
from mlmx.config.paths import conf_dir
from mlmx.config.redaction import refuse_code, refuse_secrets, refuse_unwritable
from mlmx.config.trust import with_trusted_revision

C = TypeVar("C")
Options = dict[str, Any]
KEEP_ALL, BEST_AND_LAST = "all", "best+last"  # or a whole number: which checkpoints stay
MOST = 1_000_000  # epochs, checkpoints, rows of a batch

TRAIN, PREPARE, EVALUATE, PREDICT = map(own_files.shipped, ("train", "prepare", "evaluate", "predict"))
UI, SYNC, COMPARE, SWEEP = map(own_files.shipped, ("ui", "sync", "compare", "sweep/default"))


def _dial(key: str, value: object, ok: bool, needed: str, usual: object = None) -> None:
    """Refuse a dial's value unless ``ok``, in one form of words; ``usual``: the YAML's default, where it is told."""
    shown, default = (f"{one:g}" if isinstance(one, float) else str(one) for one in (value, usual))
    require(ok, f"{key}={shown}: {needed}" + (f"; the default is {default}" if usual is not None else ""))


@dataclass
class Resume:
    """The ``resume`` node: the folder of the run to go on with, and the dials that may have changed about it."""

    run: str | None = TRAIN["resume"]["run"]
    allow: list[str] = field(default_factory=list)


@dataclass
class Heldout:
    """The ``heldout`` node: the yardstick's documents."""

    # A dataset option (``rotten_tomatoes_packaged``) or the options of one to take documents from; null: the dataset's
    # own test split, else what the dataset names, else a share of it.
    dataset: Any = TRAIN["heldout"]["dataset"]
    documents: int = TRAIN["heldout"]["documents"]  # at most so many are scored, chosen by content hash
    # Of the documents, taken out before chunking where there is no other source; 0 takes none: nothing is held out.
    share: float = TRAIN["heldout"]["share"]

    def __post_init__(self) -> None:
        self.dataset, usual = convert("heldout.dataset", self.dataset, str | Options | None), TRAIN["heldout"]
        _dial("heldout.documents", self.documents, self.documents >= 1, "must be at least 1", usual["documents"])
        _dial("heldout.share", self.share, 0 <= self.share < 1, "must be 0 or more and less than 1", usual["share"])


@dataclass
class Sweep:
    """The ``sweep`` node: whether a sweep that is issued again takes up what it has, or begins anew."""

    reuse: bool = SWEEP["reuse"]


@dataclass
class TrainConfig:
    """Dials of ``train``; the groups below them are free mappings that `bind` checks."""

    chunk_size: int = TRAIN["chunk_size"]
    mlm_probability: float = TRAIN["mlm_probability"]
    lr: float = TRAIN["lr"]
    epochs: float = TRAIN["epochs"]
    batch_size: int = TRAIN["batch_size"]
    weight_decay: float = TRAIN["weight_decay"]
    seed: int = TRAIN["seed"]
    precision: str = TRAIN["precision"]
    on_nan: str = TRAIN["on_nan"]
    run_name: str | None = TRAIN["run_name"]
    note: str | None = TRAIN["note"]
    example: str = TRAIN["example"]
    save_minutes: float | None = TRAIN["save_minutes"]
    keep: str = TRAIN["keep"]
    register: str | None = TRAIN["register"]
    resume: Resume = field(default_factory=Resume)
    sweep: Sweep = field(default_factory=Sweep)
    heldout: Heldout = field(default_factory=Heldout)
    model: Options = field(default_factory=dict)
    dataset: Options = field(default_factory=dict)
    chunking: Options = field(default_factory=dict)
    masking: Options = field(default_factory=dict)
    trainer: Options = field(default_factory=dict)
    tracking: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        few = "a chunk needs at least 3 tokens (two can be nothing but special tokens); give a whole number from 3 up "
        _dial("chunk_size", self.chunk_size, self.chunk_size >= 3, few + "to what the model can hold")
        share = "the share of tokens to mask must lie between 0 and 1, both excluded; the usual value is "
        share += f"{TRAIN['mlm_probability']:g}"
        _dial("mlm_probability", self.mlm_probability, 0 < self.mlm_probability < 1, share)
        for key, ok, needed in (
            ("lr", 0 < self.lr < math.inf, "must be a number greater than 0"),
            ("epochs", 0 < self.epochs <= MOST, f"must be a number greater than 0 and at most {MOST:,}"),
            ("batch_size", 1 <= self.batch_size <= MOST, f"must be at least 1 and at most {MOST:,}"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "must be 0 or more"),
        ):
            _dial(key, getattr(self, key), ok, needed, TRAIN[key])
        _dial("seed", self.seed, 0 <= self.seed < 2**32, "must lie between 0 and 4294967295")
        for key, choices in (("precision", ("auto", "fp32", "bf16", "fp16")), ("on_nan", ("stop", "skip", "rollback"))):
            value = getattr(self, key)
            _dial(key, value, value in choices, f"choose one of {', '.join(choices)}{did_you_mean(value, choices)}")
        often, needed = self.save_minutes, "must be greater than 0, or null for none"
        _dial("save_minutes", str(often), often is None or 0 < often < math.inf, needed, TRAIN["save_minutes"])
        kept, limit = (BEST_AND_LAST, KEEP_ALL), self.trainer.get("save_total_limit")
        is_number = bool(re.fullmatch("[0-9]{1,7}", self.keep)) and 1 <= int(self.keep) <= MOST
        newest = f"how many of the newest checkpoints stay, a whole number from 1{did_you_mean(self.keep, kept)}"
        _dial("keep", self.keep, self.keep in kept or is_number, f"choose {', '.join(kept)}, or {newest}")
        again = f"trainer.save_total_limit={limit} says it another way; leave that out"
        _dial("keep", self.keep, self.keep == KEEP_ALL or limit is None, again)
        is_name = self.register is None or bool(re.fullmatch(r"\w[\w .\-]{0,199}", self.register))
        use = "use letters, digits, spaces and . _ -, at most 200 characters, the first a letter or digit"
        _dial("register", repr(self.register), is_name, f"is no name for a registered model; {use}")


@dataclass
class PrepareConfig:
    """Dials of ``prepare``: those of ``train`` that decide what the data is."""

    chunk_size: int = PREPARE["chunk_size"]
    mlm_probability: float = PREPARE["mlm_probability"]
    seed: int = PREPARE["seed"]
    preview: int = PREPARE["preview"]
    heldout: Heldout = field(default_factory=Heldout)
    model: Options = field(default_factory=dict)
    dataset: Options = field(default_factory=dict)
    chunking: Options = field(default_factory=dict)
    masking: Options = field(default_factory=dict)


@dataclass
class EvaluateConfig:
    """Dials of ``evaluate``."""

    run: str = EVALUATE["run"]
    chunk_size: int | None = EVALUATE["chunk_size"]
    batch_size: int = EVALUATE["batch_size"]
    dataset: Options = field(default_factory=dict)
    tracking: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows, tokens = self.batch_size, self.chunk_size
        _dial("batch_size", rows, 1 <= rows <= MOST, f"must be at least 1 and at most {MOST:,}")
        _dial("chunk_size", tokens, tokens is None or tokens >= 3, "a chunk needs at least 3 tokens")


@dataclass
class PredictConfig:
    """Dials of ``predict``."""

    run: str = PREDICT["run"]
    text: list[str] = field(default_factory=list)
    top_k: int = PREDICT["top_k"]

    def __post_init__(self) -> None:
        _dial("top_k", self.top_k, self.top_k >= 1, "must be at least 1", PREDICT["top_k"])


@dataclass
class UiConfig:
    """Dials of ``ui``."""

    host: str = UI["host"]
    port: int = UI["port"]
    expose: bool = UI["expose"]
    tracking: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        is_name = bool(re.fullmatch(r"[A-Za-z0-9._:-]+", self.host))
        _dial("host", repr(self.host), is_name, "is no name or address", UI["host"])
        _dial("port", self.port, 1 <= self.port <= 65535, "must lie between 1 and 65535")


@dataclass
class DoctorConfig:
    """Dials of ``doctor``."""

    tracking: Options = field(default_factory=dict)


@dataclass
class SyncConfig:
    """Dials of ``sync``."""

    run: str = SYNC["run"]
    tracking: Options = field(default_factory=dict)


@dataclass
class CompareConfig:
    """Dials of ``compare``."""

    runs: list[str] = field(default_factory=list)
    sweep_folder: str | None = COMPARE["sweep_folder"]
    sort: str = COMPARE["sort"]
    out: list[str] = field(default_factory=list)
    tracking: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        both = f"runs=[{','.join(self.runs)}] and sweep={self.sweep_folder}: each says which runs to compare"
        require(not (self.runs and self.sweep_folder), f"{both}; give one of them")
        kinds = (".html", ".png", ".csv", ".md")
        for path in self.out:
            known = Path(path).suffix.lower() in kinds
            _dial("out", path, known, f"cannot be written; the name ends with one of {', '.join(kinds)}")


Config = (
    TrainConfig | PrepareConfig | EvaluateConfig | PredictConfig | UiConfig | DoctorConfig | SyncConfig | CompareConfig
)
CONFIGS: dict[str, type[Config]] = {c.__name__.removesuffix("Config").lower(): c for c in typing.get_args(Config)}


@dataclass(frozen=True)
class Job:
    """Where and how a command was asked for, beside its dials."""

    folder: Path
    overrides: tuple[str, ...] = ()
    choices: Mapping[str, str] = field(default_factory=dict)
    own: own_files.Files = field(default_factory=dict)  # YAML of the user's own, to be kept with a run
    sweep: Path | None = None  # the folder of the sweep that it is a job of
    parent: str | None = None  # and that sweep's MLflow run


@functools.cache
def register_schemas() -> None:
    """Make each root's dataclass known to Hydra as ``<command>_schema``."""
    for command, schema in CONFIGS.items():
        node = OmegaConf.structured(schema)
        # Any key is taken at composition (``trainer.warmup_steps=10`` needs no ``+``) and checked later, in more words.
        for name in open_nodes(schema):
            OmegaConf.set_struct(node[name], False)
        ConfigStore.instance().store(name=f"{command}_schema", node=node)


def group_names(schema: type[Config]) -> list[str]:
    """Root keys that are config groups: those with a folder of options.

    >>> group_names(UiConfig)
    ['tracking']
    """
    return [name for name in open_nodes(schema) if (conf_dir() / name).is_dir()]


def open_nodes(schema: type[Config]) -> list[str]:
    """Root keys that take any key at composition: the groups, and ``heldout`` and ``resume``."""
    return [name for name, hint in typing.get_type_hints(schema).items() if hint == Options or is_dataclass(hint)]


def to_config(command: str, composed: DictConfig, folders: Sequence[Path] = ()) -> Config:
    """Hydra's composition, plain and checked; datasets are looked for in ``folders`` of the user's own as well."""
    known = [f.name for f in fields(CONFIGS[command])]
    for key in map(str, composed):  # +key=… slips past Hydra
        near = did_you_mean(key, known)
        require(key in known, f"{key}: unknown key{near} (python -m mlmx {command} --help lists them)")
    plain = typing.cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    own_files.fill_in(plain.get("heldout"), "dataset", folders)
    own_files.fill_in(plain.get("dataset"), "heldout", folders)
    refuse_code(plain)
    refuse_unwritable(plain)
    # What predict is given is shown again and written nowhere.
    refuse_secrets({key: value for key, value in plain.items() if (command, key) != ("predict", "text")})
    return from_plain(CONFIGS[command], with_trusted_revision(plain))


def from_plain(schema: type[C], values: Mapping[str, Any], node: str = "") -> C:
    """A command's dataclass, or that of its ``node`` (``heldout.``), from plain values, types converted and checked."""
    hints, found = typing.get_type_hints(schema), {}
    for name, value in values.items():
        key, near = f"{node}{name}", did_you_mean(name, hints)
        what = f"option{near} ({node[:-1]} takes {', '.join(hints)})" if node else f"key{near}"
        require(name in hints, f"{key}: unknown {what}")
        if is_dataclass(hints[name]):
            found[name] = from_plain(typing.cast(Any, hints[name]), convert(key, value, Options), f"{key}.")
        else:
            found[name] = convert(key, value, hints[name])
    return schema(**found)
