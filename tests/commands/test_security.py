"""What a request may not do: run code, write outside outputs/, set the environment, unpack archives, hold secrets,
open the UI to others by accident."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlmx.commands import ui
from mlmx.commands.main import COMMANDS, main
from mlmx.comparison.plots import plot_run
from mlmx.config.errors import RequestError
from mlmx.config.paths import outputs_dir
from mlmx.config.schema import Job, TrainConfig, UiConfig
from mlmx.config.sources import find_package_file
from mlmx.data.texts import refuse_archive

ROOT = Path(__file__).resolve().parents[2]
CANARY = "Canary-7f3a9e51c0"
Refusal = Callable[[Sequence[str]], str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a small text file and a folder for configs of one's own."""
    folder = tmp_path / "here"
    (folder / "own").mkdir(parents=True)
    (folder / "good.txt").write_text("A great film it is.\n" * 100)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refusal(here: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refusal:
    """Runs a command line that must be refused in one line, without a trace; returns the line."""
    for command in COMMANDS:
        if command != "ui":
            let_through = f"mlmx.commands.{command}.{command}"
            monkeypatch.setattr(let_through, lambda *_: pytest.fail("the request was let through"))
    before = snapshot(here.parent)

    def run(arguments: Sequence[str]) -> str:
        capfd.readouterr()
        code = main(arguments)
        told = capfd.readouterr()
        assert (code, told.out) == (2, ""), told
        assert re.fullmatch(r"mlmx: [^\n]+\n", told.err), told.err
        assert snapshot(here.parent) - before == written
        assert not outputs.exists()
        return told.err

    written: set[Path] = set()
    run.written = written  # type: ignore[attr-defined]
    return run


def snapshot(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def own(refusal: Refusal, name: str, text: str) -> list[str]:
    """A YAML in the user's config folder, and the flag that brings it in."""
    path = Path("own") / name
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    refusal.written.update(folder.absolute() for folder in missing)  # type: ignore[attr-defined]
    return ["--config-dir", "own"]


GOOD = ["model=scratch", "dataset=files", "dataset.path=good.txt", "chunk_size=16", "tracking=none"]


@pytest.fixture
def ran(here: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, Job]]:
    """What reached `train`, which does not train here."""
    seen: list[tuple[TrainConfig, Job]] = []
    monkeypatch.setattr("mlmx.commands.train.train", lambda cfg, job, *more: seen.append((cfg, job)))
    return seen


def test_the_request_of_these_tests_is_right_but_for_its_fault(ran: list[Any]):
    assert main(["train", *GOOD]) == 0
    assert len(ran) == 1


# --------------------------------------------------------------------------------- code from a config

TARGET = "{_target_: os.system}"
TARGETS = [
    (["+model._target_=os.system"], "model._target_"),
    (["++trainer.optim._target_=os.system"], "trainer.optim._target_"),
    ([f"+trainer.hooks=[[1,[{TARGET.replace(': ', ':')}]]]"], "trainer.hooks.0.1.0._target_"),
    (["+heldout.dataset={_target_:os.system}"], "heldout.dataset._target_"),
    (["heldout.dataset={name:files,path:{_target_:x}}"], "heldout.dataset.path._target_"),
    (["+dataset.split_seed=${hydra.launcher}"], None),
    (["+zz={_target_:os.system}"], "zz"),
    (["+model.trust_remote_code=true"], "model.trust_remote_code"),
    (["dataset.trust_remote_code=true"], "dataset.trust_remote_code"),
    (["+trainer.model_init_kwargs={trust_remote_code:true}"], "trainer.model_init_kwargs.trust_remote_code"),
]


@pytest.mark.parametrize(("overrides", "place"), TARGETS, ids=lambda value: str(value)[:40])
def test_no_override_brings_code_in(overrides: list[str], place: str | None, refusal: Refusal):
    line = refusal(["train", *GOOD, *overrides])
    assert place is None or place in line


YAMLS = {
    "model/evil.yaml": (f"name: scratch\nlayers: {TARGET}\n", "model=evil", "model.layers._target_"),
    "dataset/evil.yaml": (f"name: files\nsplit_seed: [1, {TARGET}]\n", "dataset=evil", "dataset.split_seed.1._target_"),
    "masking/evil.yaml": ("name: token\n_target_: os.system\n", "masking=evil", "masking._target_"),
    "tracking/evil.yaml": ("name: none\ntrust_remote_code: true\n", "tracking=evil", "tracking.trust_remote_code"),
    "experiment/evil.yaml": (
        "# @package _global_\nheldout: {dataset: {name: files, path: good.txt, x: {_target_: os.system}}}\n",
        "experiment=evil",
        "heldout.dataset.x._target_",
    ),
    "experiment/link.yaml": (
        "# @package _global_\ntrainer: {optim: '${model.x}'}\nmodel: {x: {_target_: os.system}}\n",
        "experiment=link",
        "_target_",
    ),
}


@pytest.mark.parametrize("name", YAMLS)
def test_no_yaml_brings_code_in(name: str, refusal: Refusal):
    text, option, place = YAMLS[name]
    flag = own(refusal, name, text)
    assert place in refusal(["train", *flag, *GOOD, option])
    assert place in refusal(["train", "-m", *flag, *GOOD, option, "lr=1e-3,1e-4"])


def test_a_link_to_hydras_own_node_brings_no_code_in(refusal: Refusal):
    flag = own(refusal, "experiment/evil.yaml", "# @package _global_\ntrainer: {hooks: '${hydra.launcher}'}\n")
    refusal(["train", *flag, *GOOD, "experiment=evil"])


def test_a_package_of_data_is_no_dotted_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """To find one, the package above it would be imported."""
    (tmp_path / "mlmx_test_code").mkdir()
    (tmp_path / "mlmx_test_code" / "__init__.py").write_text("raise AssertionError('this was run')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RequestError, match="no name of an installed package"):
        find_package_file("mlmx_test_code.inside", "x.csv")
    assert "mlmx_test_code" not in sys.modules


# ------------------------------------------------------------------------------------ Hydra's own node

NODE = [
    (["hydra.output_subdir=.hydra"], "hydra.output_subdir"),
    (["hydra.output_subdir=../../x"], "hydra.output_subdir"),
    (["hydra.job.chdir=true"], "hydra.job.chdir"),
    (["+hydra.job.env_set.MLMX_OUTPUTS=/tmp/x"], "hydra.job.env_set"),
    (["hydra.job.env_set={LD_PRELOAD:x.so}"], "hydra.job.env_set"),
    (["hydra.job.env_copy=[PATH]"], "hydra.job.env_copy"),
    (["hydra/job_logging=default"], "hydra/job_logging"),
    (["hydra/hydra_logging=default"], "hydra/hydra_logging"),
    (["+hydra.callbacks.x._target_=os.system"], "hydra.callbacks"),
    (["hydra.launcher._target_=os.system"], "hydra.launcher._target_"),
    (["hydra.launcher._target_=hydra_plugins.x.os.system"], "hydra.launcher._target_"),
    (["hydra.launcher._target_=hydra._internal.core_plugins.basic_launcher.os.system"], "hydra.launcher._target_"),
    (["hydra.sweeper._target_=subprocess.Popen"], "hydra.sweeper._target_"),
    (["+hydra.sweeper.x={_target_:os.system}"], "hydra.sweeper.x._target_"),
    (["+hydra.x=[{_target_:os.system}]"], "hydra"),
    (["hydra.mode=MULTIRUN"], "hydra.mode"),
]


@pytest.mark.parametrize(("overrides", "place"), NODE, ids=lambda value: str(value)[:50])
def test_hydras_node_sets_nothing_and_names_no_code(overrides: list[str], place: str, refusal: Refusal):
    assert place in refusal(["train", *GOOD, *overrides])


@pytest.mark.parametrize("row", [0, 3, 9])
def test_nor_in_a_sweep(row: int, refusal: Refusal):
    overrides, place = NODE[row]
    assert place in refusal(["train", "-m", *GOOD, "lr=1e-3,1e-4", *overrides])


def test_nor_does_it_from_a_yaml(refusal: Refusal):
    for key, value in {
        "callbacks": "{x: {_target_: os.system}}",
        "job": "{env_set: {HF_ENDPOINT: 'http://evil'}}",
        "launcher": TARGET,
        "mode": "MULTIRUN",
        "output_subdir": "x",
    }.items():
        flag = own(refusal, f"experiment/{key}.yaml", f"# @package _global_\nhydra: {{{key}: {value}}}\n")
        assert f"hydra.{key}" in refusal(["train", *flag, *GOOD, f"experiment={key}"])


def test_a_launcher_of_ones_own_is_refused(refusal: Refusal):
    flag = own(refusal, "hydra/launcher/evil.yaml", "_target_: os.system\ncommand: 'touch x'\n")
    assert "hydra.launcher._target_=os.system" in refusal(["train", *flag, *GOOD, "hydra/launcher=evil"])
    assert "hydra.launcher._target_=os.system" in refusal(
        ["train", "-m", *flag, *GOOD, "hydra/launcher=evil", "lr=1,2"]
    )


def test_a_sweep_added_by_a_config_is_checked_as_well(refusal: Refusal):
    """`hydra.sweeper.params` is where a config may add to a sweep, also overrides of Hydra's own node."""
    for params in ("{hydra.sweep.dir: /tmp/mlmx-x}", "{model.name: scrach}", "{+model._target_: os.system}"):
        flag = own(refusal, "experiment/more.yaml", f"# @package _global_\nhydra: {{sweeper: {{params: {params}}}}}\n")
        refusal(["train", "-m", *flag, *GOOD, "experiment=more", "lr=1e-3,1e-4"])


# --------------------------------------------------------------------------------- below outputs/

FOLDERS = [
    "/tmp/mlmx-x",
    "elsewhere",
    ".",
    "'~/x'",
    "${outputs:}/../x",
    "${outputs:}/train/../../x",
    "${outputs:}",
    "${outputs:}x/run",
    "${hydra.runtime.cwd}/x",
    "${oc.env:HOME}/x",
    "'a\\0b'",
]


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir"])
def test_no_folder_lies_outside_outputs(key: str, folder: str, refusal: Refusal, outputs: Path):
    line = refusal(["train", *GOOD, f"{key}={folder}", *(["-m", "lr=1,2"] if "sweep" in key else [])])
    assert key in line
    assert "is no folder" in line or (str(outputs) in line and "MLMX_OUTPUTS=" in line)


@pytest.mark.parametrize("subdir", ["../../../x", "/tmp/mlmx-x", "a/../../../../x", "${hydra.job.override_dirname}"])
def test_no_job_of_a_sweep_leaves_outputs(subdir: str, refusal: Refusal):
    line = refusal(["train", "-m", *GOOD, "lr=1,2", "run_name=/../../../../../../x", f"hydra.sweep.subdir={subdir}"])
    assert "hydra.sweep.subdir=" in line


def test_nor_by_a_yaml(refusal: Refusal):
    for number, text in enumerate(
        [
            "run: {dir: /tmp/mlmx-x}",
            "sweep: {dir: ../x}",
            "sweep: {subdir: ../../../x}",
            "sweep: {dir: '${oc.env:HOME}'}",
        ]
    ):
        flag = own(refusal, f"experiment/e{number}.yaml", f"# @package _global_\nhydra: {{{text}}}\n")
        assert "lies outside" in refusal(["train", *flag, *GOOD, f"experiment=e{number}"])
        assert "lies outside" in refusal(["train", "-m", *flag, *GOOD, f"experiment=e{number}", "lr=1,2"])


def test_nor_by_a_link(here: Path, outputs: Path, ran: list[Any], capsys: pytest.CaptureFixture[str]):
    (outputs / "train").mkdir(parents=True)
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    (outputs / "train" / "link").symlink_to(elsewhere)
    (outputs / "train" / "loop").symlink_to(outputs / "train" / "loop")
    for folder in ("link", "link/run", "loop/run"):
        assert main(["train", *GOOD, f"hydra.run.dir={outputs}/train/{folder}"]) == 2
        assert (
            main(["train", "-m", *GOOD, "lr=1,2", f"hydra.sweep.dir={outputs}/train", f"hydra.sweep.subdir={folder}"])
            == 2
        )
    assert list(elsewhere.iterdir()) == []
    assert capsys.readouterr().err.count("hydra.") == 6
    assert ran == []


def test_outputs_may_be_a_link_itself(here: Path, outputs: Path, ran: list[Any]):
    """As on machines where all that is large lies on a disk of its own."""
    (here / "disk").mkdir()
    outputs.symlink_to(here / "disk")
    assert main(["train", *GOOD]) == 0
    assert main(["train", *GOOD, f"hydra.run.dir={outputs}/train/mine"]) == 0
    assert [job.folder.resolve().is_relative_to(here / "disk") for _, job in ran] == [True, True]


def test_folders_below_outputs_are_free_to_choose(here: Path, outputs: Path, ran: list[Any]):
    assert main(["train", *GOOD, "hydra.run.dir=${outputs:}/a b/c"]) == 0
    assert (
        main(
            [
                "train",
                "-m",
                *GOOD,
                "lr=1,2",
                "hydra.sweep.dir=${outputs:}/s",
                "hydra.sweep.subdir=${hydra.job.override_dirname}",
            ]
        )
        == 0
    )
    assert [job.folder.relative_to(outputs).parts[0] for _, job in ran] == ["a b", "s", "s"]
    assert outputs_dir() == outputs


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "train"])
def test_the_other_commands_make_no_folder_elsewhere_either(
    command: str, here: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    ran = []
    monkeypatch.setattr(f"mlmx.commands.{command}.check", lambda cfg: None)
    monkeypatch.setattr(f"mlmx.commands.{command}.{command}", lambda cfg, job: ran.append(job.folder))
    before = snapshot(here.parent)
    for wrong in (["hydra.run.dir=x"], ["hydra.run.dir=/tmp/mlmx-x"], ["hydra.sweep.dir=x", "-m"]):
        assert main([command, *wrong]) == 2
        assert "lies outside" in capsys.readouterr().err
    assert main([command]) == 0
    assert main([command, "-m", "+hydra.sweep.note=1"]) in (0, 2)
    assert main([command, "-m"]) == 0
    assert snapshot(here.parent) == before
    assert len(ran) >= 2
    assert not outputs.exists()


NAMES = ["../../x", "/etc/passwd", "a/b\\c", "$\\frac{", "..", "x" * 300, "\u202e😀 naïve"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_runs_name_is_a_name_and_nothing_else(name: str, tmp_path: Path, ran: list[Any], outputs: Path):
    assert main(["train", *GOOD, f"run_name='{name}'"]) == 0
    [(config, job)] = ran
    assert job.folder.parent == outputs / "train"
    assert isinstance(config.run_name, str)
    drawn = plot_run([{"step": 0, "epoch": 0.0, "eval/loss": 1.0}], tmp_path / "plots", config.run_name)
    assert sorted(path.name for path in drawn) == ["loss.png", "perplexity.png"]
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"loss.png", "perplexity.png"}


# ---------------------------------------------------------------------------------------- archives


def tar_of(mode: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=mode) as archive:
        archive.addfile(tarfile.TarInfo("../../x.txt"), io.BytesIO(b""))
    return packed.getvalue()


def zip_of(names: list[str]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in names:
            archive.writestr(name, "A great film.\n")
    return packed.getvalue()


PACKED = {
    "zip": zip_of(["../../x.txt"]),
    "empty zip": zip_of([]),
    "tar": tar_of("w"),
    "tgz": tar_of("w:gz"),
    "gz": gzip.compress(b"A great film.\n"),
    "bz2": bz2.compress(b"A great film.\n"),
    "xz": lzma.compress(b"A great film.\n"),
    "zst": b"\x28\xb5\x2f\xfd\x04\x00",
    "lz4": b"\x04\x22\x4d\x18\x00",
    "7z": b"7z\xbc\xaf\x27\x1c\x00",
    "rar": b"Rar!\x1a\x07\x00",
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_an_archive_is_not_unpacked_whatever_its_name(kind: str, suffix: str, tmp_path: Path):
    path = tmp_path / f"texts{suffix}"
    path.write_bytes(PACKED[kind])
    with pytest.raises(RequestError, match=f"dataset.path={path}: is (a|compressed).*not unpacked"):
        refuse_archive(path)


@pytest.mark.parametrize("suffix", ["zip", "tar", "tgz", "gz", "bz2", "xz", "zst", "7z", "rar", "TAR.GZ", "txt.gz"])
def test_an_archive_is_refused_by_its_name(suffix: str, refusal: Refusal, here: Path):
    path = here / f"texts.{suffix}"
    path.write_text("A great film.\n" * 50)
    refusal.written.add(path)  # type: ignore[attr-defined]
    assert "not unpacked" in refusal(["train", *GOOD, f"dataset.path={path.name}"])


def test_a_packed_file_among_others_is_refused(refusal: Refusal, here: Path):
    (here / "texts").mkdir()
    (here / "texts" / "a.txt").write_text("A great film.\n" * 50)
    (here / "texts" / "b.txt").write_bytes(PACKED["gz"])
    refusal.written |= {here / "texts", here / "texts" / "a.txt", here / "texts" / "b.txt"}  # type: ignore[attr-defined]
    for path in ("texts", "texts/*", "[texts/a.txt,texts/b.txt]"):
        assert "b.txt: is compressed by gzip" in refusal(["train", *GOOD, f"dataset.path={path}"])
    heldout = "heldout.dataset={name:files,path:texts/b.txt,train_chunks:0.5,eval_chunks:0.1}"
    assert "not unpacked" in refusal(["train", *GOOD, heldout])


@pytest.mark.parametrize(
    "text", ["BZh is how it begins", "PK is a name", "Rar!", "7zip is a program", "ustar " * 100, ""]
)
def test_texts_that_begin_like_an_archive_are_texts(text: str, tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text(text)
    refuse_archive(path)


# ----------------------------------------------------------------------------- secrets in a request

ADDRESS = f"http://somebody:{CANARY}@127.0.0.1:9/api"
SECRETS = [
    (
        [f"tracking.uri={ADDRESS}", "tracking=server"],
        ["tracking.uri=http://***@127.0.0.1:9/api", "MLFLOW_TRACKING_PASSWORD"],
    ),
    ([f"run_name={ADDRESS}"], ["run_name=http://***@", "HF_TOKEN"]),
    ([f"dataset.path={CANARY}/x.txt"], ["dataset.path=***/x.txt", "the value of HF_TOKEN"]),
    ([f"dataset.path=[good.txt,'{ADDRESS}']"], ["***@"]),
    ([f"model.tokenizer='https://h/?token={CANARY}x'"], ["model.tokenizer"]),
    ([f"+zz.{CANARY}=1"], ["zz.***"]),
    ([f"hydra.run.dir=${{outputs:}}/{CANARY}"], ["hydra.run.dir"]),
    (["example=[MASK] hf_" + "aB3" * 12], ["example", "an access token"]),
    (["note='${oc.env:HF_TOKEN}'"], ["note=***", "the value of HF_TOKEN"]),
    (["trainer.hub_token=x"], ["trainer.hub_token", "HF_TOKEN in the environment"]),
    (["--config-dir", CANARY], ["--config-dir"]),
]


@pytest.mark.parametrize(("overrides", "words"), SECRETS, ids=lambda value: str(value)[:30])
def test_a_secret_in_a_request_is_refused_before_anything_is_written(
    overrides: list[str], words: list[str], refusal: Refusal, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    for sweep in ([], ["-m", "lr=1e-3,1e-4"]):
        line = refusal(["train", *GOOD, *overrides, *sweep])
        assert CANARY not in line
        assert [word for word in words if word not in line] == []


def test_a_secret_in_a_yaml_is_refused(refusal: Refusal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    for name, text in {"note": CANARY, "run_name": ADDRESS}.items():
        flag = own(refusal, f"experiment/{name}.yaml", f"# @package _global_\n{name}: {text}\n")
        for sweep in ([], ["-m", "lr=1e-3,1e-4"]):
            line = refusal(["train", *flag, *GOOD, f"experiment={name}", *sweep])
            assert CANARY not in line
            assert f"{name}=" in line


def test_a_secret_in_a_note_is_replaced_and_the_run_goes_on(
    ran: list[tuple[TrainConfig, Job]],
    outputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    assert main(["train", *GOOD, f"note='made with {CANARY} from {ADDRESS}'"]) == 0
    assert main(["train", "-m", *GOOD, f"+note={CANARY}", "lr=1e-3,1e-4"]) in (0, 2)
    assert main(["train", "-m", *GOOD, f"note={CANARY}", "lr=1e-3,1e-4"]) == 0
    assert ran[0][0].note == "made with *** from http://***@127.0.0.1:9/api"
    assert [config.note for config, _ in ran[-2:]] == ["***", "***"]
    assert CANARY not in str([job.overrides for _, job in ran])
    told = capsys.readouterr()
    assert CANARY not in told.out + told.err
    assert "note: holds a secret" in told.err
    files = [path for path in outputs.rglob("*") if path.is_file()]
    assert {"multirun.yaml", "sweep.json", "job.json", "table.md"} <= {path.name for path in files}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_a_text_to_predict_is_no_record(monkeypatch: pytest.MonkeyPatch, here: Path):
    seen: list[list[str]] = []
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr("mlmx.commands.predict.check", lambda cfg: seen.append(cfg.text))
    monkeypatch.setattr("mlmx.commands.predict.predict", lambda cfg, job: None)
    assert main(["predict", "text=See http://a:b@c for [MASK]."]) == 0
    assert seen == [["See http://a:b@c for [MASK]."]]


# ------------------------------------------------------------------------------------------- the UI


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_loopback_needs_no_word(host: str):
    assert ui.is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "10.0.0.1", "example.org", "127.1", "2130706433"])
def test_other_machines_are_let_in_only_when_asked_for(host: str, refusal: Refusal):
    line = refusal(["ui", f"host='{host}'"])
    assert f"host={host}:" in line
    assert "expose=true" in line


def test_exposing_passes_the_word_on_and_an_absent_address_is_said(
    store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    started: list[str] = []
    monkeypatch.setattr("mlmx.commands.ui.ui", lambda cfg, job: started.append(cfg.host))
    assert main(["ui", "host=0.0.0.0", "expose=true", "port=0"]) == 2
    assert main(["ui", "host=192.0.2.7", "expose=true", "port=53211"]) == 2  # an address kept for documents
    assert main(["ui", "host='a b'"]) == 2
    told = capsys.readouterr().err
    assert "host=192.0.2.7: is no address of this machine" in told
    assert "host='a b': is no name or address" in told
    assert started == []


class Stopped:
    """What `subprocess.Popen` is replaced by: a server that ends at once."""

    commands: list[list[str]]
    environments: list[dict[str, str]]

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.commands.append(command)
        self.environments.append(env)

    def wait(self) -> int:
        return 0

    def terminate(self) -> None: ...


@pytest.fixture
def server(store: Path, monkeypatch: pytest.MonkeyPatch) -> type[Stopped]:
    Stopped.commands, Stopped.environments = [], []
    monkeypatch.setattr("subprocess.Popen", Stopped)
    monkeypatch.delenv("MLFLOW_SERVER_ALLOWED_HOSTS", raising=False)
    monkeypatch.delenv("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", raising=False)
    return Stopped


def option(command: list[str], name: str) -> list[str]:
    return command[command.index(name) + 1].split(",") if name in command else []


def test_on_loopback_it_answers_to_names_of_loopback_only(server: type[Stopped], capsys: pytest.CaptureFixture[str]):
    ui.ui(UiConfig(tracking={"name": "local"}), Job(Path()))
    [command] = server.commands
    assert option(command, "--host") == ["127.0.0.1"]
    hosts = ["localhost", "localhost:*", "127.0.0.1", "127.0.0.1:*", "[::1]", "[[]::1]:*"]
    assert option(command, "--allowed-hosts") == hosts
    assert option(command, "--cors-allowed-origins") == []
    assert server.environments[0]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert capsys.readouterr().err == ""
    from mlflow.server.security_utils import is_allowed_host_header

    names = [
        "localhost:5000",
        "127.0.0.1:8080",
        "[::1]:5000",
        "10.evil.example:5000",
        "192.168.evil.example",
        "evil:5000",
    ]
    assert [is_allowed_host_header(hosts, name) for name in names] == [True, True, True, False, False, False]


def test_exposed_it_warns_runs_no_jobs_and_answers_to_its_own_names(
    server: type[Stopped], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("socket.gethostname", lambda: "box")
    monkeypatch.setattr("socket.getfqdn", lambda: "box.lab.example")
    exposed = UiConfig(host="0.0.0.0", expose=True, port=5123, tracking={"name": "local"})
    ui.ui(exposed, Job(Path()))
    [command] = server.commands
    assert option(command, "--host") == ["0.0.0.0"]
    assert {"box", "box.lab.example", "localhost", "box:*"} <= set(option(command, "--allowed-hosts"))
    assert "*" not in option(command, "--allowed-hosts")
    assert {"http://box:5123", "http://box.lab.example:5123"} <= set(option(command, "--cors-allowed-origins"))
    assert server.environments[0]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    told = capsys.readouterr()
    assert told.err.startswith("mlmx: warning: ")
    assert told.err.count("\n") == 1
    assert "http://box:5123" in told.out
    monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", "other")
    assert "--allowed-hosts" not in ui.allowed(exposed)


# ------------------------------------------------------------------------------------- dependencies


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def test_lower_bounds_have_the_known_holes_fixed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = dict(re.match(r"([\w.-]+)>=([\d.]+)", wanted).groups() for wanted in project["dependencies"])  # type: ignore[union-attr]
    assert version(least["transformers"]) >= (5, 3)
    assert version(least["mlflow"]) >= (3, 11)


def test_every_pinned_package_has_hashes_and_the_audit_is_written_down():
    blocks = re.split(r"\n(?=[A-Za-z0-9])", (ROOT / "constraints.txt").read_text())
    pinned = [block for block in blocks if re.match(r"[A-Za-z0-9_.-]+==", block)]
    assert len(pinned) > 100
    assert [block.split()[0] for block in pinned if "--hash=sha256:" not in block] == []
    assert "pip-audit --require-hashes --disable-pip -r constraints.txt" in (ROOT / "CONTRIBUTING.md").read_text()
