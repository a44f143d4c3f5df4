"""Every shipped YAML composes, binds and says what it is; the command line wins over experiments."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mlmx.commands.main import COMMANDS
from mlmx.config import schema
from mlmx.config.compose import register_resolvers
from mlmx.config.errors import RequestError
from mlmx.config.paths import conf_dir
from mlmx.config.schema import CONFIGS, Config, TrainConfig, group_names, register_schemas, to_config

GROUPS = {
    "model": ["distilbert", "bert_base", "roberta_base", "modernbert_base", "minilm", "scratch"],
    "dataset": ["imdb", "imdb_packaged", "rotten_tomatoes_packaged", "wikitext", "files"],
    "chunking": ["concat", "document"],
    "masking": ["token", "whole_word", "span"],
    "trainer": ["default", "cpu", "gpu", "reference"],
    "tracking": ["local", "server", "none"],
    "sweep": ["default", "lr_and_mask"],
    "experiment": ["demo", "reference", "imdb_512", "imdb_512_gpu", "course_128"],
}
OPTIONS = [f"{group}={option}" for group, options in GROUPS.items() for option in options]
# What an option cannot do without.
NEEDED = {"dataset=files": ["dataset.path=texts.txt"], "tracking=server": ["tracking.uri=http://127.0.0.1:5000"]}


def composed(command: str, *overrides: str) -> Config:
    """A command's config as composed from the shipped YAML."""
    register_schemas()
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_config(command, compose(command, list(overrides)))


def train_config(*overrides: str) -> TrainConfig:
    config = composed("train", *overrides)
    assert isinstance(config, TrainConfig)
    return config


# ------------------------------------------------------------------------------------ shipped YAML


def test_every_shipped_yaml_is_known_to_these_tests():
    shipped = {str(path.relative_to(conf_dir())) for path in conf_dir().rglob("*") if path.is_file()}
    expected = {f"{command}.yaml" for command in COMMANDS}
    expected |= {f"{option.replace('=', '/')}.yaml" for option in OPTIONS}
    assert shipped == expected
    assert len(OPTIONS) == 30


@pytest.mark.parametrize("option", OPTIONS)
def test_every_shipped_option_composes_and_binds(option: str):
    from mlmx.experiment import parts_of

    parts_of(train_config(option, *NEEDED.get(option, [])))


@pytest.mark.parametrize("option", GROUPS["trainer"])
def test_shipped_trainers_name_fields_of_training_arguments(option: str):
    from transformers import TrainingArguments

    from mlmx.training.arguments import SET_BY

    given = set(train_config(f"trainer={option}").trainer) - {"name"}
    assert given - set(TrainingArguments.__dataclass_fields__) == set()
    assert given & set(SET_BY) == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_dials_of_the_yaml_are_the_defaults_of_the_dataclass(command: str):
    config, defaults = composed(command), CONFIGS[command]()
    groups = group_names(CONFIGS[command])
    dials = [field.name for field in fields(CONFIGS[command]) if field.name not in groups]
    assert {name: getattr(config, name) for name in dials} == {name: getattr(defaults, name) for name in dials}


def test_the_default_of_a_dial_is_written_once():
    """In the YAML: what the dataclasses say, and what the messages do, is read from it."""
    tree = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    roots = {one.__name__ for one in (*CONFIGS.values(), schema.Resume, schema.Heldout, schema.Sweep)}
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in roots]
    values = [line.value for node in classes for line in node.body if isinstance(line, ast.AnnAssign)]
    assert len(values) > 40
    assert [ast.unparse(value) for value in values if isinstance(value, ast.Constant)] == []
    shipped = OmegaConf.load(conf_dir() / "train.yaml")
    for name in ("lr", "epochs", "batch_size", "weight_decay", "save_minutes"):
        with pytest.raises(RequestError, match=f"the default is {shipped[name]:g}$"):
            TrainConfig(**{name: -1})


def test_the_defaults_are_the_walkthroughs():
    config = train_config()
    dials = (config.chunk_size, config.mlm_probability, config.lr, config.epochs, config.batch_size)
    assert dials == (512, 0.15, 2e-5, 3.0, 8)
    assert (config.weight_decay, config.seed) == (0.01, 42)
    assert config.model["path"] == "distilbert/distilbert-base-uncased"
    split = {key: config.dataset[key] for key in ("path", "train_chunks", "eval_chunks", "split_seed")}
    assert split == {"path": "stanfordnlp/imdb", "train_chunks": 10000, "eval_chunks": 1000, "split_seed": 42}


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_experiments_open_with_their_command_cost_and_result(experiment: str):
    lines = (conf_dir() / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8").splitlines()
    header = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    assert header[:2] == ["# @package _global_", f"# python -m mlmx train experiment={experiment}"]
    assert header[2].startswith("# Cost: ")
    assert "Result" in " ".join(header)


# ------------------------------------------------------------------------------------- precedence


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["experiment=demo"], {"chunk_size": 128, "lr": 5e-4, "batch_size": 8, "epochs": 2.0, "seed": 42}),
        (["experiment=demo", "chunk_size=256"], {"chunk_size": 256, "lr": 5e-4}),
        (["chunk_size=256", "lr=5e-5", "experiment=demo"], {"chunk_size": 256, "lr": 5e-5, "batch_size": 8}),
    ],
)
def test_a_dial_on_the_command_line_wins_over_the_experiment(overrides: list[str], expected: dict[str, Any]):
    config = train_config(*overrides)
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_group_on_the_command_line_wins_over_the_experiment():
    config = train_config("experiment=demo", "model=scratch", "dataset=rotten_tomatoes_packaged")
    assert config.model["name"] == "scratch"
    assert config.dataset["source"] == "rotten_tomatoes"
    assert train_config("experiment=demo").model["name"] == "packaged"
    # the experiment's own options of a group still stand, unless given too
    assert config.dataset["train_chunks"] == 320
    assert train_config("experiment=demo", "dataset.train_chunks=7").dataset["train_chunks"] == 7
