"""The built wheel, installed beside nothing of the checkout and used in an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mlmx import __version__

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments: str, cwd: Path, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """This interpreter, with ``site`` before its own packages: those include the checkout, installed editable."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MLMX_OUTPUTS", "PYTHONPATH")}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE"}  # shared cores
    if site:
        environment["PYTHONPATH"] = str(site)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def files_below(folder: Path) -> set[str]:
    found = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    return {path.relative_to(folder).as_posix() for path in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = python("-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed without index or network."""
    folder = tmp_path_factory.mktemp("site")
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    done = python("-m", "pip", "install", *offline, "--target", str(folder), str(wheel), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def empty(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder everything is run in; what is imported there is the wheel."""
    folder = tmp_path_factory.mktemp("empty")
    done = python("-c", "import mlmx.commands.main as cli; print(cli.__file__, cli.conf_dir())", cwd=folder, site=site)
    assert done.stdout.split() == [str(site / "mlmx/commands/main.py"), str(site / "mlmx/conf")], done.stderr
    return folder


def test_the_wheel_holds_the_package_and_its_configs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        configs = files_below(ROOT / "conf")
        assert len(configs) >= 25
        assert {name for name in names if name.startswith("mlmx/conf/")} == {f"mlmx/conf/{name}" for name in configs}
        for name in configs:
            assert archive.read(f"mlmx/conf/{name}") == (ROOT / "conf" / name).read_bytes(), name
    code = {name for name in names if name.startswith("mlmx/") and not name.startswith("mlmx/conf/")}
    assert code == {f"mlmx/{name}" for name in files_below(ROOT / "src/mlmx")}
    plugins = {name for name in names if name.startswith("hydra_plugins/")}
    assert plugins == {f"hydra_plugins/{name}" for name in files_below(ROOT / "src/hydra_plugins")}
    about = {name.partition("/")[2] for name in names if not name.startswith(("mlmx/", "hydra_plugins/"))}
    assert about == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}


def test_help_and_config(site: Path, empty: Path) -> None:
    before = list(empty.iterdir())
    told = python("-m", "mlmx", "train", "--help", cwd=empty, site=site)
    assert told.returncode == 0, told.stderr
    assert "chunk_size: 512" in told.stdout
    assert "distilbert" in told.stdout
    shown = python("-m", "mlmx", "train", "experiment=demo", "--cfg", "job", cwd=empty, site=site)
    assert shown.returncode == 0, shown.stderr
    assert "chunk_size: 128" in shown.stdout
    assert "train_chunks: 320" in shown.stdout
    script = python(str(site / "bin/mlmx"), "--version", cwd=empty, site=site)
    assert script.stdout.strip() == __version__
    assert list(empty.iterdir()) == before


def test_trains_and_predicts_in_an_empty_folder(site: Path, empty: Path, corpus: Path, tmp_path: Path) -> None:
    words = tmp_path / "reviews.txt"
    words.write_text("".join(json.loads(line)["text"] + "\n" for line in corpus.read_text().splitlines()[:20]))
    model = ("model=scratch", "model.layers=1", "model.hidden_size=32", "model.heads=2")
    dials = ("chunk_size=32", "epochs=1", "tracking=none", "dataset.train_chunks=16", "dataset.eval_chunks=8")
    files = ("dataset=files", f"dataset.path={words}")
    trained = python("-m", "mlmx", "train", *model, *files, *dials, cwd=empty, site=site)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr == ""
    assert [path.name for path in empty.iterdir()] == ["outputs"]
    (result,) = (empty / "outputs/train").glob("*/result.json")
    assert json.loads(result.read_text())["status"] == "FINISHED"
    assert f"folder   {result.parent}" in trained.stdout
    assert files_below(result.parent / "model") >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in (empty / "outputs").iterdir()} == {"cache", "train"}

    filled = python("-m", "mlmx", "predict", "run=last", "text=This is a great [MASK].", cwd=empty, site=site)
    assert filled.returncode == 0, filled.stderr
    text, *fills = filled.stdout.splitlines()
    assert text == "This is a great [MASK]."
    assert len(fills) == 5
