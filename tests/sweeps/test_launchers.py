"""Jobs of a sweep in processes of their own, side by side: one record, and signals that lose nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlmx.sweeps.sweep import all_sweeps
from tests.support.processes import PATIENCE_SECONDS, reached
from tests.support.sweeps import command, told

JOBLIB = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
pytestmark = pytest.mark.usefixtures("store")


# As `python -m mlmx`, but that SIGINT, which is ignored where the tests run behind a &, is heeded.
RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from mlmx.commands.main import main
sys.exit(main(sys.argv[1:]))
"""


def begun(given: list[str], outputs: Path, said: Path) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own: joblib ends its workers where Python ends, which a forked process
    does not come to."""
    environment = os.environ | {"MLMX_OUTPUTS": str(outputs)}
    with said.open("a") as file:
        return subprocess.Popen(
            [sys.executable, "-c", RUN, *given], env=environment, stdout=file, stderr=file, start_new_session=True
        )


@pytest.mark.long
@pytest.mark.parametrize(
    ("number", "to_all", "code"),
    [
        pytest.param(signal.SIGTERM, False, 143, marks=pytest.mark.nightly, id="SIGTERM to the command"),
        pytest.param(signal.SIGINT, True, 130, id="Ctrl-C in a terminal, to all of its processes"),
    ],
)
def test_jobs_side_by_side_are_one_sweep_and_a_signal_lets_every_one_save(
    number: signal.Signals, to_all: bool, code: int, tiny: Path, corpus: Path, outputs: Path, tmp_path: Path
):
    given = command(tiny, corpus, *JOBLIB, "lr=1e-4,1e-3,1e-2", "epochs=12", "save_minutes=null")
    said = tmp_path / "said.txt"
    process = begun(given, outputs, said)
    folders: list[Path] = []
    try:
        while len(folders) < 2:
            assert process.poll() is None, said.read_text()
            time.sleep(0.01)
            paths = (outputs / "train").glob("*/*/metrics.jsonl")
            folders = [path.parent for path in paths if reached(path.parent, 4)]
        if to_all:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert process.wait(PATIENCE_SECONDS) == code, said.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    [sweep] = all_sweeps()
    assert sweep.about().status == "KILLED"
    ran = [run for run in sweep.runs() if run.folder in folders]
    assert [(run.status, run.result().resumable) for run in ran] == [("KILLED", True)] * 2
    steps = {run.folder: run.metrics()[-1]["step"] for run in ran}
    for run in ran:
        saved = {int(path.name.rpartition("-")[2]) for path in run.checkpoints.glob("checkpoint-*")}
        assert max(saved) - steps[run.folder] in (0, 1, 2), "the step that the signal ended; every second one is logged"
    assert len(list(sweep.runs())) == 2, "the third has not begun"
    assert "Traceback" not in (tmp_path / "said.txt").read_text()
    parent, children = told(outputs)
    assert {run.info.status for run in (parent, *children)} == {"KILLED"}

    # Not in this process: joblib keeps its workers, and with them the environment of an earlier test.
    again = begun(given, outputs, said)
    assert again.wait(PATIENCE_SECONDS) == 0, f"side by side again: {said.read_text()}"
    assert [run.status for run in sweep.runs()] == ["FINISHED"] * 3
    jobs = {run.read_json("process.json")["pid"] for run in sweep.runs()}
    assert len(jobs - {os.getpid()}) >= 2, "each in a process of the launcher's"
    for run in sweep.runs():
        scored = [row["step"] for row in run.metrics() if "heldout/loss" in row]
        assert scored == sorted({*scored}), "no point twice"
        assert scored[-1] == 24
        assert [row["step"] for row in run.metrics() if "train/loss" in row] == [*range(2, 25, 2)], "and none missing"
    parent, children = told(outputs)
    assert [run.info.status for run in (parent, *children)] == ["FINISHED"] * 4
    assert "FINISHED" in (sweep.folder / "table.md").read_text()
