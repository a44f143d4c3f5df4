# ruff: noqa: E501 (tables of values)
"""A run's or a model's files that hold anything: the command that reads them is right, or says in one line which."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmx.config.schema import TrainConfig
from tests.fuzz.harness import Bench, complaint, examples

ODD_BYTES = [
    *(b"", b" ", b"null", b"5", b'"a"', b"[]", b"[1]", b"{}", b'{"a": 1}', b"{", b"\x00" * 64, b"\xff\xfe", b"a: [", b"- a", b"x"),
    *(b'{"status": 5, "run_id": []}', b"[" * 3000, b'{"a":' * 3000, b"!!python/object:os.system", b"\x08\x00\x00\x00\x00\x00\x00\x00{}"),
]  # fmt: skip
RUN_FILES = [
    "result.json",
    "config.yaml",
    "overrides.yaml",
    "metrics.jsonl",
    "process.json",
    "mlflow.json",
    "data.json",
    "inputs.json",
]
MODEL_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
READING = [
    ["predict", "text=A [MASK]."],
    ["evaluate"],
    ["train", "resume={run}"],
    ["train", "resume=last"],
    ["train", "resume=auto", "model=scratch", "dataset=files", "dataset.path=good.txt", "chunk_size=16"],
    ["predict", "run={run}", "text=A [MASK]."],
    ["predict", "run=an_id", "text=A [MASK]."],
    ["evaluate", "run={run}"],
    ["sync", "run={run}"],
    ["compare"],
    ["compare", "runs=[{run}]"],
    ["doctor"],
]


@pytest.fixture
def bench(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A working folder with a model and a text; what trains or scores is checked as ever, and then does nothing."""
    for name in ("train", "predict", "evaluate"):
        monkeypatch.setattr(importlib.import_module(f"mlmx.commands.{name}"), name, lambda config, job: None)
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "good.txt").write_text("A film it is.\n" * 60, encoding="utf-8")
    shutil.copytree(tiny, folder / "tiny")
    return Bench(folder, tmp_path / "outputs")


def save_run(bench: Bench, status: str) -> Path:
    """A run as far as these commands look at it."""
    groups = {"chunking": "concat", "masking": "token", "tracking": "none", "trainer": "corrected"}
    config = TrainConfig(
        **{name: {"name": value} for name, value in groups.items()},
        model={"name": "scratch"},
        dataset={"name": "files", "path": str(bench.folder / "good.txt")},
        chunk_size=16,
    )
    run = bench.outputs / "train" / "one"
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({"status": status, "run_id": "an_id", "protocol": "p"}))
    (run / "config.yaml").write_text(json.dumps(asdict(config)))
    (run / "overrides.yaml").write_text('["model=scratch", "dataset=files"]')
    (run / "metrics.jsonl").write_text('{"step": 0, "epoch": 0.0, "time": "2026-01-01T00:00:00+00:00"}\n')
    shutil.copytree(bench.folder / "tiny", run / "model")
    return run


def check_run(bench: Bench, file: str, contents: bytes, command: list[str], status: str) -> None:
    shutil.rmtree(bench.outputs, ignore_errors=True)
    run = save_run(bench, status)
    (run / file).write_bytes(contents)
    ending = bench.run([word.format(run=run) for word in command], keep=True)
    assert complaint(ending) is None, (file, contents, command, ending)
    assert (run / file).is_file()


damages = (st.sampled_from(RUN_FILES), st.sampled_from(ODD_BYTES), st.sampled_from(READING))
statuses = st.sampled_from(["FINISHED", "KILLED", "RUNNING"])


@given(*damages, statuses)
@examples(30)
def test_a_damaged_run_is_read_or_refused(bench: Bench, file: str, contents: bytes, command: list[str], status: str):
    check_run(bench, file, contents, command, status)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_every_damaged_run_is_read_or_refused(bench: Bench):
    for file in RUN_FILES:
        for contents in ODD_BYTES:
            for command in READING:
                check_run(bench, file, contents, command, "FINISHED")
                check_run(bench, file, contents, command, "KILLED")


def check_model(bench: Bench, file: str, contents: bytes) -> None:
    (bench.folder / "tiny" / file).write_bytes(contents)
    data = ["dataset=files", "dataset.path=good.txt", "chunk_size=16"]
    ending = bench.run(["prepare", "model=distilbert", "model.path=tiny", *data])
    assert complaint(ending) is None, (file, contents, ending)
    assert ending.code == 0 or "tiny" in ending.err


@pytest.mark.parametrize("file", MODEL_FILES)
@pytest.mark.parametrize("contents", [b"", b"[1]", b"{}", b"\xff\xfe"], ids=repr)
def test_a_damaged_model_is_read_or_refused(file: str, contents: bytes, bench: Bench):
    check_model(bench, file, contents)


@pytest.mark.nightly
@pytest.mark.parametrize("file", MODEL_FILES)
@pytest.mark.parametrize("contents", ODD_BYTES, ids=lambda contents: repr(contents[:12]))
def test_every_damaged_model_is_read_or_refused(file: str, contents: bytes, bench: Bench):
    check_model(bench, file, contents)
