"""Whose code and weights are loaded: remote code only by name and commit, hub data at pinned commits, no pickles."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from huggingface_hub import constants

from mlmx.commands import describe
from mlmx.commands.main import main
from mlmx.config import sources
from mlmx.config.errors import RequestError
from mlmx.config.paths import conf_dir
from mlmx.config.schema import Job, TrainConfig
from mlmx.config.sources import require_reachable
from mlmx.config.trust import TrustedCode, require_trusted_model, trusted_code, trusted_code_of, trusting
from mlmx.data import texts as data_texts
from mlmx.models.encoders import Encoder, load_model, load_tokenizer, pretrained, require_there, scratch, trained_from

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40
REPO = "owner/coded"
LOCAL = ["dataset=files", "dataset.path=good.txt", "chunk_size=16", "tracking=none"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The hub is away; what a test switches in the libraries is switched back."""
    sources._hub_answers.cache_clear()
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", module.HF_HUB_OFFLINE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield
    sources._hub_answers.cache_clear()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "good.txt").write_text("A great film it is.\n" * 100)
    monkeypatch.chdir(folder)
    return folder


# ------------------------------------------------------------------------------ a repository with code

CONFIGURATION = """
import os, pathlib
pathlib.Path(os.environ["MLMX_TEST_MARK"]).touch()
from transformers import DistilBertConfig
class CodedConfig(DistilBertConfig):
    model_type = "coded"
"""
MODELING = """
from transformers import DistilBertForMaskedLM
from .configuration_coded import CodedConfig
class CodedForMaskedLM(DistilBertForMaskedLM):
    config_class = CodedConfig
"""
AUTO_MAP = {"AutoConfig": "configuration_coded.CodedConfig", "AutoModelForMaskedLM": "modeling_coded.CodedForMaskedLM"}


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the repository's code makes when it is run."""
    monkeypatch.setenv("MLMX_TEST_MARK", str(tmp_path / "mark"))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "mark"


def write_code(folder: Path, auto_map: dict[str, str]) -> None:
    """Make a saved model one that needs its own code."""
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"model_type": "coded", "architectures": ["CodedForMaskedLM"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "configuration_coded.py").write_text(CONFIGURATION)
    (folder / "modeling_coded.py").write_text(MODELING)


def cached(tiny: Path, repo: str, commit: str) -> Path:
    """A copy of a model in the hub's local cache."""
    snapshot = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots" / commit
    shutil.copytree(tiny, snapshot)
    return snapshot


@pytest.fixture
def coded(tiny: Path, mark: Path) -> Iterator[Path]:
    """A cached hub repository whose model needs the code that lies beside it."""
    snapshot = cached(tiny, REPO, COMMIT)
    write_code(snapshot, AUTO_MAP)
    yield snapshot
    shutil.rmtree(snapshot.parents[1])


def load(encoder: Encoder) -> Any:
    return load_model(encoder, load_tokenizer(encoder, 64), seed=0)


def test_code_of_a_repository_is_not_run(coded: Path, mark: Path):
    encoder = pretrained(path=REPO, revision=COMMIT)
    require_there(encoder)
    with pytest.raises(RequestError, match=f"model.path={REPO}: brings code of its own, which is not run"):
        load(encoder)
    with pytest.raises(RequestError, match="--trust-remote-code=owner/name@"):
        load(pretrained(path=str(coded)))
    assert not mark.exists()


def test_code_is_run_of_the_repository_and_commit_that_is_trusted(coded: Path, mark: Path):
    with trusting(TrustedCode(REPO, COMMIT)):
        encoder = pretrained(path=REPO, revision=COMMIT)
    assert encoder.code == TrustedCode(REPO, COMMIT)
    loaded = load(encoder)
    assert type(loaded).__name__ == "CodedForMaskedLM"
    assert mark.exists()


@pytest.mark.parametrize(("repo", "commit"), [(REPO, OTHER), ("owner/other", COMMIT), (REPO, None)])
def test_trust_reaches_no_other_repository_and_no_other_commit(repo: str, commit: str | None, coded: Path, mark: Path):
    with trusting(TrustedCode(REPO, COMMIT)):
        assert pretrained(path=repo, revision=commit).code is None
        assert pretrained(path=str(coded)).code is None
        assert scratch().code is None
    assert not mark.exists()


def test_code_taken_from_another_repository_is_not_run(tiny: Path, coded: Path, mark: Path):
    """The trusted repository points at code of another one: that is not what was trusted."""
    snapshot = cached(tiny, "owner/pointing", OTHER)
    try:
        write_code(snapshot, {name: f"{REPO}--{where}" for name, where in AUTO_MAP.items()})
        with trusting(TrustedCode("owner/pointing", OTHER)):
            encoder = pretrained(path="owner/pointing", revision=OTHER)
        with pytest.raises(RequestError, match=r"model\.path=owner/pointing"):
            load(encoder)
    finally:
        shutil.rmtree(snapshot.parents[1])
    assert not mark.exists()


def test_a_trained_model_takes_its_code_from_the_commit_and_never_from_its_folder(
    coded: Path, mark: Path, tmp_path: Path
):
    """What a run has saved may have been changed since."""
    trained = tmp_path / "model"
    shutil.copytree(coded, trained)
    for name in ("configuration_coded.py", "modeling_coded.py"):
        (trained / name).write_text("raise AssertionError('the code of the folder was run')")
    origin = {"name": "pretrained", "path": REPO, "revision": COMMIT}
    with pytest.raises(RequestError, match="brings code of its own"):
        load(trained_from(pretrained(path=str(trained)), origin))
    with trusting(TrustedCode(REPO, COMMIT)):
        encoder = trained_from(pretrained(path=str(trained)), origin)
        with pytest.raises(RequestError, match="the model is owner/other"):
            trained_from(pretrained(path=str(trained)), origin | {"path": "owner/other"})
    assert not mark.exists()
    assert type(load(encoder)).__name__ == "CodedForMaskedLM"
    assert mark.exists()


# ------------------------------------------------------------------------------------------- the flag

BAD_FLAGS = [
    (["--trust-remote-code"], "--trust-remote-code=: give a hub repository and its full commit"),
    ([f"--trust-remote-code={REPO}"], "full commit"),
    ([f"--trust-remote-code={REPO}@main"], "full commit"),
    ([f"--trust-remote-code={REPO}@{COMMIT[:12]}"], "full commit"),
    ([f"--trust-remote-code={REPO}@{COMMIT.upper()}"], "full commit"),
    ([f"--trust-remote-code=coded@{COMMIT}"], "full commit"),
    ([f"--trust-remote-code=../coded@{COMMIT}"], "full commit"),
    (["--trust-remote-code", "true"], "full commit"),
    ([f"--trust-remote-code={REPO}@{COMMIT}", "--trust-remote-code", f"{REPO}@{OTHER}"], "2 times"),
    ([f"--trust-remote-code=owner/other@{COMMIT}"], f"the model is {REPO}"),
    ([f"--trust-remote-code={REPO}@{OTHER}"], f"model.revision is {COMMIT}"),
    ([f"--trust-remote-code={REPO}@{COMMIT}", "model=scratch"], "the model is scratch"),
    ([f"--trust-remote-cod={REPO}@{COMMIT}"], "--trust-remote-cod"),
    ([f"--trust={REPO}@{COMMIT}"], "--trust"),
    ([f"trust_remote_code={REPO}@{COMMIT}"], "trust_remote_code"),
    ([f"+model.code={REPO}@{COMMIT}"], "model.code"),
    ([f"+hydra.job.env_set.MLMX_TRUST_REMOTE_CODE={REPO}@{COMMIT}"], "hydra.job.env_set"),
]


@pytest.mark.parametrize(("flags", "words"), BAD_FLAGS, ids=range(len(BAD_FLAGS)))
def test_trust_that_is_not_exact_is_refused(
    flags: list[str], words: str, here: Path, coded: Path, mark: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
):
    revision = (
        [] if "model=scratch" in flags else ["model=distilbert", f"model.path={REPO}", f"model.revision={COMMIT}"]
    )
    assert main(["train", *LOCAL, *revision, *flags]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
    assert not mark.exists()
    assert not outputs.exists()


def test_commands_that_load_no_model_do_not_take_the_flag(capsys: pytest.CaptureFixture[str]):
    assert main(["ui", f"--trust-remote-code={REPO}@{COMMIT}"]) == 2
    assert "ui loads no model" in capsys.readouterr().err
    with pytest.raises(RequestError):
        trusted_code_of("ui", f"{REPO}@{COMMIT}")


def test_a_folder_of_the_repositorys_name_is_not_taken_for_it(here: Path, capsys: pytest.CaptureFixture[str]):
    (here / REPO).mkdir(parents=True)
    assert main(["train", *LOCAL, f"model.path={REPO}", f"--trust-remote-code={REPO}@{COMMIT}"]) == 2
    assert f"a folder {REPO} lies in" in capsys.readouterr().err


@pytest.mark.parametrize("split", [True, False])
def test_the_flag_trusts_warns_sets_the_revision_and_is_on_record(
    split: bool, here: Path, coded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    seen: list[tuple[TrainConfig, Job, TrustedCode | None, str]] = []
    monkeypatch.setattr(
        "mlmx.commands.train.train",
        lambda cfg, job, *more: seen.append((cfg, job, trusted_code(), describe.command_line(job))),
    )
    named = f"{REPO}@{COMMIT}"
    flag = ["--trust-remote-code", named] if split else [f"--trust-remote-code={named}"]
    line = ["train", *LOCAL, *flag, "model=distilbert", f"model.path={REPO}", "model.revision=null"]
    assert main(line) == 0
    [(config, _, code, command)] = seen
    assert config.model["revision"] == COMMIT
    assert code == TrustedCode(REPO, COMMIT)
    assert command.startswith(f"python -m mlmx train --trust-remote-code={named} ")
    told = capsys.readouterr().err
    assert told == f"mlmx: the code of {named} is run, with all your rights\n"
    assert trusted_code() is None
    assert "--trust-remote-code" not in str([job.overrides for _, job, *_ in seen])
    assert main([*line, "-m", "lr=1e-3,1e-4"]) == 0
    assert [code for _, _, code, _ in seen] == [TrustedCode(REPO, COMMIT)] * 3


def test_no_environment_variable_trusts_code(coded: Path, mark: Path, monkeypatch: pytest.MonkeyPatch):
    for name in (
        "MLMX_TRUST_REMOTE_CODE",
        "HF_HUB_TRUST_REMOTE_CODE",
        "TRUST_REMOTE_CODE",
        "HF_DATASETS_TRUST_REMOTE_CODE",
    ):
        monkeypatch.setenv(name, "1")
    assert trusted_code() is None
    require_trusted_model({"name": "anything"})
    with pytest.raises(RequestError, match="brings code of its own"):
        load(pretrained(path=REPO, revision=COMMIT))
    assert not mark.exists()


# ------------------------------------------------------------------------------------ pinned revisions


def test_every_shipped_config_of_the_hub_names_a_full_commit():
    pinned = {}
    for path in conf_dir().glob("*/*.yaml"):
        options = yaml.safe_load(path.read_text())
        if options.get("name") == "hub" or (options.get("name") == "pretrained" and "/" in options["path"]):
            pinned[path.stem] = options.get("revision")
    assert len(pinned) >= 6
    assert {name: commit for name, commit in pinned.items() if not re.fullmatch(r"[0-9a-f]{40}", str(commit))} == {}


def test_a_cached_copy_counts_at_its_own_revision_only(tiny: Path):
    snapshot = cached(tiny, "owner/name", COMMIT)
    (snapshot.parents[1] / "refs").mkdir()
    try:
        require_reachable("model", "owner/name", COMMIT)
        for absent in (OTHER, "v1", None):
            with pytest.raises(RequestError, match="cannot be reached") as refused:
                require_reachable("model", "owner/name", absent)
            assert str(absent) in str(refused.value) or absent is None
        for name in ("main", "v1"):
            (snapshot.parents[1] / "refs" / name).write_text(COMMIT)
        require_reachable("model", "owner/name", "v1")
        require_reachable("model", "owner/name")
        assert load(pretrained(path="owner/name", revision=COMMIT)).config.dim == 32
    finally:
        shutil.rmtree(snapshot.parents[1])


@pytest.fixture
def prepared(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Two commits of a dataset as the library has prepared them, the second one last."""
    (tmp_path / "my_texts").mkdir()
    (tmp_path / "my_texts" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    built = Path(datasets.load_dataset(str(tmp_path / "my_texts"), split="train").cache_files[0]["filename"]).parent
    root = Path(datasets.config.HF_DATASETS_CACHE) / "Owner___my_texts"
    copies = {commit: root / "default" / "0.0.0" / commit for commit in (COMMIT, OTHER)}
    for number, copy in enumerate(copies.values()):
        shutil.copytree(built, copy)
        os.utime(copy, (number + 1, number + 1))
    yield copies
    shutil.rmtree(root)


def test_offline_a_dataset_is_read_at_the_revision_asked_for_or_not_at_all(prepared: dict[str, Path]):
    data_texts._from_hub.cache_clear()
    assert data_texts.hub(path="Owner/MyTexts", revision=OTHER)["train"]["text"] == ["one", "two"]
    with pytest.raises(RequestError, match=f"of revision {OTHER}, not {COMMIT}"):
        data_texts.hub(path="Owner/MyTexts", revision=COMMIT)
    with pytest.raises(RequestError, match=f"no copy of it at revision {'a' * 40} is cached"):
        data_texts.hub(path="Owner/MyTexts", revision="a" * 40)
    shutil.rmtree(prepared[OTHER])
    assert data_texts.hub(path="Owner/MyTexts", revision=COMMIT)["train"]["text"] == ["one", "two"]


def test_a_folder_is_not_read_in_place_of_a_pinned_dataset(here: Path):
    (here / "owner" / "name").mkdir(parents=True)
    with pytest.raises(RequestError, match=r"a folder of this name lies in .*dataset.revision=null"):
        data_texts.hub(path="owner/name", revision=COMMIT)


# -------------------------------------------------------------------------------- weights, no pickles


def test_weights_that_are_a_pickle_are_refused(
    tiny: Path, here: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
):
    import torch

    shutil.copytree(tiny, here / "old")
    (here / "old" / "model.safetensors").unlink()
    torch.save({}, here / "old" / "pytorch_model.bin")
    assert main(["train", *LOCAL, "model=distilbert", "model.path=old"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "model.path=old: holds its weights as a pickle (pytorch_model.bin), and only safetensors are read" in told
    assert not outputs.exists()


def test_pickled_weights_of_a_repository_are_not_read(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    snapshot = cached(tiny, "owner/old", COMMIT)
    (snapshot / "model.safetensors").unlink()
    torch.save({}, snapshot / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    encoder = pretrained(path="owner/old", revision=COMMIT)
    try:
        require_there(encoder)
        with pytest.raises(RequestError, match=r"model\.path=owner/old"):
            load(encoder)
    finally:
        shutil.rmtree(snapshot.parents[1])


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the library's own Trainer, after one step."""
    import torch
    from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments

    folder = tmp_path_factory.mktemp("stock")
    ids = torch.arange(1000, 1016)
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}] * 4
    arguments = TrainingArguments(
        str(folder), max_steps=1, save_steps=1, learning_rate=0.1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    loaded = AutoModelForMaskedLM.from_pretrained(tiny)
    Trainer(loaded, arguments, train_dataset=rows, processing_class=tokenizer).train()
    return folder / "checkpoint-1"


def test_a_checkpoint_of_the_stock_trainer_is_taken_up_by_its_weights_alone(
    checkpoint: Path, tiny: Path, here: Path, monkeypatch: pytest.MonkeyPatch
):
    import torch
    from safetensors.torch import load_file

    pickles = [path for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth", ".bin")]
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"} <= {path.name for path in pickles}
    for path in pickles:
        path.write_bytes(b"not a pickle: whoever reads this fails")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in checkpoint.iterdir()}
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    made: list[Any] = []
    monkeypatch.setattr("mlmx.commands.train.fit", lambda *parts: made.append(parts[1].model))
    monkeypatch.setattr("mlmx.commands.train.draw_plots", lambda *parts: [])
    assert main(["train", *LOCAL, "model=distilbert", f"model.path={checkpoint}"]) == 0
    weights = dict(made[0].named_parameters())
    saved, untrained = load_file(checkpoint / "model.safetensors"), load_file(tiny / "model.safetensors")
    assert saved.keys() & weights.keys() == weights.keys()
    assert [name for name, value in weights.items() if not torch.equal(value, saved[name])] == []
    assert any(not torch.equal(saved[name], untrained[name]) for name in saved)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in checkpoint.iterdir()} == before
