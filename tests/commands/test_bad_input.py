"""A wrong request ends with one line that says what was given and what is allowed, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from mlmx.commands.main import COMMANDS, main
from mlmx.config.schema import TrainConfig
from mlmx.runs.run import begin_run

# ------------------------------------------------------------------------------- what is at fault

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "great", "film", "."]
PROTEIN = ["<cls>", "<pad>", "<eos>", "<unk>", "L", "A", "G", "<mask>"]
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


def word_level(**special: str) -> Any:
    """A fast tokenizer over a handful of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", **special)


def save_models(folder: Path) -> None:
    """Model folders that are no masked LM, have no mask token, or have no fast tokenizer; none holds weights."""
    from transformers import BertConfig, EsmConfig, EsmTokenizer, GPT2Config

    generative = GPT2Config(vocab_size=9, n_positions=64, n_embd=8, n_layer=1, n_head=1, bos_token_id=2, eos_token_id=3)
    (folder / "protein.txt").write_text("\n".join(PROTEIN))
    models = {
        "gpt2": (generative, word_level(eos_token="[SEP]")),
        "gpt2_with_mask": (generative, word_level(mask_token="[MASK]")),
        "bert_without_mask": (BertConfig(vocab_size=9, **SMALL), word_level()),
        "no_weights": (BertConfig(vocab_size=9, **SMALL), word_level(mask_token="[MASK]")),
        "esm": (
            EsmConfig(vocab_size=8, max_position_embeddings=64, pad_token_id=1, mask_token_id=7, **SMALL),
            EsmTokenizer(str(folder / "protein.txt")),
        ),
    }
    for name, (config, tokenizer) in models.items():
        config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def save_texts(folder: Path) -> None:
    """Files that hold too little, nothing, or something else than text."""
    texts = {
        "good.txt": "A great film it is.\n" * 100,
        "short.txt": "A great film.\n",
        "empty.txt": "",
        "blank.txt": "\n   \n\n",
        "stars.csv": 'body,stars\ngood,3\n"bad, bad",1\n',
        "header.csv": "text,stars\n",
        "broken.json": "{nope",
        "broken.parquet": "nope",
        "notes.pdf": "nope",
        "protein.txt": "L A G A L G\n" * 100,
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "latin.txt").write_bytes("Ein schöner Film.\n".encode("latin-1"))
    (folder / "nothing").mkdir()
    DatasetDict({"test": Dataset.from_dict({"text": ["a"]})}).save_to_disk(folder / "no_train")


def save_runs(folder: Path, tiny: Path) -> None:
    """A finished run, and ones that are not."""
    groups = {"model": "scratch", "dataset": "files", "chunking": "concat", "masking": "token"}
    config = TrainConfig(**{name: {"name": value} for name, value in groups.items()}, chunk_size=16)
    for name, status in {"finished": "FINISHED", "running": "RUNNING", "failed": "FAILED"}.items():
        run = folder / name
        run.mkdir()
        (run / "result.json").write_text(json.dumps({"status": status, "run_id": name}))
        (run / "config.yaml").write_text(json.dumps(asdict(config)))
    shutil.copytree(tiny, folder / "finished" / "model")
    shutil.copytree(folder / "finished", folder / "unsaved", ignore=shutil.ignore_patterns("model"))


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """The working folder of every row: texts, models and runs by relative path."""
    folder = tmp_path_factory.mktemp("faulty")
    save_texts(folder)
    save_models(folder)
    save_runs(folder, tiny)
    shutil.copytree(tiny, folder / "tiny")
    for name, text in OWN.items():
        (folder / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "own" / name).write_text(text)
    return folder


# -------------------------------------------------------------------------------------- the matrix

# Without these a row would be refused for the hub that does not answer.
LOCAL = ["model=scratch", "dataset=files", "dataset.path=good.txt", "chunk_size=16"]

Row = tuple[list[str], list[str]]  # the command line, and what the answer must say


def train(*arguments: str) -> list[str]:
    return ["train", *LOCAL, *arguments]


NAMES: list[Row] = [
    (["trian"], ["trian", "did you mean train?", "evaluate, predict, compare, ui"]),
    (["compose"], ["compose: unknown command", "train, prepare, evaluate, predict, compare, ui"]),
    (train("chunk_sze=128"), ["chunk_sze", "did you mean chunk_size?", "--help"]),
    (train("+chunk_sze=128"), ["chunk_sze", "did you mean chunk_size?", "--help"]),
    (train("++zzz=1"), ["zzz: unknown key", "--help"]),
    (train("~zzz"), ["zzz", "does not exist"]),
    (train("chunk_size"), ["'chunk_size'", "key=value", "--help"]),
    (train("=3"), ["'=3'", "key=value"]),
    (train("note=a=b"), ["note=a=b", "quotes"]),
    (train("model=distilbrt"), ["model=distilbrt", "did you mean distilbert?", "roberta_base", "scratch"]),
    (train("model=null"), ["model=null", "--help"]),
    (train("model="), ["model=", "distilbert", "scratch"]),
    (train("model=scratch,minilm"), ["model=scratch,minilm", "--multirun"]),
    (train("dataset=imbd"), ["dataset=imbd", "did you mean imdb?"]),
    (train("masking=whole_words"), ["masking=whole_words", "did you mean whole_word?"]),
    (train("experiment=dem"), ["experiment=dem", "did you mean demo?", "reference"]),
    (train("model.layrs=2"), ["model.layrs", "did you mean layers?", "hidden_size"]),
    (train("+model.zzz=2"), ["model.zzz", "unknown option", "layers"]),
    (train("model.name=scrach"), ["model.name=scrach", "did you mean scratch?"]),
    (train("dataset.test_column=body"), ["dataset.test_column", "did you mean text_column?"]),
    (train("masking.mask_shar=1"), ["masking.mask_shar", "did you mean mask_share?"]),
    (train("chunking.overlap=1"), ["chunking.overlap", "takes no options"]),
    (train("tracking=server"), ["tracking.uri", "missing", "tracking.uri=…"]),
    (["train", "dataset=files"], ["dataset.path", "missing", "dataset.path=…"]),
    (train("trainer.name=fast"), ["trainer.name=fast", "corrected", "stock"]),
    (train("trainer.learning_rate=1"), ["trainer.learning_rate", "dial lr"]),
    (train("--bogus"), ["--bogus"]),
    (train("--cfg", "jub"), ["jub", "job"]),
    (train("--config-dir", "nowhere"), ["--config-dir nowhere", "no such folder"]),
    (train("--config-name", "predict"), ["--config-name predict", "--config-dir"]),
    (["predict", "top_q=3"], ["top_q", "did you mean top_k?"]),
    (train("heldout.shar=0.1"), ["heldout.shar", "did you mean share?"]),
    (train("heldout.dataset=imbd"), ["dataset=imbd", "did you mean imdb?"]),
    (["prepare", "chunk_sze=128"], ["chunk_sze", "did you mean chunk_size?"]),
    (["evaluate", "rum=last"], ["rum", "did you mean run?"]),
    (["ui", "prt=1"], ["prt", "did you mean port?"]),
]

TYPES: list[Row] = [
    (train("chunk_size=abc"), ["chunk_size=abc", "a whole number is needed"]),
    (train("chunk_size=12.5"), ["chunk_size=12.5", "a whole number is needed"]),
    (train("chunk_size=null"), ["chunk_size=null", "a value is needed"]),
    (train("chunk_size=[16]"), ["chunk_size=[16]", "a whole number is needed"]),
    (train("chunk_size=16,32"), ["chunk_size=16,32", "--multirun"]),
    (train("lr=fast"), ["lr=fast", "a number is needed"]),
    (train("lr=true"), ["lr=true", "a number is needed"]),
    (train("epochs=x"), ["epochs=x", "a number is needed"]),
    (train("batch_size=1.5"), ["batch_size=1.5", "a whole number is needed"]),
    (train("seed=x"), ["seed=x", "a whole number is needed"]),
    (train("weight_decay=x"), ["weight_decay=x", "a number is needed"]),
    (train("model=scratch", "model.layers=two"), ["model.layers='two'", "a whole number is needed"]),
    (train("heldout.documents=x"), ["heldout.documents=x", "a whole number is needed"]),
    (train("heldout.dataset=[1]"), ["heldout.dataset=[1]", "a text or a mapping or null is needed"]),
    (train("resume.allow=lr"), ["resume.allow=lr", "a list is needed"]),
    (train("sweep.reuse=x"), ["sweep.reuse=x", "true or false is needed"]),
    (train("dataset.path=3.5"), ["dataset.path=3.5", "no such file"]),
    (train("dataset.path=null"), ["dataset.path=None", "a text or a list is needed"]),
    (train("dataset.sample_by=word"), ["sample_by='word'", "line, paragraph, document"]),
    (["predict", "top_k=x"], ["top_k=x", "a whole number is needed"]),
    (["ui", "port=http"], ["port=http", "a whole number is needed"]),
]

NUMBERS: list[Row] = [
    *((train(f"chunk_size={n}"), [f"chunk_size={n}:", "at least 3"]) for n in (0, -5, 2)),
    *((train(f"mlm_probability={p}"), [f"mlm_probability={p}:", "between 0 and 1"]) for p in (0, 1, -0.1, 2, "nan")),
    *((train(f"{name}={n}"), [f"{name}={n}:", "greater than 0"]) for name in ("lr", "epochs") for n in (0, -1)),
    *((train(f"batch_size={n}"), [f"batch_size={n}:", "at least 1"]) for n in (0, -8)),
    (train("weight_decay=-1"), ["weight_decay=-1:", "0 or more"]),
    (train("seed=-1"), ["seed=-1:", "between 0 and 4294967295"]),
    (train("precision=fp8"), ["precision=fp8:", "auto, fp32, bf16, fp16"]),
    (train("masking.mask_share=2"), ["masking.mask_share=2", "together 1"]),
    (train("model.heads=3"), ["model.hidden_size=128", "multiple", "model.heads=3"]),
    (train("model.layers=0"), ["layers=0", "at least 1"]),
    (train("model.dropout=1"), ["dropout=1", "[0, 1)"]),
    (train("dataset.train_chunks=0"), ["dataset.train_chunks=0:", "share between 0 and 1"]),
    (train("dataset.train_chunks=1.5"), ["dataset.train_chunks=1.5:", "share between 0 and 1"]),
    (train("dataset.eval_chunks=0.2"), ["dataset.train_chunks=0.9", "dataset.eval_chunks=0.2", "exceed 1"]),
    (train("dataset.split_seed=-1"), ["dataset.split_seed=-1:", "0 or more"]),
    (train("heldout.share=1"), ["heldout.share=1:", "less than 1"]),
    (train("heldout.share=-1"), ["heldout.share=-1:", "0 or more"]),
    (train("heldout.documents=0"), ["heldout.documents=0:", "at least 1"]),
    (["prepare", "preview=-1"], ["preview=-1:", "0 or more"]),
    (["prepare", "chunk_size=2"], ["chunk_size=2:", "at least 3"]),
    (["prepare", "chunk_size=513"], ["chunk_size=513:", "at most 512"]),
    (["predict", "top_k=0"], ["top_k=0:", "at least 1"]),
    (["evaluate", "batch_size=0"], ["batch_size=0:", "at least 1"]),
    (["evaluate", "chunk_size=2"], ["chunk_size=2:", "at least 3"]),
    (["ui", "port=0"], ["port=0:", "between 1 and 65535"]),
    # above what the model can hold, judged before anything is fetched or loaded
    (["train", "chunk_size=513"], ["chunk_size=513:", "distilbert-base-uncased", "at most 512", "choose 3 to 512"]),
    (["train", "model=roberta_base", "chunk_size=514"], ["chunk_size=514:", "at most 512"]),
    (["train", "model=modernbert_base", "chunk_size=8193"], ["chunk_size=8193:", "at most 8192"]),
    (["train", "experiment=demo", "chunk_size=513"], ["chunk_size=513:", "at most 512"]),
    (train("chunk_size=600"), ["chunk_size=600:", "at most 512"]),
    (train("model.max_length=8"), ["chunk_size=16:", "at most 8"]),
    (
        ["train", "model.path=tiny", "dataset=imdb_packaged", "chunk_size=513"],
        ["chunk_size=513:", "the model in tiny", "at most 512"],
    ),
    (
        ["evaluate", "run=tiny", "dataset=files", "dataset.path=good.txt", "chunk_size=513"],
        ["chunk_size=513:", "at most 512"],
    ),
]

TEXTS: list[Row] = [
    (train("dataset.path=nope/x.txt"), ["dataset.path=nope/x.txt:", "no such file", "looked in"]),
    (train("dataset.path=god.txt"), ["dataset.path=god.txt:", "no such file", "did you mean good.txt?"]),
    (train("dataset.path="), ["dataset.path=:", "is empty", "a file, a glob or a folder"]),
    (train("dataset.path=[]"), ["dataset.path", "an empty list", "a file, a glob or a folder"]),
    (train("dataset.path=[good.txt,gone.txt]"), ["dataset.path=gone.txt:", "no such file"]),
    (train("dataset.path=empty.txt"), ["dataset.path=empty.txt:", "the file is empty"]),
    (train("dataset.path=blank.txt"), ["dataset.path=blank.txt:", "every row is empty"]),
    (train("dataset.path=header.csv"), ["dataset.path=header.csv:", "cannot be read"]),
    (train("dataset.path=*.tex"), ["dataset.path=*.tex:", "the glob matches no file"]),
    (train("dataset.path=nothing"), ["dataset.path=nothing:", "no .txt", "in this folder"]),
    (train("dataset.path=notes.pdf"), ["dataset.path=notes.pdf:", "unknown kind of file", ".jsonl, .parquet"]),
    (train("dataset.path=broken.json"), ["dataset.path=broken.json:", "cannot be read"]),
    (train("dataset.path=broken.parquet"), ["dataset.path=broken.parquet:", "cannot be read"]),
    (train("dataset.path=latin.txt"), ["dataset.path=latin.txt:", "cannot be read", "utf-8"]),
    (train("dataset.path=no_train"), ["no_train", "no split 'train'", "splits: test"]),
    (train("dataset.path=stars.csv"), ["dataset.text_column=text:", "no such column", "columns: body, stars"]),
    (
        train("dataset.path=stars.csv", "dataset.text_column=boddy"),
        ["dataset.text_column=boddy:", "did you mean body?", "columns: body, stars"],
    ),
    (
        train("dataset.path=stars.csv", "dataset.text_column=stars"),
        ["dataset.text_column=stars:", "holds int64, not text", "columns: body, stars"],
    ),
    (train("example=No mask here."), ["example='No mask here.'", "[MASK]"]),
]

MODELS: list[Row] = [
    (train("model=distilbert", "model.path=./gone"), ["model.path=./gone:", "no such folder", "owner/name"]),
    (train("model=distilbert", "model.path=nothing"), ["model.path=nothing:", "no config.json"]),
    (train("model.tokenizer=/gone"), ["model.tokenizer=/gone:", "no such folder"]),
    (train("trainer=reference", "masking=whole_word"), ["trainer.name=stock", "masking=token", "chunking=concat"]),
    # the hub does not answer
    (["train"], ["stanfordnlp/imdb", "cannot be reached", "dataset=files dataset.path=…", "experiment=demo"]),
    (
        ["train", "dataset=imdb_packaged"],
        ["distilbert/distilbert-base-uncased", "cannot be reached", "model.path=…", "experiment=demo"],
    ),
    (["train", "model=scratch", "dataset=wikitext"], ["Salesforce/wikitext", "cannot be reached", "dataset=files"]),
    (["prepare"], ["stanfordnlp/imdb", "cannot be reached", "dataset=files dataset.path=…"]),
    (train("heldout.dataset=imdb"), ["stanfordnlp/imdb", "cannot be reached"]),
    (["train", "model=scratch", "dataset.path=me/mine"], ["dataset.path=me/mine", "cannot be reached"]),
]

RUNS: list[Row] = [
    (["predict", "text=A [MASK]."], ["run=last:", "no finished run", "train one first"]),
    (["predict", "run=gone", "text=A [MASK]."], ["run=gone:", "no such run", "run id", "last"]),
    (["predict", "run=", "text=A [MASK]."], ["run=:", "no such run"]),
    (["predict", "run=running", "text=A [MASK]."], ["run=running:", "unfinished", "RUNNING"]),
    (["predict", "run=failed", "text=A [MASK]."], ["run=failed:", "unfinished", "FAILED"]),
    (["predict", "run=unsaved", "text=A [MASK]."], ["run=unsaved:", "unfinished"]),
    (["predict", "run=finished", "text=A film."], ["text='A film.':", "[MASK]"]),
    (["predict", "run=finished", "text=A [MASK].", "text="], ["text='':", "[MASK]"]),
    (["evaluate"], ["run=last:", "no finished run"]),
    (["evaluate", "run=gone"], ["run=gone:", "no such run"]),
    (["evaluate", "run=running"], ["run=running:", "unfinished", "RUNNING"]),
    (["evaluate", "run=tiny"], ["run=tiny:", "chunk_size=", "dataset="]),
    (["ui"], ["no MLflow store", "experiment=demo"]),
    (["ui", "tracking=none"], ["tracking=none", "local store"]),
    (["ui", "tracking=server", "tracking.uri=http://a:1"], ["http://a:1", "does not answer"]),
]

TARGETS: list[Row] = [
    (train("+model._target_=os.system"), ["model._target_:", "mlmx.plugins"]),
    (train("++trainer.optim._target_=os.system"), ["trainer.optim._target_:", "mlmx.plugins"]),
    (train("+trainer.hooks=[{_target_:os.system}]"), ["trainer.hooks.0._target_:", "mlmx.plugins"]),
    (train("--config-dir", "own", "model=run_code"), ["model._target_:", "mlmx.plugins"]),
    (train("--config-dir", "own", "experiment=run_code"), ["trainer.hooks.0._target_:", "mlmx.plugins"]),
]

OWN = {
    "model/run_code.yaml": "name: scratch\n_target_: os.system\n",
    "experiment/run_code.yaml": "# @package _global_\ntrainer: {hooks: [{_target_: os.system}]}\n",
}

SWEEPS: list[Row] = [
    (train("-m", "chunk_size=16,2"), ["job 1 of the sweep (chunk_size=2)", "at least 3"]),
    (train("-m", "chunk_size=16,abc"), ["job 1 of the sweep (chunk_size=abc)", "a whole number is needed"]),
    (train("lr=1e-3,0", "seed=1,2", "-m"), ["job 2 of the sweep (lr=0 seed=1)", "greater than 0"]),
    (train("-m", "model=scratch,scrach"), ["job 1 of the sweep (model=scrach)", "did you mean scratch?"]),
    (train("-m", "zzz=1,2"), ["job 0 of the sweep (zzz=1)", "zzz: unknown key"]),
    (train("-m", "dataset.path=good.txt,gone.txt"), ["job 1 of the sweep", "dataset.path=gone.txt:", "no such file"]),
    (train("-m", "lr=interval(0,1)"), ["lr=interval(0,1)", "hydra/sweeper=optuna"]),
]

# What only a library can judge, before anything is written.
LIBRARY: list[Row] = [
    (train("trainer.warmup_stesp=3"), ["trainer.warmup_stesp", "did you mean warmup_steps?"]),
    (train("+trainer.zzzzz=3"), ["trainer.zzzzz", "transformers.TrainingArguments"]),
    (train("trainer.gradient_accumulation_steps=x"), ["gradient_accumulation_steps='x'", "a whole number is needed"]),
    (train("trainer.gradient_accumulation_steps=0"), ["gradient_accumulation_steps=0:", "at least 1"]),
    (train("trainer.per_device_eval_batch_size=0"), ["per_device_eval_batch_size=0:", "at least 1"]),
    (train("trainer.dataloader_num_workers=-1"), ["dataloader_num_workers=-1:", "at least 0"]),
    (train("trainer.lr_scheduler_type=cosin"), ["cosin", "SchedulerType", "'cosine'"]),
    (train("trainer.eval_strategy=epochs"), ["epochs", "'epoch'"]),
    (train("trainer.optim=adm"), ["adm", "'adamw_torch'"]),
    (train("trainer.load_best_model_at_end=true", "trainer.save_strategy=steps"), ["load_best_model_at_end", "match"]),
    (train("dataset.path=short.txt"), ["no chunk of 16 tokens", "chunk_size", "chunking=document"]),
    (
        train("dataset.train_chunks=1000"),
        ["gives 50 chunks of 16", "dataset.train_chunks=1000", "dataset.eval_chunks=0.1", "lower", "chunk_size"],
    ),
    (
        train("dataset.train_chunks=0.5", "dataset.eval_chunks=26"),
        ["gives 50 chunks of 16", "dataset.eval_chunks=26"],
    ),
    (train("dataset.train_chunks=0.001"), ["gives 50 chunks of 16", "dataset.train_chunks=0.001"]),
    (
        train("model.max_length=16", "example='" + "very " * 20 + "good [MASK].'"),
        ["very very", "25 tokens long", "at most 16"],
    ),
    *(
        (train("model=distilbert", f"model.path={name}"), [f"model.path={name}:", "no masked language model", *words])
        for name, words in {
            "gpt2": ["a gpt2 is", "no mask token", "distilbert"],
            "gpt2_with_mask": ["a gpt2 is", "distilbert"],
            "bert_without_mask": ["no mask token", "distilbert"],
        }.items()
    ),
    (
        train("model=distilbert", "model.path=esm", "dataset.path=protein.txt", "masking=whole_word"),
        ["masking=whole_word:", "esm", "no fast tokenizer", "masking=token"],
    ),
    (train("model=distilbert", "model.path=no_weights"), ["model.path=no_weights:", "weights cannot be loaded"]),
    (["predict", "run=finished", "text=A <mask>."], ["'A <mask>.'", "[MASK]"]),
    (["predict", "run=finished", "text=[MASK]" + " very" * 600], ["603 tokens long", "at most 512"]),
    (
        ["evaluate", "run=gpt2", "dataset=files", "dataset.path=good.txt", "chunk_size=16"],
        ["gpt2", "no masked language model"],
    ),
]

JUDGED_HERE = NAMES + TYPES + NUMBERS + TEXTS + MODELS + RUNS + TARGETS + SWEEPS


@pytest.fixture
def refusal(faulty: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line in the faulty folder; returns its exit code and what it wrote to stderr."""
    monkeypatch.chdir(faulty)

    def run(arguments: Sequence[str]) -> tuple[int, str]:
        capfd.readouterr()
        return main(arguments), capfd.readouterr().err

    return run


def not_reached(*_: Any, **__: Any) -> None:
    pytest.fail("the request was let through")


def assert_one_line_with(words: list[str], stderr: str) -> None:
    assert stderr.startswith("mlmx: ")
    assert stderr.count("\n") == 1
    assert stderr.endswith("\n")
    assert [word for word in words if word not in stderr] == [], stderr


def name_of(value: Any) -> str:
    return " ".join(word[:30] for word in value if word not in LOCAL) if isinstance(value, list) else ""


@pytest.mark.parametrize(("arguments", "words"), JUDGED_HERE, ids=name_of)
def test_a_wrong_request_is_refused_in_one_line_and_leaves_nothing(
    arguments: list[str], words: list[str], refusal: Any, outputs: Path, monkeypatch: pytest.MonkeyPatch
):
    for command in COMMANDS:
        monkeypatch.setattr(f"mlmx.commands.{command}.{command}", not_reached)
    code, stderr = refusal(arguments)
    assert_one_line_with(words, stderr)
    assert code == 2
    assert not outputs.exists()


@pytest.mark.parametrize(("arguments", "words"), LIBRARY, ids=name_of)
def test_what_only_a_library_can_judge_is_refused_before_anything_is_written(
    arguments: list[str], words: list[str], refusal: Any, outputs: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mlmx.commands.train.fit", not_reached)
    code, stderr = refusal(arguments)
    assert_one_line_with(words, stderr)
    assert code == 2
    assert list(outputs.rglob("*")) == []


def test_the_rows_but_for_their_fault_are_right(refusal: Any, monkeypatch: pytest.MonkeyPatch):
    """Else a row could be refused for another reason than its own."""
    trained: list[int] = []
    monkeypatch.setattr("mlmx.commands.train.fit", lambda *parts: trained.append(1))
    monkeypatch.setattr("mlmx.commands.train.draw_plots", lambda *parts: [])
    code, _ = refusal(train("tracking=none"))
    assert (code, trained) == (0, [1])


def test_an_occupied_port_is_refused(refusal: Any, store: Path, outputs: Path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, stderr = refusal(["ui", f"port={port}"])
    assert_one_line_with([f"port={port}:", f"port={port + 1}"], stderr)
    assert code == 2
    assert [path.name for path in outputs.iterdir()] == ["mlflow.db"]


def test_standard_input_without_a_mask_is_refused(refusal: Any, monkeypatch: pytest.MonkeyPatch, outputs: Path):
    import io

    for lines, words in {"A [MASK].\nA film.\n": ["text='A film.':", "[MASK]"], "\n \n": ["no line"]}.items():
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code, stderr = refusal(["predict", "run=finished"])
        assert_one_line_with(words, stderr)
        assert code == 2
    assert list(outputs.rglob("*")) == []


def test_a_run_folder_in_use_is_refused_and_kept(refusal: Any, outputs: Path):
    used = begin_run(outputs / "used", TrainConfig(), (), {})
    before = {path.name: path.read_bytes() for path in used.folder.iterdir()}
    code, stderr = refusal(train("tracking=none", f"hydra.run.dir={used.folder}"))
    assert_one_line_with([str(used.folder), "already holds a run", "hydra.run.dir"], stderr)
    assert code == 2
    assert {path.name: path.read_bytes() for path in used.folder.iterdir()} == before


PROCESSES: list[Row] = [
    (["train"], ["stanfordnlp/imdb", "cannot be reached", "experiment=demo"]),
    (train("dataset.path=broken.json"), ["dataset.path=broken.json:", "cannot be read"]),  # the library logs it, too
    (train("model=distilbert", "model.path=gpt2"), ["model.path=gpt2:", "no masked language model"]),
]


@pytest.mark.long
@pytest.mark.parametrize(("arguments", "words"), PROCESSES, ids=name_of)
def test_a_process_writes_its_line_to_stderr_and_nothing_else(
    arguments: list[str], words: list[str], faulty: Path, outputs: Path, tmp_path: Path
):
    """The libraries write to the stderr they were imported with, which is out of sight in-process."""
    done = subprocess.run(
        [sys.executable, "-m", "mlmx", *arguments],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf")},
        cwd=faulty,
        capture_output=True,
        text=True,
        timeout=10 if arguments == ["train"] else 60,  # seconds an absent hub may take
        check=False,
    )
    assert done.returncode == 2
    assert_one_line_with(words, done.stderr)
    assert list(outputs.rglob("*")) == []
