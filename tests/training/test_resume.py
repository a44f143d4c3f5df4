"""A resumed run is the run that was never interrupted: to the bit, in the same folder, with no point twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from mlmx.commands.main import main
from mlmx.evaluation.measure import Measure
from mlmx.runs import checkpoints
from mlmx.runs.checkpoints import is_interim
from mlmx.runs.run import Run
from tests.support.processes import distributed, ended, reached, started, wait_until
from tests.support.trainings import STEPS, WEIGHTS, command, history, killed_at, same


@pytest.fixture(scope="session")
def dropping(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """The tiny model with dropout: what is drawn in a step must not depend on the steps before."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("dropping") / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["dropout"] == config["attention_dropout"] == 0
    (folder / "config.json").write_text(json.dumps(config | {"dropout": 0.2, "attention_dropout": 0.2}))
    return folder


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, dropping: Path, corpus: Path):
    """Makes uninterrupted runs, each once."""
    made: dict[tuple[int, int], Path] = {}

    def make(accumulation: int = 1, workers: int = 0) -> Path:
        key = (accumulation, workers)
        if key not in made:
            outputs = tmp_path_factory.mktemp("whole") / "outputs"
            before = os.environ["MLMX_OUTPUTS"]
            os.environ["MLMX_OUTPUTS"] = str(outputs)
            folder = outputs / "train" / "whole"
            assert main(command(dropping, corpus, folder, accumulation=accumulation, workers=workers)) == 0
            os.environ["MLMX_OUTPUTS"] = before
            made[key] = folder
        return made[key]

    return make


def check_resumed(folder: Path, wanted: Path) -> None:
    assert main(["train", f"resume={folder}"]) == 0
    assert same(folder / WEIGHTS, wanted / WEIGHTS)
    for name in ("model.safetensors", "optimizer.safetensors"):
        last = f"checkpoints/checkpoint-{STEPS}/{name}"
        assert same(folder / last, wanted / last)
    assert history(folder) == history(wanted)
    assert Run(folder).status == "FINISHED"


SAMPLE = [(1, 1, 0), (7, 1, 0), (10, 1, 0), (20, 1, 0), (13, 4, 2)]
MATRIX = [
    (step, accumulation, workers) for step in range(1, STEPS + 1) for accumulation in (1, 4) for workers in (0, 2)
]


@pytest.mark.parametrize(("step", "accumulation", "workers"), SAMPLE)
def test_resuming_at_a_step_gives_the_uninterrupted_run(step, accumulation, workers, whole, outputs):
    wanted = whole(accumulation, workers)
    check_resumed(killed_at(step, wanted, outputs / "train" / "killed"), wanted)


@pytest.mark.nightly
@pytest.mark.parametrize(("step", "accumulation", "workers"), MATRIX)
def test_resuming_at_every_step_gives_the_uninterrupted_run(step, accumulation, workers, whole, outputs):
    wanted = whole(accumulation, workers)
    check_resumed(killed_at(step, wanted, outputs / "train" / "killed"), wanted)


def kill(argv: list[str], outputs: Path, folder: Path, when) -> None:
    """SIGKILL for a process that runs this command, once ``when`` holds."""
    process = started(argv, outputs, outputs.parent / "said.txt")
    wait_until(when, process)
    os.kill(process.pid, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL


@pytest.mark.long
def test_a_killed_process_loses_nothing(whole, dropping, corpus, outputs):
    wanted, folder = whole(), outputs / "train" / "killed"
    kill(command(dropping, corpus, folder), outputs, folder, lambda: reached(folder, 3))
    kill(["train", "resume=last"], outputs, folder, lambda: reached(folder, 12))
    check_resumed(folder, wanted)


def is_saving(folder: Path) -> bool:
    return any(folder.glob("checkpoints/.checkpoint-*.tmp"))


@pytest.mark.long
def test_a_process_killed_while_saving_loses_nothing(whole, dropping, corpus, outputs):
    wanted, folder = whole(), outputs / "train" / "killed"
    kill(command(dropping, corpus, folder), outputs, folder, lambda: reached(folder, 6) and is_saving(folder))
    check_resumed(folder, wanted)
    assert not is_saving(folder)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_200_random_kills_lose_nothing(whole, dropping, corpus, outputs):
    draw, wanted, killed = random.Random(7), whole(), 0
    while killed < 200:
        folder = outputs / "train" / f"run-{killed}"
        argv = command(dropping, corpus, folder)
        for step in sorted(draw.sample(range(1, STEPS), draw.randint(1, 3))):
            saving = draw.random() < 0.5
            kill(argv, outputs, folder, lambda: reached(folder, step) and (not saving or is_saving(folder)))  # noqa: B023
            argv, killed = ["train", f"resume={folder}"], killed + 1
        check_resumed(folder, wanted)
        shutil.rmtree(folder)


def test_a_run_killed_before_its_first_checkpoint_begins_again_in_its_folder(whole, outputs):
    wanted = whole()
    folder = killed_at(0, wanted, outputs / "train" / "killed")
    check_resumed(folder, wanted)


def test_the_loss_logged_at_the_end_of_an_epoch_is_of_the_whole_epoch(dropping, corpus, outputs):
    """Though the epoch was interrupted: the sums behind the next point are part of a checkpoint."""
    epochs = ["trainer.logging_strategy=epoch", "trainer.save_steps=3"]
    wanted, folder = outputs / "train" / "whole", outputs / "train" / "killed"
    assert main(command(dropping, corpus, wanted, *epochs)) == 0
    killed_at_checkpoint(12, wanted, folder)
    assert main(["train", f"resume={folder}"]) == 0
    assert history(folder) == history(wanted)
    assert same(folder / WEIGHTS, wanted / WEIGHTS)


def killed_at_checkpoint(step: int, whole: Path, folder: Path) -> None:
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("checkpoint-*", "model", "plots"))
    (folder / "checkpoints").mkdir(exist_ok=True)
    shutil.copytree(whole / f"checkpoints/checkpoint-{step}", folder / f"checkpoints/checkpoint-{step}")
    lines = (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= step]
    (folder / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")
    Run(folder).write_json("result.json", Run(folder).read_json("result.json") | {"status": "KILLED"})


def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_taken(whole, outputs, capsys):
    wanted = whole()
    folder = killed_at(9, wanted, outputs / "train" / "killed")
    path = folder / "checkpoints/checkpoint-9/optimizer.safetensors"
    bits = bytearray(path.read_bytes())
    bits[len(bits) // 2] ^= 1
    path.unlink()  # a link to the file of the whole run
    path.write_bytes(bits)
    check_resumed(folder, wanted)
    assert (
        "checkpoint-9 is damaged (optimizer.safetensors is not what was written); moved to" in capsys.readouterr().out
    )
    assert (folder / "checkpoints/damaged-checkpoint-9").is_dir()


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_a_signal_ends_a_step_and_saves(number, code, whole, dropping, corpus, outputs):
    wanted, folder, said = whole(), outputs / "train" / "signalled", outputs.parent / "said.txt"
    never = ["trainer.save_strategy=no", "trainer.logging_strategy=steps"]
    process = started([*command(dropping, corpus, folder, *never)], outputs, said)
    wait_until(lambda: reached(folder, 4), process)
    os.kill(process.pid, number)
    assert ended(process) == code
    [saved] = checkpoints.all_of(folder / "checkpoints")
    checkpoints.verify(saved)
    assert is_interim(saved)
    last = said.read_text(encoding="utf-8").splitlines()[-1]
    assert last == f"mlmx: interrupted by {signal.Signals(number).name}; to go on: python -m mlmx train resume={folder}"
    assert Run(folder).status == "KILLED"
    assert main(["train", "resume=last"]) == 0
    assert same(folder / WEIGHTS, wanted / WEIGHTS)
    assert history(folder) == history(wanted)


@pytest.mark.long
def test_a_signal_to_the_whole_process_group_saves_too(whole, dropping, corpus, outputs):
    """As a terminal's Ctrl-C and a scheduler's SIGTERM do, which reach the loader's workers as well."""
    wanted, folder = whole(workers=2), outputs / "train" / "signalled"
    process = started(command(dropping, corpus, folder, workers=2), outputs, outputs.parent / "said.txt")
    wait_until(lambda: reached(folder, 2), process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert workers
    for pid in [*map(int, workers), process.pid]:
        os.kill(pid, signal.SIGTERM)
    assert ended(process) == 143
    check_resumed(folder, wanted)


@pytest.mark.long
def test_a_second_signal_ends_at_once_and_harms_nothing(whole, dropping, corpus, outputs):
    wanted, folder = whole(), outputs / "train" / "signalled"
    process = started(command(dropping, corpus, folder), outputs, outputs.parent / "said.txt")
    wait_until(lambda: reached(folder, 4) and is_saving(folder), process)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process) == 143
    check_resumed(folder, wanted)


@pytest.mark.long
def test_a_signal_while_scoring_leaves_the_scores_to_the_resumed_run(whole, outputs, monkeypatch):
    wanted, score = whole(), Measure.__call__
    folder = killed_at(8, wanted, outputs / "train" / "killed")

    def signalled(measure, model):
        os.kill(os.getpid(), signal.SIGTERM)
        return score(measure, model)

    with monkeypatch.context() as patched:
        patched.setattr(Measure, "__call__", signalled)
        assert main(["train", f"resume={folder}"]) == 143
    assert [row["step"] for row in Run(folder).metrics()][-1] == 10
    assert not any("eval/loss" in row for row in Run(folder).metrics() if row["step"] == 10)
    check_resumed(folder, wanted)


def test_an_interim_checkpoint_is_saved_by_the_clock_and_replaced(dropping, corpus, outputs):
    folder = outputs / "train" / "clocked"
    often = ["trainer.save_strategy=epoch", "save_minutes=1e-9"]
    assert main(command(dropping, corpus, folder, *often)) == 0
    assert [checkpoints.step_of(path) for path in checkpoints.all_of(folder / "checkpoints")] == [20, 10]


@pytest.mark.slow
def test_a_run_of_two_processes_is_resumed_by_two(dropping, corpus, outputs):
    """As ``torchrun`` starts them: only the first knows the folder, both go on from its checkpoint."""

    def run(argv: list[str], when=None) -> list[int | None]:
        ranks = [environment | {"OMP_NUM_THREADS": "1"} for environment in distributed()]
        both = [started(argv, outputs, outputs.parent / f"said{rank['RANK']}.txt", rank) for rank in ranks]
        if when is not None:
            wait_until(when, both[0])
            os.kill(both[1].pid, signal.SIGTERM)  # a signal to one ends the step of all
        return [ended(process) for process in both]

    wanted, folder = outputs / "train" / "whole", outputs / "train" / "signalled"
    assert run(command(dropping, corpus, wanted, "batch_size=2", "trainer.save_steps=5")) == [0, 0]
    argv = command(dropping, corpus, folder, "batch_size=2", "trainer.save_steps=5")
    assert run(argv, lambda: reached(folder, 7)) == [143, 143]
    assert run(["train", f"resume={folder}"]) == [0, 0]
    assert same(folder / WEIGHTS, wanted / WEIGHTS)
    assert history(folder) == history(wanted)


# ------------------------------------------------------------------------------------------ what may differ


@pytest.fixture
def killed(whole, outputs) -> Path:
    folder = killed_at(4, whole(), outputs / "train" / "killed")
    Run(folder).write_json("result.json", Run(folder).read_json("result.json") | {"status": "KILLED"})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_changed_dial_is_refused_with_its_values_and_leaves_the_run_as_it_was(killed, capsys):
    before = contents(killed)
    assert main(["train", f"resume={killed}", "lr=2e-3", "trainer.max_grad_norm=2"]) == 2
    said = capsys.readouterr().err
    assert "lr was 0.001, is 0.002" in said
    assert "trainer.max_grad_norm was None, is 2" in said
    assert "resume.allow=[lr,trainer.max_grad_norm]" in said
    assert contents(killed) == before


def test_changed_data_and_weights_are_refused(killed, corpus, dropping, capsys):
    lines = corpus.read_text(encoding="utf-8").splitlines(keepends=True)
    weights = (dropping / "model.safetensors").read_bytes()
    try:
        corpus.write_text("".join(lines[1:]), encoding="utf-8")
        assert main(["train", f"resume={killed}"]) == 2
        assert "data.train was" in capsys.readouterr().err
        corpus.write_text("".join(lines), encoding="utf-8")
        (dropping / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\0")
        assert main(["train", f"resume={killed}"]) == 2
        assert "model.weights was" in capsys.readouterr().err
    finally:
        corpus.write_text("".join(lines), encoding="utf-8")
        (dropping / "model.safetensors").write_bytes(weights)


def test_checkpoints_of_another_form_are_refused_and_nothing_is_changed(killed, capsys):
    path = max(killed.glob("checkpoints/checkpoint-*/state.json"))
    kept = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()  # a link to the file of the whole run
    path.write_text(json.dumps(kept | {"format": 1}), encoding="utf-8")
    before = contents(killed)
    assert main(["train", f"resume={killed}"]) == 2
    assert f"resume={killed}: {path.parent.name} is of format 1, written by another version" in capsys.readouterr().err
    assert contents(killed) == before


def test_an_allowed_change_takes_effect_and_is_on_record(killed):
    assert main(["train", f"resume={killed}", "lr=2e-3", "epochs=3", "resume.allow=[lr,epochs]"]) == 0
    rates = {row["step"]: row["train/learning_rate"] for row in Run(killed).metrics() if "train/learning_rate" in row}
    assert max(rates) == 30
    assert rates[4] == pytest.approx(1e-3 * (1 - 3 / 20))
    assert rates[5] == pytest.approx(2e-3 * (1 - 4 / 30))
    [line] = (killed / "drift.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["changes"] == {"lr": {"was": 0.001, "is": 0.002}, "epochs": {"was": 2, "is": 3}}
    assert Run(killed).config().lr == 2e-3


def test_what_cannot_change_the_result_may_differ(killed):
    assert main(["train", f"resume={killed}", "trainer.dataloader_num_workers=1", "note=moved"]) == 0
    assert not (killed / "drift.jsonl").exists()


def test_auto_goes_on_with_the_run_of_the_same_command_and_begins_one_where_there_is_none(
    killed, dropping, corpus, outputs
):
    [folder] = (outputs / "train").iterdir()
    same_command = [o for o in command(dropping, corpus, folder) if not o.startswith("hydra.run.dir")]
    assert main([*same_command, "resume=auto"]) == 0
    assert [path.name for path in (outputs / "train").iterdir()] == ["killed"]
    assert Run(killed).status == "FINISHED"
    assert main([*same_command, "resume=auto"]) == 0  # nothing is unfinished
    assert len(list((outputs / "train").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["resume=last"], "resume=last: no unfinished run below"),
        (["resume=/nowhere"], "resume=/nowhere: no such run"),
        (["resume=last", "-m", "lr=1e-3,1e-4"], "goes on with one run"),
        (["resume.allow=[lrr]"], "resume.allow=lrr: no such dial; did you mean lr?"),
        (["resume.runn=last"], "resume.runn: unknown option; did you mean run?"),
        (["save_minutes=0"], "save_minutes=0"),
    ],
)
def test_what_cannot_be_resumed_is_refused_in_one_line(arguments, said, outputs, capsys):
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not outputs.exists()


def test_a_finished_run_is_resumed_only_to_be_changed(whole, capsys):
    folder = whole()
    assert main(["train", f"resume={folder}"]) == 2
    assert "this run has finished; to train it longer say so" in capsys.readouterr().err
