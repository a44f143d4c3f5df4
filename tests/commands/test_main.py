"""What a command line means: help, names, jobs, sweeps, texts, completion, exit codes; and what it loads."""

from __future__ import annotations

import importlib
import json
import logging
import os
import pickle
import pkgutil
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.defaults_list import DefaultsList
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

import mlmx
from mlmx import commands
from mlmx.commands import arguments as arguments_of
from mlmx.commands.main import COMMANDS, main
from mlmx.config import paths
from mlmx.config.compose import ComposedOnce, register_resolvers
from mlmx.config.errors import RequestError
from mlmx.config.paths import conf_dir
from mlmx.config.schema import CONFIGS, Job, PredictConfig, TrainConfig, group_names, register_schemas, to_config
from mlmx.kernels.threads import Neighbours

ROOT = Path(__file__).resolve().parents[2]


def options_of(group: str) -> set[str]:
    """The shipped options of a group; test_conf.py says which these are."""
    return {path.stem for path in (conf_dir() / group).glob("*.yaml")}


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, Job]]:
    """The configs and jobs that a command line hands to `train`, which does not train here."""
    seen: list[tuple[TrainConfig, Job]] = []
    monkeypatch.setattr("mlmx.commands.train.train", lambda cfg, job, *more: seen.append((cfg, job)))
    return seen


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """Some of Hydra's own answers put a handler on the root logger that outlives the test's stdout."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


QUICK = ["model=scratch", "dataset=imdb_packaged", "tracking=none"]

# --------------------------------------------------------------------------------- what is loaded

LOADED = """
import json, sys
known = set(sys.modules)
from mlmx.commands.main import main
report = []
for arguments in json.loads(sys.argv[1]):
    code = main(arguments)
    report.append([code, sorted({name.partition(".")[0] for name in set(sys.modules) - known})])
print(json.dumps(report))
"""


def loaded_after(*command_lines: list[str], cwd: Path) -> list[tuple[int, set[str]]]:
    """Exit code of each command line, and the top-level modules loaded since the interpreter's start."""
    command = [sys.executable, "-c", LOADED, json.dumps(command_lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd, timeout=60)
    return [(code, set(modules)) for code, modules in json.loads(done.stdout.splitlines()[-1])]


def test_help_and_mistyped_commands_load_nothing_but_the_standard_library(tmp_path: Path):
    helps = [[], ["--help"], ["-h"], ["--version"], *([command, "--help"] for command in COMMANDS)]
    mistyped = [["trian"], ["--train"], ["compere", "x=1"]]
    endings = loaded_after(*helps, *mistyped, ["train", "chunk_size=0", "-h"], cwd=tmp_path)
    assert [code for code, _ in endings] == [0] * len(helps) + [2] * len(mistyped) + [0]
    assert {name for _, modules in endings for name in modules} - sys.stdlib_module_names == {"mlmx"}


@pytest.mark.long  # a process of its own
def test_a_configuration_error_loads_no_model_library(tmp_path: Path):
    heavy = {"torch", "transformers", "tokenizers", "accelerate", "mlflow", "datasets", "psutil"}
    (tmp_path / "reviews.csv").write_text("body\ngood\n")
    wrong = [
        ["train", "chunk_size=0"],
        ["train", "chunk_sze=1"],
        ["train", "lr=x"],
        ["train", "model=distilbrt"],
        ["train", "+model._target_=os.system"],
        ["train", "model=scratch", "model.layrs=2"],
        ["train", "model=minilm", "dataset=imdb_packaged", "chunk_size=1000"],
        ["train", "masking.mask_share=2"],
        ["train", "trainer.learning_rate=1"],
        ["train"],  # the hub does not answer
        ["train", "-m", *QUICK, "chunk_size=64,2"],
        ["predict"],
        ["evaluate", "run=nope"],
        ["ui"],
    ]
    endings = loaded_after(*wrong, cwd=tmp_path)
    assert [code for code, _ in endings] == [2] * len(wrong)
    assert [(line, modules & heavy) for line, (_, modules) in zip(wrong, endings, strict=True) if modules & heavy] == []
    # Columns of a file are judged by the library that reads it.
    [(code, modules)] = loaded_after(["train", "model=scratch", "dataset=files", "dataset.path=*.csv"], cwd=tmp_path)
    assert (code, modules & heavy) == (2, {"datasets"})


# ------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize(
    ("arguments", "rank", "alone"),
    [
        (["train"], None, True),
        (["train", "-m", "lr=1e-5,2e-5"], None, True),
        (["train", "-m", "lr=1e-5,2e-5", "hydra/launcher=joblib"], None, False),
        (["train"], "1", False),
    ],
)
def test_how_threads_wait_is_chosen_once_for_all_jobs(
    arguments: list[str], rank: str | None, alone: bool, monkeypatch: pytest.MonkeyPatch
):
    chosen = []

    def choose(neighbours: Neighbours, *, alone: bool) -> None:
        chosen.append(alone)
        raise SystemExit(7)

    monkeypatch.setattr("mlmx.kernels.threads.choose_waiting", choose)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert main([*arguments, "model=scratch", "dataset=imdb_packaged"]) == 7
    assert chosen == [alone]


def test_program_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    assert main([]) == main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [command for command in COMMANDS if f"\n  {command} " not in shown] == []


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == mlmx.__version__


@pytest.mark.parametrize("command", COMMANDS)
def test_command_help_lists_every_dial_and_every_option_of_its_groups(command: str, capsys: pytest.CaptureFixture[str]):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    groups = group_names(CONFIGS[command])
    dials = [field.name for field in fields(CONFIGS[command]) if field.name not in groups]
    assert [dial for dial in dials if f"\n{dial}: " not in shown] == []
    listed = {words[0]: set(words[1:]) for line in shown.splitlines() if (words := line.replace(",", " ").split())}
    assert [group for group in groups if listed.get(group) != options_of(group)] == []
    assert "hydra:" not in shown


def test_command_help_lists_the_users_own_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "ours.yaml").write_text("name: scratch\n")
    for flag in (["--config-dir", str(tmp_path)], [f"--config-dir={tmp_path}"], ["-cd", str(tmp_path)]):
        assert main(["train", *flag, "--help"]) == 0
        assert " ours," in capsys.readouterr().out
    assert main(["train", "--help"]) == 0
    assert " ours," not in capsys.readouterr().out


def test_hydra_help_is_hydras(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--hydra-help"]) == 0
    assert "--hydra-help" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ names


def test_the_four_places_of_a_commands_name_agree():
    found = [module.name for module in pkgutil.iter_modules(commands.__path__)]
    modules = {name: importlib.import_module(f"mlmx.commands.{name}") for name in found}
    checked = {name for name, module in modules.items() if callable(getattr(module, "check", None))}
    assert set(COMMANDS) == checked
    assert set(COMMANDS) == set(CONFIGS)
    assert set(COMMANDS) == {path.stem for path in conf_dir().glob("*.yaml")}
    for command in COMMANDS:
        assert callable(getattr(modules[command], command))
        assert CONFIGS[command].__name__ == f"{command.title()}Config"


def test_conf_is_that_of_the_checkout_or_else_of_the_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert conf_dir() == ROOT / "conf"
    installed = tmp_path / "site-packages" / "mlmx"
    monkeypatch.setattr(paths, "CHECKOUT", None)
    monkeypatch.setattr(paths, "PACKAGE", installed)
    assert conf_dir() == installed / "conf"


# -------------------------------------------------------------------------------- through to train


def test_a_command_line_reaches_train_as_config_and_job(jobs: list[tuple[TrainConfig, Job]], outputs: Path):
    assert main(["train", *QUICK, "chunk_size=64", "trainer.warmup_steps=10"]) == 0
    [(config, job)] = jobs
    assert config.chunk_size == 64
    assert config.trainer["warmup_steps"] == 10
    assert job.folder.parent == outputs / "train"
    assert job.overrides == (*QUICK, "chunk_size=64", "trainer.warmup_steps=10")
    assert job.choices["model"] == "scratch"


@pytest.mark.parametrize(
    "line",
    [
        ["-m", *QUICK, "chunk_size=64,128", "lr=1e-4,1e-5"],
        [*QUICK, "chunk_size=64,128", "-m", "lr=1e-4,1e-5"],
        [*QUICK, "chunk_size=64,128", "lr=1e-4,1e-5", "--multirun"],
        [*QUICK, "chunk_size=choice(64,128)", "lr=1e-4,1e-5", "-m"],
    ],
)
def test_a_sweep_is_the_grid_of_its_values_wherever_the_flag_stands(
    line: list[str], jobs: list[tuple[TrainConfig, Job]], outputs: Path
):
    assert main(["train", *line]) == 0
    asked = [(64, 1e-4), (64, 1e-5), (128, 1e-4), (128, 1e-5)]
    assert [(config.chunk_size, config.lr) for config, _ in jobs] == asked
    [sweep] = {job.folder.parent for _, job in jobs}
    assert [job.folder.name for _, job in jobs] == ["0", "1", "2", "3"]
    assert sweep.parent == outputs / "train"


def test_a_job_of_a_sweep_refers_to_its_own_values(jobs: list[tuple[TrainConfig, Job]]):
    assert main(["train", "-m", *QUICK, "run_name=seed ${seed}", "seed=1,2"]) == 0
    assert [config.run_name for config, _ in jobs] == ["seed 1", "seed 2"]


def test_the_checked_jobs_are_the_ones_that_run(monkeypatch: pytest.MonkeyPatch, jobs: list[tuple[TrainConfig, Job]]):
    checked: list[TrainConfig] = []
    monkeypatch.setattr("mlmx.commands.train.check", checked.append)
    assert main(["train", *QUICK, "chunk_size=range(10,30,10)", "seed=1,2", "-m"]) == 0
    assert checked == [config for config, _ in jobs]
    assert len(checked) == 4


@pytest.mark.parametrize(
    ("line", "composed"),
    [
        (["train", *QUICK], 1),
        (["predict"], 1),
        # What holds for the whole sweep (its sweeper, launcher and folder), and each of its jobs.
        (["train", "-m", *QUICK, "lr=1,2", "seed=1,2"], 1 + 4),
        (["predict", "-m", "top_k=1,2,3,4"], 1 + 4),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_a_job_is_composed_once(
    line: list[str], composed: int, jobs: list[tuple[TrainConfig, Job]], monkeypatch: pytest.MonkeyPatch
):
    own, count = DefaultsList.__init__, [0]

    def counted(*given: Any, **named: Any) -> None:
        count[0] += 1
        own(*given, **named)

    monkeypatch.setattr(DefaultsList, "__init__", counted)
    monkeypatch.setattr("mlmx.commands.predict.check", lambda cfg: None)
    monkeypatch.setattr("mlmx.commands.predict.predict", lambda cfg, job: jobs.append((cfg, job)))
    assert main(line) == 0
    assert len(jobs) == max(1, composed - 1)
    assert count == [composed]


def test_a_launcher_elsewhere_composes_the_job_that_was_checked_in_the_folder_of_the_sweep(tmp_path: Path):
    """Launchers pickle Hydra's context for each job; the configs of all the others do not go with it."""
    register_schemas()
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        hydras = GlobalHydra.instance().config_loader()
        loader = ComposedOnce(hydras.get_search_path())
        whole = loader.load_configuration("train", [*QUICK, "seed=1,2"], RunMode.MULTIRUN)
        here = [loader.load_sweep_config(whole, [*QUICK, f"seed={seed}"]) for seed in (1, 2)]
        loader.folder = tmp_path
        sent = pickle.dumps((loader, whole))
    assert len(sent) < len(pickle.dumps((hydras, whole))) + 500
    elsewhere, whole = pickle.loads(sent)
    found = elsewhere.load_sweep_config(whole, [*QUICK, "seed=2"])
    assert found.hydra.sweep.dir == str(tmp_path)
    here[1].hydra.sweep.dir = str(tmp_path)
    assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(here[1])


OURS = ["model=ours", "dataset=imdb_packaged", "chunk_size=64"]


def test_a_sweep_runs_what_was_checked_whatever_becomes_of_the_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outputs: Path
):
    option, ran = tmp_path / "conf" / "model" / "ours.yaml", []
    option.parent.mkdir(parents=True)
    option.write_text("name: scratch\nlayers: 1\n")

    def train(config: TrainConfig, job: Job, *more: Any) -> None:
        ran.append((config.model["layers"], config.lr, job.folder.name))
        option.write_text("name: scratch\nlayers: 9\n")

    monkeypatch.setattr("mlmx.commands.train.train", train)
    assert main(["train", "--config-dir", str(tmp_path / "conf"), "-m", *OURS, "lr=1,2,2"]) == 0
    assert ran == [(1, 1.0, "0"), (1, 2.0, "1"), (1, 2.0, "1")], "a value given twice is one run"


def test_the_users_own_yaml_comes_in_through_config_dir(tmp_path: Path, jobs: list[tuple[TrainConfig, Job]]):
    own = {"model/ours.yaml": "name: scratch\nlayers: 1\n", "experiment/night.yaml": OWN_EXPERIMENT}
    for name, text in own.items():
        (tmp_path / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / name).write_text(text)
    assert main(["train", "--config-dir", str(tmp_path / "conf"), "experiment=night", "lr=3e-3"]) == 0
    [(config, job)] = jobs
    assert config.model == {"name": "scratch", "layers": 1}
    assert (config.chunk_size, config.lr, config.dataset["train_chunks"]) == (32, 3e-3, 50)
    assert (job.choices["experiment"], job.choices["model"]) == ("night", "ours")


OWN_EXPERIMENT = """# @package _global_
defaults:
  - override /model: ours
  - override /dataset: imdb_packaged

chunk_size: 32
lr: 1e-2
dataset: {train_chunks: 50}
"""


def test_cfg_job_prints_the_composition_and_runs_nothing(
    jobs: list[tuple[TrainConfig, Job]], outputs: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", "experiment=demo", "lr=1e-3", "--cfg", "job"]) == 0
    printed = OmegaConf.create(capsys.readouterr().out)
    assert (printed.chunk_size, printed.lr, printed.model.name) == (128, 1e-3, "packaged")
    assert not jobs
    assert not outputs.exists()


def test_read_only_commands_make_no_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, outputs: Path, jobs: list[tuple[TrainConfig, Job]]
):
    monkeypatch.chdir(tmp_path)
    ran = []
    for command in ("predict", "evaluate", "ui"):
        monkeypatch.setattr(f"mlmx.commands.{command}.check", lambda cfg: None)
        monkeypatch.setattr(f"mlmx.commands.{command}.{command}", lambda cfg, job: ran.append(type(cfg).__name__))
        assert main([command]) == 0
    assert ran == ["PredictConfig", "EvaluateConfig", "UiConfig"]
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------- literal texts

NASTY = [
    "This is a great [MASK].",
    "It's a [MASK], isn't it?",
    'She said: "a [MASK]".',
    "'",
    '"',
    "''",
    "\\",
    "a [MASK]\\",
    "\\'",
    "'\\",
    "\\\\'x\\\\",
    "${x}",
    "\\${x}",
    "\\\\${x}",
    "${outputs:}",
    "\\${",
    "$\\{",
    "${${a}}",
    "a,b",
    "[a,b]",
    "{a: 1}",
    "a=b",
    "text=a",
    "a [MASK]\\\n",
    "~a",
    "+a",
    "@a",
    "# no comment",
    "null",
    "true",
    "1e3",
    "???",
    "",
    " ",
    "  two spaces  ",
    "tab\tand\nline",
    "naïve 日本語 😀",
    "glob(*)",
    "range(1,3)",
]


def shuffled_pieces(count: int) -> list[str]:
    """Texts made of whatever Hydra and OmegaConf give a meaning to."""
    pieces = [*"'\"\\}$x,[](){:=~+@ #\n", "\\", "'", "${", "${outputs:}", "[MASK]", "é"]
    draw = random.Random(0)
    return ["".join(draw.choices(pieces, k=draw.randint(1, 8))) for _ in range(count)]


@pytest.mark.parametrize("texts", [NASTY, shuffled_pieces(1500)], ids=["chosen", "drawn"])
def test_texts_to_fill_come_through_untouched(texts: list[str]):
    arguments = arguments_of.literal_texts("predict", ["top_k=3", *(f"text={text}" for text in texts)])
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = to_config("predict", compose("predict", arguments))
    assert config == PredictConfig(text=texts, top_k=3)


def test_texts_reach_predict_from_the_command_line(monkeypatch: pytest.MonkeyPatch):
    seen: list[list[str]] = []
    monkeypatch.setattr("mlmx.commands.predict.check", lambda cfg: seen.append(cfg.text))
    monkeypatch.setattr("mlmx.commands.predict.predict", lambda cfg, job: seen.append(cfg.text))
    assert main(["predict", "text=It's \\${x}", "top_k=1", "text=a, b\\"]) == 0
    assert seen == [["It's \\${x}", "a, b\\"]] * 2


def test_only_predict_takes_its_text_literally():
    assert arguments_of.literal_texts("train", ["text=${x}", "note='a'"]) == ["text=${x}", "note='a'"]
    assert arguments_of.literal_texts("predict", ["run=last"]) == ["run=last"]


# ------------------------------------------------------------------------------------- completion


@pytest.mark.parametrize(
    ("line", "proposed"),
    [
        ("mlmx ", set(COMMANDS)),
        ("mlmx tr", {"train"}),
        ("mlmx zz", set()),
        ("mlmx train chunk", {"chunk_size=", "chunking=", "chunking."}),
        ("mlmx train model=", {f"model={option}" for option in options_of("model")}),
        ("mlmx train lr=1 experiment=", {f"experiment={option}" for option in options_of("experiment")}),
        ("mlmx train dataset.eval", {"dataset.eval_chunks="}),
        ("mlmx   evaluate run", {"run="}),
        ("mlmx ui tracking=", {f"tracking={option}" for option in options_of("tracking")}),
        ("/usr/bin/mlmx predict top", {"top_k="}),
    ],
)
def test_tab_completes_commands_groups_and_options(
    line: str, proposed: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], outputs: Path
):
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    assert main(["-sc", "query=bash"]) == 0
    assert set(capsys.readouterr().out.split()) == proposed
    assert not outputs.exists()


def test_completion_is_installed_for_mlmx(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delenv("COMP_LINE", raising=False)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/mlmx", "-sc", "install=bash"])
    assert main(["-sc", "install=bash"]) == 0
    assert " mlmx" in capsys.readouterr().out.strip().splitlines()[-1]


# ------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (RequestError("no mask token\n  here"), 2, "mlmx: no mask token here\n"),
        (ValueError("bad\nluck"), 1, "mlmx: ValueError: bad luck (MLMX_DEBUG=1 shows where)\n"),
        (KeyboardInterrupt(), 130, "mlmx: interrupted\n"),
        (SystemExit(3), 3, ""),
        (SystemExit(None), 0, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_ending_is_an_exit_code_and_at_most_one_line(
    raised: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    outputs: Path,
):
    def fails(cfg: TrainConfig, job: Job, *more: Any) -> None:
        raise raised

    monkeypatch.setattr("mlmx.commands.train.train", fails)
    assert main(["train", *QUICK]) == code
    assert capsys.readouterr().err == line
    assert not outputs.exists(), "who makes a folder removes it"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLMX_DEBUG", "1")
    with pytest.raises(RequestError, match="chunk_size=0"):
        main(["train", "chunk_size=0"])


def test_a_job_that_is_refused_while_running_is_named_and_ends_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], outputs: Path
):
    def refuses(cfg: TrainConfig, job: Job, *more: Any) -> None:
        raise RequestError(f"too few chunks for {cfg.seed}")

    monkeypatch.setattr("mlmx.commands.train.train", refuses)
    assert main(["train", "-m", *QUICK, "seed=1,2"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "mlmx: job 0 of the sweep (seed=1): too few chunks for 1",
        "mlmx: job 1 of the sweep (seed=2): too few chunks for 2",
        "mlmx: 2 of 2 jobs failed; the same command again tries them anew",
    ]
    assert {path.parent.name for path in outputs.rglob("job.json")} == {"0", "1"}


def test_the_process_is_left_as_it_was(jobs: list[tuple[TrainConfig, Job]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    argv = list(sys.argv)
    before = dict(os.environ)
    assert main(["train", *QUICK]) == 0
    assert main(["train", *QUICK, "chunk_size=1"]) == 2
    assert (sys.argv, dict(os.environ)) == (argv, before)
