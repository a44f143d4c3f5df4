"""The commands of the README, sized down, with the real packages: what they print, leave behind and tell MLflow."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mlmx.commands.main import main

# MLflow 3.17 asks SQLAlchemy 2.1 for a loader that is on its way out.
DIALS = ("dataset.train_chunks=32", "dataset.eval_chunks=16", "heldout.documents=12")
# Threads that wait for each other asleep: ten times faster where the cores are shared.
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}
RECORDS = (
    ".lock",
    "inputs.json",
    "mlflow.json",
    "process.json",
)  # who makes the run, of what, and what MLflow was told
FILES = ["config.yaml", "data.json", "examples.json", "metrics.jsonl", "overrides.yaml", "packages.txt"]
FILES += ["result.json", "train.log"]
IN_A_DIRTY_CHECKOUT = {"git.diff"}
FOLDERS = ["checkpoints", "model", "plots"]
TEXT = "This is a great [MASK]."
METRICS = {
    *("train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_per_second"),
    *("perf/tokens_per_second", "perf/mfu"),
    *("eval/loss", "eval/perplexity", "eval/accuracy"),
    *("heldout/loss", "heldout/perplexity", "heldout/accuracy", "heldout/bits_per_byte"),
}
BREAKDOWN = re.compile("final/heldout_(loss|accuracy)_(unseen|rare|medium|common|first|continuation)")


@dataclass(frozen=True)
class Done:
    """A command that has ended, and the run it made."""

    outputs: Path
    folder: Path
    stdout: str = ""
    stderr: str = ""

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def json(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name).read_text())


def mlmx(*arguments: str, outputs: Path, cwd: Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """``python -m mlmx …`` as a process of its own, without a terminal."""
    environment = {**os.environ, **PATIENT, "MLMX_OUTPUTS": str(outputs)}
    command = [sys.executable, "-m", "mlmx", *arguments]
    kwargs = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True} | kwargs
    return subprocess.run(command, env=environment, cwd=cwd, timeout=500, check=False, **kwargs)


def run_folders(outputs: Path) -> list[Path]:
    return sorted(path.parent for path in (outputs / "train").glob("**/result.json"))


def mlflow_client(outputs: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")


def evaluations(stdout: str) -> list[tuple[float, float]]:
    """``(epoch, perplexity)`` of each evaluation a training has told of."""
    found = re.findall(r"^epoch (\S+)  step \d+  .*?eval/perplexity ([\d,.e+]+)", stdout, re.MULTILINE)
    return [(float(epoch), float(value.replace(",", ""))) for epoch, value in found]


def fills(stdout: str, moment: str) -> list[tuple[str, float]]:
    """The tokens and percentages said for the example ``before`` or ``after`` training."""
    line = re.search(rf"^{moment} training +{re.escape(TEXT)}  →  (.*)$", stdout, re.MULTILINE)
    assert line, stdout
    return [(token, float(share)) for token, share in re.findall(r"(\S+) ([\d.]+)%", line[1])]


# ---------------------------------------------------------------- python -m mlmx train experiment=demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The demo with few chunks, run where no file of the checkout is."""
    outputs, cwd = tmp_path_factory.mktemp("demo") / "outputs", tmp_path_factory.mktemp("empty")
    done = mlmx("train", "experiment=demo", *DIALS, outputs=outputs, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert list(cwd.iterdir()) == []
    (folder,) = run_folders(outputs)
    return Done(outputs, folder, done.stdout, done.stderr)


def test_demo_says_what_it_does(demo: Done) -> None:
    said = demo.stdout
    assert not re.search(r"[\x1b\r\b]", said + demo.stderr), "escape codes without a terminal"
    # MLflow announces a new database; nothing else belongs on stderr.
    assert [line for line in demo.stderr.splitlines() if "mlflow.store.db" not in line] == []
    assert "chunk 128 · mask 0.15 · lr 0.0005 · minilm · imdb_packaged" in said
    assert "32 to train on, 16 to evaluate on" in said
    masked = re.search(r"^masked +(.*)$", said, re.MULTILINE)
    assert masked
    assert masked[1].count("[MASK]") >= 3
    assert re.search(r"^targets +\S+ \S+", said, re.MULTILINE)
    assert [epoch for epoch, _ in evaluations(said)] == [0, 1, 2]
    for moment in ("before", "after"):
        assert len(fills(said, moment)) == 5
    assert re.search(rf"^folder +{re.escape(str(demo.folder))}$", said, re.MULTILINE)
    assert re.search(r"^compare +python -m mlmx ui$", said, re.MULTILINE)


def test_demo_learns(demo: Done) -> None:
    before, first, second = [perplexity for _, perplexity in evaluations(demo.stdout)]
    assert 20_000 < before < 120_000  # the head guesses: near the 30,522 tokens of the vocabulary, or worse
    assert second < first < before / 10
    assert demo.json("result.json")["metrics"]["eval/perplexity"] == pytest.approx(second, rel=1e-4)


def test_demo_folder(demo: Done) -> None:
    names = sorted({path.name for path in demo.folder.iterdir()} - IN_A_DIRTY_CHECKOUT)
    assert names == sorted([*FILES, *RECORDS, "heldout.npz", *FOLDERS])
    assert {path.name for path in (demo.folder / "plots").iterdir()} == {"loss.png", "perplexity.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (demo.folder / "plots").iterdir())
    model = {path.name for path in (demo.folder / "model").iterdir()}
    assert model == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert len(list((demo.folder / "checkpoints").iterdir())) == 2
    assert DIALS[0] in (demo.folder / "overrides.yaml").read_text()
    assert "train_chunks: 32" in (demo.folder / "config.yaml").read_text()
    log = (demo.folder / "train.log").read_text()
    assert log.count("eval/perplexity") == 3
    assert fills(demo.stdout, "after")[0][0] in log
    outside = {path.name for path in demo.outputs.iterdir()} - {".mlflow.lock"}
    assert outside == {"train", "mlflow.db", "mlartifacts", "cache"}


def test_metrics_jsonl(demo: Done) -> None:
    rows = demo.rows
    for row in rows:
        assert type(row["step"]) is int
        assert isinstance(row["epoch"], (int, float))
        assert datetime.fromisoformat(row["time"]).tzinfo is not None
        numbers = {key: value for key, value in row.items() if key not in ("step", "epoch", "time")}
        assert numbers
        assert all(type(value) is float and math.isfinite(value) for value in numbers.values())
        assert {name for name in numbers if not BREAKDOWN.fullmatch(name)} <= METRICS
    assert {key for row in rows for key in row} >= METRICS
    assert [(row["step"], row["epoch"]) for row in rows if "eval/loss" in row] == [(0, 0), (4, 1), (8, 2)]
    assert [(row["step"], row["epoch"]) for row in rows if "train/loss" in row] == [(4, 1), (8, 2)]
    for row in rows:
        if "eval/loss" in row:
            assert row["eval/perplexity"] == pytest.approx(math.exp(row["eval/loss"]))


def test_result_json(demo: Done) -> None:
    result = demo.json("result.json")
    told = {"status", "resumable", "pruned", "run_id", "run_name", "command", "protocol", "metrics", "seconds"}
    assert set(result) == told
    assert result["status"] == "FINISHED"
    assert re.fullmatch("[0-9a-f]{32}", result["run_id"])
    assert result["run_name"] == "chunk 128 · mask 0.15 · lr 0.0005 · minilm · imdb_packaged"
    assert result["command"] == f"python -m mlmx train experiment=demo {' '.join(DIALS)}"
    assert re.fullmatch("heldout-[0-9a-f]{12}", result["protocol"])
    last = {key: value for row in demo.rows for key, value in row.items() if "/" in key}
    assert result["metrics"] == last
    assert {key for key in last if not BREAKDOWN.fullmatch(key)} == METRICS
    assert set(result["seconds"]) == {"data", "model", "train", "total"}
    assert all(value >= 0 for value in result["seconds"].values())


def test_data_json(demo: Done) -> None:
    report = demo.json("data.json")
    assert set(report) == {"corpus", "train", "eval", "heldout"}
    assert report.pop("heldout")["source"] == "heldout.dataset=rotten_tomatoes_packaged"
    assert report["corpus"]["documents"] == 25_000
    assert report["train"]["chunks"] == 32
    assert report["eval"]["chunks"] == 16
    for split in report.values():
        assert re.fullmatch("[0-9a-f]{64}", split["sha256"])
        assert split["source"] == "imdb_packaged"


def test_mlflow_run(demo: Done) -> None:
    result, client = demo.json("result.json"), mlflow_client(demo.outputs)
    experiment = client.get_experiment_by_name("mlmx")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == result["run_id"]
    assert run.info.run_name == result["run_name"]
    assert run.info.status == "FINISHED"

    # point by point what metrics.jsonl says; MLflow gets the epoch of each point as well
    local: dict[str, list[tuple[int, float]]] = {}
    for row in demo.rows:
        for key in row.keys() - {"step", "time"}:
            local.setdefault(key, []).append((row["step"], row[key]))
    assert {key for key in run.data.metrics if not BREAKDOWN.fullmatch(key)} == METRICS | {"epoch"}
    for name, points in local.items():
        history = sorted({(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)})
        assert history == sorted(set(points)), name

    assert 20 <= len(run.data.params) <= 30
    expected = {"chunk_size": "128", "lr": "0.0005", "mlm_probability": "0.15", "batch_size": "8", "seed": "42"}
    assert expected.items() <= run.data.params.items()
    assert {"model": "minilm", "dataset": "imdb_packaged", "train_chunks": "32"}.items() <= run.data.params.items()

    tags, report = run.data.tags, demo.json("data.json")
    assert tags["mlmx.command"] == result["command"]
    assert tags["mlmx.protocol"] == result["protocol"]
    assert tags["mlmx.data_sha256"] == report["corpus"]["sha256"]
    assert tags["mlmx.folder"] == str(demo.folder)
    assert tags["mlmx.experiment"] == "demo"
    assert {"mlmx.host", "mlmx.hardware", "mlmx.packages", "mlflow.note.content"} <= set(tags)

    inputs = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
    assert set(inputs) == {"training", "validation", "testing"}
    for context, split in (("training", "train"), ("validation", "eval"), ("testing", "heldout")):
        assert inputs[context].digest == report[split]["sha256"][:36]
        assert json.loads(inputs[context].profile)["chunks"] == report[split]["chunks"]


def test_mlflow_artifacts(demo: Done) -> None:
    client, run_id = mlflow_client(demo.outputs), demo.json("result.json")["run_id"]

    def listed(folder: str | None = None) -> set[str]:
        return {artifact.path.rpartition("/")[2] for artifact in client.list_artifacts(run_id, folder)}

    assert listed() - IN_A_DIRTY_CHECKOUT == {*FILES, "heldout.npz", "plots"}
    assert listed("plots") == {"loss.png", "perplexity.png"}
    store = Path(client.get_run(run_id).info.artifact_uri.removeprefix("file://"))
    assert store.is_relative_to(demo.outputs / "mlartifacts")
    experiment = client.get_run(run_id).info.experiment_id
    models = {one.name: one for one in client.search_logged_models([experiment], f"source_run_id = '{run_id}'")}
    assert set(models) == {"epoch-1", "epoch-2", "model"}
    for epoch, step in ((1, 4), (2, 8)):
        kept = Path(models[f"epoch-{epoch}"].artifact_location.removeprefix("file://")) / "model"
        own = demo.folder / f"checkpoints/checkpoint-{step}"
        # no optimizer, scheduler, random state or pickle
        assert {path.name for path in kept.iterdir()} == {"config.json", "model.safetensors"}
        linked = [(folder / "model.safetensors").stat().st_ino for folder in (kept, own)]
        assert linked[0] == linked[1], "copied, not linked"
    for name in FILES:  # what MLflow shows is the final state
        assert (store / name).read_text() == (demo.folder / name).read_text(), name


WITHOUT_MLMX = """
import json, sys
import mlflow.transformers
from transformers import pipeline
store, folder, logged = sys.argv[1:]
mlflow.set_tracking_uri(store)
for fill_mask in (pipeline("fill-mask", folder, device="cpu"), mlflow.transformers.load_model(logged)):
    found = fill_mask("This is a great [MASK].")
    print(json.dumps([[fill["token_str"], 100 * fill["score"]] for fill in found]))
assert "mlmx" not in sys.modules
"""


def test_the_model_needs_no_mlmx(demo: Done, tmp_path: Path) -> None:
    logged = f"runs:/{demo.json('result.json')['run_id']}/epoch-2"
    command = [sys.executable, "-c", WITHOUT_MLMX, f"sqlite:///{demo.outputs / 'mlflow.db'}"]
    command += [str(demo.folder / "model"), logged]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    final, from_mlflow = map(json.loads, done.stdout.splitlines())
    assert final == from_mlflow  # the last epoch's checkpoint is the final model
    said = fills(demo.stdout, "after")
    assert [token for token, _ in final] == [token for token, _ in said]
    assert [share for _, share in final] == pytest.approx([share for _, share in said], abs=0.11)


# ------------------------------------------------------------------------------ on files, with a tiny model


def request(tiny: Path, corpus: Path, *more: str) -> list[str]:
    """A training of a second or two, in mixed precision."""
    common = [f"model.path={tiny}", "dataset=files", f"dataset.path={corpus}", "chunk_size=64", "lr=1e-3"]
    return ["train", *common, "epochs=2", "precision=bf16", *DIALS, *more]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny: Path, corpus: Path) -> Done:
    """A finished run of the tiny model, made in this process."""
    outputs, stdout = tmp_path_factory.mktemp("small") / "outputs", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setenv("MLMX_OUTPUTS", str(outputs))
        assert main(request(tiny, corpus)) == 0
    (folder,) = run_folders(outputs)
    print(stdout.getvalue())
    return Done(outputs, folder, stdout.getvalue())


@pytest.fixture
def at_small(small: Done, monkeypatch: pytest.MonkeyPatch) -> Done:
    """The same run, with commands looking into its outputs folder."""
    monkeypatch.setenv("MLMX_OUTPUTS", str(small.outputs))
    return small


def shares(lines: list[str]) -> list[float]:
    return [float(re.match(r" +(?:mask \d+ +)?([\d.]+)%", line)[1]) for line in lines]  # type: ignore[index]


def test_predict_finds_the_run(at_small: Done, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for run in ("last", str(at_small.folder), at_small.json("result.json")["run_id"]):
        assert main(["predict", f"run={run}", f"text={TEXT}"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2]
    text, *lines = answers[0].splitlines()
    assert text == TEXT
    assert len(lines) == 5
    assert shares(lines) == sorted(shares(lines), reverse=True)


def test_predict_masks_and_texts(at_small: Done, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["The [MASK] was [MASK], wasn't it?", "It's 'a' [MASK] {film}, $5 = ok"]
    assert main(["predict", *(f"text={text}" for text in texts), "top_k=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == texts
    assert [line.split()[:2] for line in lines[1:5]] == [["mask", "1"], ["mask", "1"], ["mask", "2"], ["mask", "2"]]
    assert len(lines) == 1 + 4 + 1 + 2


def test_predict_reads_lines(
    at_small: Done, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TEXT}\n\n  I [MASK] it.\n"))
    assert main(["predict", "top_k=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [TEXT, "I [MASK] it."]
    assert len(lines) == 4


def test_evaluate_repeats_the_run(
    at_small: Done, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cwd = tmp_path / "elsewhere"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    before, rows = at_small.json("result.json"), at_small.rows
    assert main(["evaluate", "batch_size=8"]) == 0
    said = capsys.readouterr().out
    for section in ("eval", "heldout"):
        assert f"{section}/loss {before['metrics'][f'{section}/loss']:,.6g}  {section}/perplexity" in said
    assert f"protocol {before['protocol']}" in said
    result = at_small.json("result.json")
    scores = {name: value for name, value in before["metrics"].items() if name.startswith(("eval/", "heldout/"))}
    added = {f"evaluate/{name}": value for name, value in scores.items()}
    assert result == before | {"metrics": before["metrics"] | added}  # equal to the bit

    assert at_small.rows[:-1] == rows
    assert at_small.rows[-1]["step"] == rows[-1]["step"]
    client = mlflow_client(at_small.outputs)
    run = client.get_run(before["run_id"])
    assert added.items() <= run.data.metrics.items()
    assert run.info.status == "FINISHED"
    (point,) = client.get_metric_history(before["run_id"], "evaluate/heldout/loss")
    assert point.step == rows[-1]["step"]
    assert len(client.search_runs([run.info.experiment_id])) == 1

    assert main(["evaluate", "run=last", "batch_size=5"]) == 0  # the batch size changes no number
    assert at_small.json("result.json")["metrics"]["evaluate/heldout/loss"] == pytest.approx(
        scores["heldout/loss"], rel=1e-6
    )
    assert list(cwd.iterdir()) == []


def test_evaluate_a_model_folder(tiny: Path, corpus: Path, outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["evaluate", f"run={tiny}", "chunk_size=64", "dataset=files", f"dataset.path={corpus}"]
    assert main(asked) == 0
    loss = re.search(r"heldout/loss ([\d.]+)  heldout/perplexity [\d,.]+  heldout/accuracy", capsys.readouterr().out)
    assert loss
    assert float(loss[1]) == pytest.approx(math.log(30_522), abs=0.2)  # random weights guess
    assert not outputs.exists()


@pytest.mark.parametrize(
    ("ending", "code", "status", "line"),
    [
        (
            RuntimeError("the disk\nis gone"),
            1,
            "FAILED",
            "mlmx: RuntimeError: the disk is gone (MLMX_DEBUG=1 shows where)",
        ),
        (KeyboardInterrupt(), 130, "KILLED", "mlmx: interrupted"),
    ],
    ids=["error", "interrupt"],
)
def test_a_training_that_breaks_off(
    ending: BaseException,
    code: int,
    status: str,
    line: str,
    tiny: Path,
    corpus: Path,
    store: Path,
    outputs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlmx.training.trainer import Trainer

    compute_loss = Trainer.compute_loss

    def breaks(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:  # in the second epoch
            raise ending
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", breaks)
    assert main(request(tiny, corpus)) == code
    assert capsys.readouterr().err == f"{line}\n"
    (folder,) = run_folders(outputs)
    result = Done(outputs, folder).json("result.json")
    assert result["status"] == status
    assert "eval/loss" in result["metrics"]  # what was reached is kept
    run = mlflow_client(outputs).get_run(result["run_id"])
    assert run.info.status == status
    assert run.info.end_time is not None

    assert main(["predict", f"run={folder}", f"text={TEXT}"]) == 2
    assert f"unfinished (status {status})" in capsys.readouterr().err
    assert main(["predict", "run=last", f"text={TEXT}"]) == 2
    assert "no finished run" in capsys.readouterr().err


def test_multirun_numbers_its_jobs(
    tiny: Path, corpus: Path, store: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [argument for argument in request(tiny, corpus, "epochs=1") if argument != "chunk_size=64"]
    assert main([*asked, "-m", "chunk_size=64,128"]) == 0
    first, second = run_folders(outputs)
    assert first.parent == second.parent
    assert first.parent.parent == outputs / "train"
    assert [first.name, second.name] == ["0", "1"]
    results = [Done(outputs, folder).json("result.json") for folder in (first, second)]
    assert [result["status"] for result in results] == ["FINISHED", "FINISHED"]
    assert ["chunk 64" in results[0]["run_name"], "chunk 128" in results[1]["run_name"]] == [True, True]
    client = mlflow_client(outputs)
    (experiment,) = client.search_experiments(filter_string="name = 'mlmx'")
    runs = client.search_runs([experiment.experiment_id])
    children = {run.info.run_id for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert children == {result["run_id"] for result in results}
    assert len(runs) == 3, "and the sweep"
    assert "Error" not in capsys.readouterr().err


# As in a shell: the terminal is the process's own, and Ctrl-C on it is not ignored.
AT_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_a_terminal_gets_a_bar_and_ctrl_c_ends_it(tiny: Path, corpus: Path, outputs: Path, tmp_path: Path) -> None:
    asked = [*request(tiny, corpus), "dataset.train_chunks=240", "epochs=50", "tracking=none"]
    environment = {**os.environ, **PATIENT, "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", AT_TERMINAL, "-m", "mlmx", *asked],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment,
        cwd=tmp_path,
        start_new_session=True,
    )
    os.close(terminal)
    bar = re.compile(r"training [━╸╺ ]+ \d+/1500 [\d,]+ tok/s · loss \d+\.\d+ · [\d:-]+")
    try:
        seen = _read_until(master, lambda text: bool(bar.search(_plain(text))) and "checkpoint-30" in text)
        os.write(master, b"\x03")
        seen += _read_until(master, None)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(master)
    shown = _plain(seen)
    assert bar.search(shown), shown[-2000:]
    assert "mlmx: interrupted" in shown
    assert seen.count("\x1b[?25h") >= 1, "the cursor is not given back"
    # lines pass above the bar, whole
    assert re.search(r"^epoch 0  step 0  eval/loss", shown, re.MULTILINE)
    assert re.search(r"^epoch 1  step 30  eval/loss", shown, re.MULTILINE)
    (folder,) = run_folders(outputs)
    assert Done(outputs, folder).json("result.json")["status"] == "KILLED"


def _read_until(master: int, enough: Any, patience_seconds: float = 240) -> str:
    """What the terminal shows until ``enough(text)``, or until its program has ended."""
    text, end = b"", time.monotonic() + patience_seconds
    while time.monotonic() < end:
        if not select.select([master], [], [], 1)[0]:
            continue
        try:
            piece = os.read(master, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            piece = b""
        text += piece
        if not piece or (enough and enough(text.decode(errors="replace"))):
            break
    return text.decode(errors="replace")


def _plain(text: str) -> str:
    """Terminal output as lines: a piece that returns to the line's start becomes a line of its own."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")


# ----------------------------------------------------------------------------------------------- in full


@pytest.mark.slow
def test_demo_in_full(tmp_path: Path) -> None:
    done = mlmx("train", "experiment=demo", outputs=tmp_path / "outputs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    perplexities = [perplexity for _, perplexity in evaluations(done.stdout)]
    assert perplexities == sorted(perplexities, reverse=True)
    assert perplexities[0] > 20_000
    assert perplexities[-1] < 1_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["experiment=demo", "chunk_size=256", "lr=5e-5"],
        ["-m", "experiment=demo", "chunk_size=64,128"],
    ],
    ids=" ".join,
)
def test_readme_commands(arguments: list[str], tmp_path: Path) -> None:
    done = mlmx("train", *arguments, *DIALS, outputs=tmp_path / "outputs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for folder in run_folders(tmp_path / "outputs"):
        assert Done(tmp_path, folder).json("result.json")["status"] == "FINISHED"
        assert (folder / "model/model.safetensors").is_file()
    assert len(run_folders(tmp_path / "outputs")) == (2 if "-m" in arguments else 1)
