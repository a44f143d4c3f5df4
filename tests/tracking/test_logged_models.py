"""Models in MLflow: every checkpoint that is kept, loadable by one line, taking no space; and the registry."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlmx.commands.main import main
from mlmx.config.errors import RequestError
from mlmx.config.schema import TrainConfig
from mlmx.evaluation.measure import Measure
from mlmx.models.encoders import load_model, load_tokenizer, pretrained
from mlmx.models.fill import fill_masks
from mlmx.runs import identity
from mlmx.runs.run import Run
from mlmx.tracking import follower, model_files
from mlmx.tracking.mirror import update
from mlmx.tracking.store import local
from mlmx.tracking.tracker import Tracker
from tests.support.made_runs import checkpoint
from tests.support.servers import OPTIONS, free_port
from tests.support.tracked import Made, caught_up, history, logged, opened, until

pytestmark = pytest.mark.timeout(300)
SENTENCE = "This is a great [MASK]."


def command(tiny: Path, corpus: Path, folder: Path, *more: str) -> list[str]:
    """Two steps an epoch."""
    sizes = ["dataset.train_chunks=8", "dataset.eval_chunks=4", "chunk_size=16", "batch_size=4", "heldout.documents=4"]
    data = [f"model.path={tiny}", "dataset=files", f"dataset.path={corpus}", *sizes]
    return ["train", *data, "epochs=2", f"hydra.run.dir={folder}", *more]


def client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient(local().uri)


def models_of(folder: Path) -> dict[str, Any]:
    """The LoggedModels of a run by name; each name once."""
    at = client()
    run_id = Run(folder).read_json("result.json")["run_id"]
    experiment = at.get_run(run_id).info.experiment_id
    found = at.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    assert set(Counter(one.name for one in found).values()) <= {1}
    return {one.name: one for one in found}


def files_of(one: Any) -> Path:
    return Path(one.artifact_location.removeprefix("file://"))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the next scorings say these held-out losses."""

    def script(*losses: float) -> None:
        left: Iterator[float] = iter(losses)
        monkeypatch.setattr(Measure, "__call__", lambda self, model: both(next(left)))

    def both(loss: float) -> dict[str, float]:
        return {"eval/loss": 5.0, "heldout/loss": loss}

    return script


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "SEND_EVERY_SECONDS", 0.02)
    monkeypatch.setattr(follower, "RETRY_AFTER_SECONDS", (0.02,))


# --------------------------------------------------------------------------------- what a run leaves there


def test_every_checkpoint_and_the_final_model_are_there_with_step_scores_and_datasets(
    tiny: Path, corpus: Path, store: Path, outputs: Path
):
    folder = outputs / "train" / "run"
    assert main(command(tiny, corpus, folder)) == 0
    found, run = models_of(folder), client().get_run(Made(folder).run_id)
    assert set(found) == {"epoch-1", "epoch-2", "model"}
    assert {str(one.status) for one in found.values()} == {"READY"}
    steps = {output.model_id: output.step for output in run.outputs.model_outputs}
    assert {name: steps[one.model_id] for name, one in found.items()} == {"epoch-1": 2, "epoch-2": 4, "model": 4}
    datasets = {tag.value: one.dataset for one in run.inputs.dataset_inputs for tag in one.tags}
    contexts = {"eval": "validation", "heldout": "testing"}
    for name, one in found.items():
        rows = [row for row in Run(folder).metrics() if row["step"] == steps[one.model_id]]
        wanted = {key: value for row in rows for key, value in row.items() if key.partition("/")[0] in contexts}
        assert {metric.key: metric.value for metric in one.metrics} == wanted, name
        assert {"eval/loss", "heldout/loss"} <= set(wanted)
        for metric in one.metrics:
            dataset = datasets[contexts[metric.key.partition("/")[0]]]
            assert (metric.dataset_name, metric.dataset_digest) == (dataset.name, dataset.digest)
    assert_points(folder)


def stored(made: Any) -> list[tuple[str, int, int, float]]:
    """What MLflow has of a run, but for the epoch, which it has once a step."""
    return [point for point in history(local(), made) if point[0] != "epoch"]


def assert_points(folder: Path) -> None:
    """The run's history in MLflow is metrics.jsonl, no point twice, none missing."""
    assert stored(Made(folder)) == [point for point in logged(Made(folder)) if point[0] != "epoch"]


def test_models_in_a_local_store_take_no_space_of_their_own(tiny: Path, corpus: Path, store: Path, outputs: Path):
    folder = outputs / "train" / "run"
    assert main(command(tiny, corpus, folder)) == 0
    own = {"epoch-1": "checkpoints/checkpoint-2", "epoch-2": "checkpoints/checkpoint-4", "model": "model"}
    for name, one in models_of(folder).items():
        there = files_of(one)
        for path, source in (("model/model.safetensors",) * 2, ("components/tokenizer/tokenizer.json",) * 2):
            placed, saved = (there / path).stat(), (folder / own[name] / Path(source).name).stat()
            assert (placed.st_ino, placed.st_nlink) == (saved.st_ino, 2)
        copied = sum(path.stat().st_size for path in there.rglob("*") if path.is_file() and path.stat().st_nlink == 1)
        assert copied < 10_000
    weights = {path.stat().st_ino for path in outputs.rglob("model.safetensors")}
    assert len(weights) == 3, "two checkpoints and the model"
    assert not list(outputs.glob("mlartifacts/*/artifacts/**/*.safetensors")), "nor as files of the run"


@pytest.mark.filterwarnings("ignore")  # of MLflow's own, about the model's types
def test_one_line_loads_any_of_them_as_a_fill_mask_pipeline(
    tiny: Path, corpus: Path, store: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
):
    import mlflow

    folder = outputs / "train" / "run"
    assert main(command(tiny, corpus, folder, "register=tiny")) == 0
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", local().uri)
    run_id = Made(folder).run_id
    for address in (f"runs:/{run_id}/model", f"runs:/{run_id}/epoch-1", "models:/tiny@best"):
        pipeline = mlflow.transformers.load_model(address)
        assert type(pipeline).__name__ == "FillMaskPipeline"
        first, *_ = pipeline(SENTENCE)
        assert first["sequence"].startswith("this is a great ")
        served = mlflow.pyfunc.load_model(address)
        assert served.predict([SENTENCE]) == [first["token_str"]]
        assert served.predict(served.input_example) == [first["token_str"]]
        assert served.metadata.signature.inputs.input_types()[0].name == "string"
    loaded = mlflow.transformers.load_model(f"runs:/{run_id}/model").model
    from safetensors.torch import load_file

    own = load_file(folder / "model" / "model.safetensors")
    assert all((loaded.state_dict()[name] == tensor).all() for name, tensor in own.items())


@pytest.mark.filterwarnings("ignore")
def test_what_is_written_is_what_mlflow_would_write(tiny: Path, tokenizer: Any, tmp_path: Path):
    """But for the classes, which are the library's Auto classes, and for what nobody reads."""
    import mlflow.transformers
    from transformers import AutoModelForMaskedLM, pipeline

    from mlmx.tracking.model_files import descriptions, model_files

    made = pipeline("fill-mask", model=AutoModelForMaskedLM.from_pretrained(tiny), tokenizer=tokenizer)
    requirements = ["transformers", "torch"]
    mlflow.transformers.save_model(
        made, tmp_path / "theirs", pip_requirements=requirements, input_example=[SENTENCE], task="fill-mask"
    )
    texts = descriptions(tiny, model_files(tiny), "m-1", "1")
    for name in ("input_example.json", "serving_input_example.json"):
        assert json.loads(texts[name]) == json.loads((tmp_path / "theirs" / name).read_text())
    ours, theirs = yaml.safe_load(texts["MLmodel"]), yaml.safe_load((tmp_path / "theirs" / "MLmodel").read_text())
    for name in ("signature", "saved_input_example_info", "mlflow_version"):
        assert ours[name] == theirs[name]
    assert ours["flavors"]["python_function"] == theirs["flavors"]["python_function"]
    classes = {"pipeline_model_type": "AutoModelForMaskedLM", "tokenizer_type": "AutoTokenizer"}
    wanted = {key: value for key, value in theirs["flavors"]["transformers"].items() if key != "torch_dtype"}
    assert ours["flavors"]["transformers"] == wanted | classes | {"source_model_name": ""}
    files = {path.relative_to(tmp_path / "theirs").as_posix() for path in (tmp_path / "theirs").rglob("*.*")}
    from mlmx.tracking.model_files import place_of

    placed = {f"{place_of(path)}/{path.name}" for path in model_files(tiny)}
    assert placed | set(texts) >= files - {"LICENSE.txt"}
    assert all("==" in line for line in texts["requirements.txt"].splitlines())


def test_the_example_has_the_mask_of_its_own_tokenizer(tmp_path: Path):
    from mlmx.tracking.model_files import descriptions

    (tmp_path / "tokenizer_config.json").write_text('{"mask_token": {"content": "<mask>"}}')
    assert json.loads(descriptions(tmp_path, [], "m-1", "1")["input_example.json"]) == ["This is a great <mask>."]


CODE = """
from pathlib import Path
Path({ran!r}).touch()
from transformers import DistilBertConfig, DistilBertForMaskedLM
class Config(DistilBertConfig):
    model_type = "mine"
class Model(DistilBertForMaskedLM):
    config_class = Config
"""


@pytest.mark.filterwarnings("ignore")
def test_code_beside_the_weights_is_not_run_by_loading_from_mlflow(tiny: Path, tmp_path: Path, monkeypatch):
    import mlflow.transformers

    from mlmx.tracking.model_files import descriptions, model_files, place_of

    saved, ran, there = shutil.copytree(tiny, tmp_path / "saved"), tmp_path / "ran", tmp_path / "there"
    (saved / "mine.py").write_text(CODE.format(ran=str(ran)))
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["Model"]}
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForMaskedLM": "mine.Model"}
    (saved / "config.json").write_text(json.dumps(config))
    for path in model_files(saved):
        (there / place_of(path)).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, there / place_of(path) / path.name)
    for name, text in descriptions(saved, model_files(saved), "m-1", "1").items():
        (there / name).write_text(text)
    monkeypatch.setattr("builtins.input", lambda *_: "n")  # the library asks, where somebody is there
    with pytest.raises(Exception, match="trust_remote_code"):
        mlflow.transformers.load_model(str(there))
    assert not ran.exists()
    described = yaml.safe_load((there / "MLmodel").read_text())
    described["flavors"]["transformers"]["pipeline_model_type"] = "Model"  # as mlflow.transformers.save_model has it
    (there / "MLmodel").write_text(yaml.safe_dump(described))
    mlflow.transformers.load_model(str(there))
    assert ran.exists(), "the test sees code that is run"


@contextlib.contextmanager
def served(address: str, folder: Path) -> Iterator[str]:
    """``mlflow models serve`` of a model on loopback; killed at the end."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", address, "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # it starts uvicorn by name
    environment = os.environ | OPTIONS | {"MLFLOW_TRACKING_URI": local().uri, "PATH": path}
    with (folder / "serve.log").open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=folder, start_new_session=True)
    try:
        until(lambda: answers(port) or process.poll() is not None)
        assert process.poll() is None, (folder / "serve.log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=30) as answer:
        return bool(answer.status == 200)
    return False


@pytest.mark.long
def test_the_final_model_is_served_by_one_command(tiny: Path, corpus: Path, store: Path, outputs: Path):
    folder = outputs / "train" / "run"
    assert main(command(tiny, corpus, folder, "epochs=1")) == 0
    body = (files_of(models_of(folder)["model"]) / "serving_input_example.json").read_bytes()
    assert json.loads(body) == {"inputs": [SENTENCE]}
    with served(f"models:/{models_of(folder)['model'].model_id}", outputs) as address:
        asked = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            [filled] = json.load(answer)["predictions"]
    encoder = pretrained(path=str(folder / "model"))
    tokenizer = load_tokenizer(encoder, chunk_size=3)
    [[first]] = fill_masks(load_model(encoder, tokenizer, seed=0), tokenizer, SENTENCE, 1)
    assert filled == first.token


# ---------------------------------------------------------------------------------------------- lost answers


def train(made: Tracker, steps: range, *, loss: float = 2.0) -> None:
    """What a training tells its tracker, a checkpoint after each step."""
    for step in steps:
        made.log(step, float(step), {"train/loss": 3.0})
        made.log(step, float(step), {"eval/loss": loss + 1 / step, "heldout/loss": loss + 1 / step})
        made.checkpoint(checkpoint(made.run, step, float(step)), step, float(step))


@pytest.mark.parametrize("every_seconds", [0.02, 1_000.0], ids=["seen at once", "seen at the end"])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_checkpoint_that_was_saved_before_it_was_scored_gets_its_scores(
    is_there: bool, every_seconds: float, store: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
):
    """As with ``trainer.save_strategy=steps``, whose checkpoints come before the scores of their step."""
    monkeypatch.setattr(follower, "SEND_EVERY_SECONDS", every_seconds)
    made = opened(outputs / "train" / "run")
    made.log(1, 1.0, {"train/loss": 3.0})
    made.checkpoint(checkpoint(made.run, 1, 1.0), 1, 1.0)
    if is_there:
        until(lambda: caught_up(made))
    made.log(1, 1.0, {"eval/loss": 2.0, "heldout/loss": 2.5})
    made.finish("FINISHED", {})
    [one] = models_of(made.run.folder).values()
    assert {metric.key: (metric.value, bool(metric.dataset_name)) for metric in one.metrics} == {
        "eval/loss": (2.0, True),
        "heldout/loss": (2.5, False),  # nothing is held out in this run's report
    }
    assert_points(made.run.folder)
    assert sum(update(made.run, local()).values()) == 0


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("call", ["create_logged_model", "finalize_logged_model", "log_outputs", "log_batch"])
@pytest.mark.parametrize("arrives", [False, True])
def test_an_answer_that_is_lost_doubles_nothing(
    call: str, arrives: bool, store: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlflow import MlflowClient

    folder, ask, lost = outputs / "train" / "run", getattr(MlflowClient, call), [0]
    made = opened(folder)
    until(lambda: made.run_id is not None)

    def asked(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = ask(self, *args, **kwargs) if arrives else None
        lost[0] += 1
        if lost[0] in (1, 3):
            raise ConnectionError("no answer")
        return answer if arrives else ask(self, *args, **kwargs)

    with monkeypatch.context() as way:
        way.setattr(MlflowClient, call, asked)
        train(made, range(1, 4))
        made.finish("FINISHED", {})
    assert lost[0] >= 3
    assert set(models_of(folder)) == {"epoch-1", "epoch-2", "epoch-3"}
    outputs_there = client().get_run(made.run_id).outputs.model_outputs
    assert sorted(one.step for one in outputs_there) == [1, 2, 3]
    assert_points(folder)
    assert {len(one.metrics) for one in models_of(folder).values()} == {2}
    assert sum(update(made.run, local()).values()) == 0


def test_what_the_store_has_lost_of_a_model_is_put_back(store: Path, outputs: Path):
    folder = outputs / "train" / "run"
    made = opened(folder)
    train(made, range(1, 3))
    made.finish("FINISHED", {})
    there = files_of(models_of(folder)["epoch-1"])
    (there / "model" / "model.safetensors").unlink()
    (there / "MLmodel").unlink()
    client().delete_logged_model(models_of(folder)["epoch-2"].model_id)
    found = update(made.run, local())
    assert {name: count for name, count in found.items() if count} == {"models": 2}
    assert (there / "MLmodel").is_file()
    assert (there / "model/model.safetensors").samefile(folder / "checkpoints/checkpoint-1/model.safetensors")
    assert set(models_of(folder)) == {"epoch-1", "epoch-2"}
    assert sum(update(made.run, local()).values()) == 0
    assert_points(folder)


def test_a_resumed_run_links_the_points_that_it_has(store: Path, outputs: Path):
    """Those of a step that was lost from the file and is repeated have another time there; they come once."""
    folder = outputs / "train" / "run"
    first = opened(folder)
    train(first, range(1, 4))
    first.finish("KILLED", {}, resumable=True)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-3")
    client().delete_logged_model(models_of(folder)["epoch-3"].model_id)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if '"step": 3' not in line))
    again = opened(folder)
    train(again, range(3, 5))
    again.finish("FINISHED", {})
    found = models_of(folder)
    assert set(found) == {"epoch-1", "epoch-2", "epoch-3", "epoch-4"}
    assert {name: len(one.metrics) for name, one in found.items()} == dict.fromkeys(found, 2)
    points = Counter((name, step) for name, step, *_ in stored(Made(folder)))
    assert set(points.values()) == {1}


def test_a_loss_that_is_no_number_is_no_score_of_a_model(store: Path, outputs: Path):
    """MLflow would keep it as 0, the best there is."""
    folder = outputs / "train" / "run"
    made = opened(folder)
    made.log(1, 1.0, {"eval/loss": math.nan, "heldout/loss": math.inf, "eval/accuracy": 0.5})
    made.checkpoint(checkpoint(made.run, 1, 1.0), 1, 1.0)
    made.finish("FINISHED", {})
    assert [metric.key for metric in models_of(folder)["epoch-1"].metrics] == ["eval/accuracy"]


# ------------------------------------------------------------------------------------------------------ keep


def there(folder: Path) -> set[int]:
    return {int(path.name.rpartition("-")[2]) for path in (folder / "checkpoints").iterdir()}


@pytest.mark.parametrize(
    ("keep", "losses", "steps"),
    [
        ("all", (3.0, 2.0, 1.0, 1.5, 1.7), {2, 4, 6, 8}),
        ("best+last", (3.0, 2.0, 1.0, 1.5, 1.7), {4, 8}),
        ("best+last", (3.0, 2.0, math.nan, 1.9, 1.5), {8}),
        ("best+last", (3.0, 2.0, math.nan, math.nan, math.inf), {2, 8}),
        ("2", (3.0, 2.0, 1.0, 1.5, 1.7), {6, 8}),
    ],
)
def test_what_is_kept_in_the_folder_is_kept_in_mlflow(
    keep: str,
    losses: tuple[float, ...],
    steps: set[int],
    scored: Callable[..., None],
    tiny: Path,
    corpus: Path,
    store: Path,
    outputs: Path,
):
    folder = outputs / "train" / "run"
    scored(*losses)
    assert main(command(tiny, corpus, folder, "epochs=4", f"keep={keep}")) == 0
    assert there(folder) == steps
    assert set(models_of(folder)) == {"model", *(f"epoch-{step // 2}" for step in steps)}
    weights = {path.stat().st_ino for path in outputs.rglob("model.safetensors")}
    assert len(weights) == len(steps) + 1, "the files of the others are gone"
    epochs = [point for point in stored(Made(folder)) if point[0] == "heldout/loss"]
    assert len(epochs) == 5, "their numbers stay"
    assert sum(update(Run(folder), local()).values()) == 0
    assert set(models_of(folder)) == {"model", *(f"epoch-{step // 2}" for step in steps)}


def test_a_resumed_run_knows_its_best_and_its_final_model_is_the_new_one(
    scored: Callable[..., None], tiny: Path, corpus: Path, store: Path, outputs: Path
):
    folder = outputs / "train" / "run"
    scored(3.0, 1.0, 2.0)
    assert main(command(tiny, corpus, folder, "keep=best+last")) == 0
    before = models_of(folder)
    assert set(before) == {"epoch-1", "epoch-2", "model"}
    scored(2.5, 2.6)
    assert main(["train", f"resume={folder}", "epochs=4", "resume.allow=[epochs]"]) == 0
    assert there(folder) == {2, 8}
    found = models_of(folder)
    assert set(found) == {"epoch-1", "epoch-4", "model"}
    assert found["epoch-1"].model_id == before["epoch-1"].model_id
    assert found["model"].model_id != before["model"].model_id
    assert (files_of(found["model"]) / "model/model.safetensors").samefile(folder / "model" / "model.safetensors")
    assert not files_of(before["model"]).exists()


@pytest.mark.usefixtures("short")
def test_checkpoints_that_went_while_mlflow_was_away_never_come(store: Path, outputs: Path, said: Any, monkeypatch):
    folder = outputs / "train" / "run"
    with monkeypatch.context() as away:
        away.setattr(follower, "PATIENCE_SECONDS", 0.1)
        away.setattr("mlmx.tracking.mirror.connect", lambda store: 1 / 0)
        made = opened(folder, rotates=True)
        for step in (1, 2, 3):
            shutil.rmtree(folder / "checkpoints" / f"checkpoint-{step - 1}", ignore_errors=True)
            train(made, range(step, step + 1))
        made.finish("KILLED", {}, resumable=True)
        assert made.follower is not None
        made.follower.thread.join()
    again = opened(folder, rotates=True)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-3")
    train(again, range(4, 5))
    again.finish("FINISHED", {})
    assert set(models_of(folder)) == {"epoch-4"}
    assert "did not take" not in said.text


@pytest.mark.usefixtures("short")
def test_a_removal_whose_answer_is_lost_is_no_obstacle_to_the_next(store: Path, outputs: Path, said: Any, monkeypatch):
    from mlflow import MlflowClient

    folder, remove, lost = outputs / "train" / "run", MlflowClient.delete_logged_model, [0]

    def removed(self: Any, *args: Any) -> None:
        remove(self, *args)
        lost[0] += 1
        if lost[0] == 1:
            raise ConnectionError("no answer")

    monkeypatch.setattr(MlflowClient, "delete_logged_model", removed)
    made = opened(folder, rotates=True)
    for step in (1, 2, 3):
        shutil.rmtree(folder / "checkpoints" / f"checkpoint-{step - 1}", ignore_errors=True)
        train(made, range(step, step + 1))
        until(lambda: caught_up(made))
    made.finish("FINISHED", {})
    assert set(models_of(folder)) == {"epoch-3"}
    assert "did not take" not in said.text


def test_checkpoints_deleted_by_hand_stay_in_mlflow(store: Path, outputs: Path):
    folder = outputs / "train" / "run"
    made = opened(folder, rotates=True)
    train(made, range(1, 3))
    made.finish("FINISHED", {})
    shutil.rmtree(folder / "checkpoints")
    assert sum(update(made.run, local()).values()) == 0
    assert set(models_of(folder)) == {"epoch-1", "epoch-2"}
    weights = files_of(models_of(folder)["epoch-1"]) / "model/model.safetensors"
    assert weights.read_text() == "weights 1"


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_model_in_the_registry_keeps_its_files(by_hand: bool, store: Path, outputs: Path):
    folder = outputs / "train" / "run"
    made = opened(folder, rotates=True, registered=None if by_hand else "kept")
    train(made, range(1, 2))
    made.finish("FINISHED", {})
    if by_hand:  # as MLflow's UI does it
        one = models_of(folder)["epoch-1"]
        client().set_logged_model_tags(one.model_id, {"mlflow.modelVersions": '[{"name": "by hand", "version": 1}]'})
    again = opened(folder, rotates=True, registered="kept")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-1")
    train(again, range(2, 3))
    again.finish("FINISHED", {})
    assert set(models_of(folder)) == {"epoch-1", "epoch-2"}
    assert (files_of(models_of(folder)["epoch-1"]) / "MLmodel").is_file()


@pytest.mark.parametrize(
    "keep", [pytest.param("9" * 5000, id="5,000 digits"), "best", "0", "-1", "2.5", "all+last", "١"]
)
def test_a_keep_that_says_nothing_is_refused(keep: str):
    with pytest.raises(RequestError, match=r"^keep=.*: choose best\+last, all, or how many of the newest"):
        TrainConfig(keep=keep)


def test_keep_and_save_total_limit_are_not_said_together():
    with pytest.raises(RequestError, match=r"keep=2: trainer\.save_total_limit=1 says it another way"):
        TrainConfig(keep="2", trainer={"name": "corrected", "save_total_limit": 1})


def test_neither_keep_nor_register_makes_another_run():
    assert identity.dials(TrainConfig(keep="2", register="x")) == identity.dials(TrainConfig())


# -------------------------------------------------------------------------------------------------- registry


def aliases(name: str) -> dict[str, Any]:
    """Alias → (run, step) of its version."""
    at = client()
    found = {
        alias: at.get_model_version(name, number) for alias, number in at.get_registered_model(name).aliases.items()
    }
    return {alias: (one.run_id, int(one.tags["mlmx.step"])) for alias, one in found.items()}


def trained(folder: Path, *losses: float, name: str = "tiny", protocol: str = "heldout-1") -> Tracker:
    """A finished run that registers its models, a checkpoint per loss."""
    made = opened(folder, registered=name, protocol=protocol)
    for step, loss in enumerate(losses, start=1):
        made.log(step, float(step), {"heldout/loss": loss, "eval/loss": 9.0 - step})
        made.checkpoint(checkpoint(made.run, step, float(step)), step, float(step))
    made.finish("FINISHED", {})
    return made


def test_the_best_and_the_last_are_versions_with_aliases(store: Path, outputs: Path):
    made = trained(outputs / "train" / "run", 2.0, 1.0, 1.5)
    versions = client().search_model_versions("name='tiny'")
    assert sorted(int(one.tags["mlmx.step"]) for one in versions) == [2, 3]
    assert aliases("tiny") == {"best": (made.run_id, 2), "last": (made.run_id, 3)}
    best = client().get_model_version_by_alias("tiny", "best")
    assert best.source == models_of(made.run.folder)["epoch-2"].artifact_location
    assert (best.tags["mlmx.metric"], float(best.tags["mlmx.loss"])) == ("heldout/loss", 1.0)
    listed = json.loads(models_of(made.run.folder)["epoch-2"].tags["mlflow.modelVersions"])
    assert [(one["name"], int(one["version"])) for one in listed] == [("tiny", int(best.version))]
    assert sum(update(made.run, local()).values()) == 0


def test_one_version_may_be_both(store: Path, outputs: Path):
    made = trained(outputs / "train" / "run", 2.0, 1.0)
    assert len(client().search_model_versions("name='tiny'")) == 1
    assert aliases("tiny") == dict.fromkeys(("best", "last"), (made.run_id, 2))


def test_best_is_the_best_of_all_runs_measured_alike_and_last_is_of_the_run_that_ended_last(store: Path, outputs: Path):
    good = trained(outputs / "train" / "good", 1.0)
    worse = trained(outputs / "train" / "worse", 3.0, 2.0)
    assert aliases("tiny") == {"best": (good.run_id, 1), "last": (worse.run_id, 2)}
    other = trained(outputs / "train" / "other", 5.0, 4.0, 4.5, protocol="heldout-2")
    assert aliases("tiny") == {"best": (other.run_id, 2), "last": (other.run_id, 3)}, "1.0 was measured on other data"
    broken = trained(outputs / "train" / "broken", math.nan, protocol="heldout-1")
    assert aliases("tiny") == {"best": (good.run_id, 1), "last": (broken.run_id, 1)}


def test_the_final_model_is_registered_where_mlflow_has_no_checkpoint_of_its_step(store: Path, outputs: Path):
    made = trained(outputs / "train" / "run", 2.0)
    assert made.follower is not None
    models = made.follower.mirror.models
    assert models is not None
    final, lost = (
        model_files.Saved(made.run.checkpoints / "checkpoint-1", 1, epoch, epoch == 1.0) for epoch in (1.0, 1.5)
    )
    assert models.add(final, {})
    assert models.register("other", [final, lost], {1: {"heldout/loss": (2.0, 0)}}, ended=1) == {"versions": 1}
    assert aliases("other") == dict.fromkeys(("best", "last"), (made.run_id, 1))


def test_an_unfinished_run_registers_nothing(store: Path, outputs: Path):
    made = opened(outputs / "train" / "run", registered="tiny")
    train(made, range(1, 3))
    made.finish("KILLED", {}, resumable=True)
    update(made.run, local())
    assert client().search_model_versions("name='tiny'") == []


def test_runs_that_were_sent_late_register_as_if_they_had_not_been(store: Path, outputs: Path, monkeypatch, capsys):
    with monkeypatch.context() as away:
        away.setattr(follower, "PATIENCE_SECONDS", 0.1)
        away.setattr("mlmx.tracking.mirror.connect", lambda store: 1 / 0)
        early = trained(outputs / "train" / "early", 2.0, 1.0, 1.5)
        assert early.follower is not None
        early.follower.thread.join()
    late = trained(outputs / "train" / "late", 1.2)
    assert aliases("tiny") == dict.fromkeys(("best", "last"), (late.run_id, 1))
    assert main(["sync", f"run={early.run.folder}"]) == 0
    assert "3 models" in (said := capsys.readouterr().out)
    assert "2 versions" in said
    assert aliases("tiny") == {"best": (early.run.result().run_id, 2), "last": (late.run_id, 1)}
    assert main(["sync", "run=all"]) == 0
    assert capsys.readouterr().out.count("has all of it") == 2


@pytest.mark.usefixtures("short")
def test_a_version_whose_answer_is_lost_is_there_once(store: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch):
    from mlflow import MlflowClient

    create, lost = MlflowClient.create_model_version, [0]

    def created(self: Any, *args: Any, **kwargs: Any) -> Any:
        version = create(self, *args, **kwargs)
        lost[0] += 1
        if lost[0] == 1:
            raise ConnectionError("no answer")
        return version

    with monkeypatch.context() as way:
        way.setattr(MlflowClient, "create_model_version", created)
        trained(outputs / "train" / "run", 1.0, 2.0)
    assert len(client().search_model_versions("name='tiny'")) == 2


def test_others_that_register_at_the_same_moment_leave_the_aliases_right(store: Path, outputs: Path, monkeypatch):
    """The better one comes between looking and setting."""
    from mlmx.tracking import logged_models

    worse, aliases_of, better = trained(outputs / "train" / "worse", 2.0), logged_models.aliases_of, list[str]()

    def late(versions: Any) -> dict[str, str]:
        wanted = aliases_of(versions)
        if not better:
            better.append("on its way")
            better[0] = str(trained(outputs / "train" / "better", 1.0).run_id)
        return wanted

    monkeypatch.setattr(logged_models, "aliases_of", late)
    between = trained(outputs / "train" / "between", 1.5)
    assert aliases("tiny")["best"] == (better[0], 1)
    assert len({worse.run_id, between.run_id, better[0]}) == 3


@pytest.mark.parametrize("name", ["", "a/b", "models:/x", "it's", 'a"b', "..", " x", "x" * 201, "a\nb"])
def test_a_name_that_the_registry_cannot_have_is_refused(name: str):
    with pytest.raises(RequestError, match=r"^register=.*is no name for a registered model"):
        TrainConfig(register=name)


def test_the_registry_needs_mlflow(tiny: Path, corpus: Path, outputs: Path, capsys):
    assert main(command(tiny, corpus, outputs / "train" / "run", "register=tiny", "tracking=none")) == 2
    assert "register=tiny: the registry is MLflow's" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1


def test_the_name_of_a_model_says_which_it_is():
    names = [model_files.Saved(Path("checkpoint-7"), 7, epoch).name for epoch in (1.0, 2.0000000001, 0.7, 0.0)]
    assert names == ["epoch-1", "epoch-2", "step-7", "epoch-0"]
