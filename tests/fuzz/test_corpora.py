"""Whatever stands in a corpus: it is refused in one line that names it, or all of it is accounted for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlmx.data import concat, document, files, tokenize
from mlmx.runs import all_runs
from tests.fuzz.harness import Bench, Ending

PLAIN = [f"A film that I rented once, and number {number} of many." for number in range(60)]
WHOLE = "A film that I rented once. " * 3


def jsonl(texts: list[Any]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


RIGHT: dict[str, tuple[str, bytes]] = {
    "empty documents": ("a.jsonl", jsonl(["", *PLAIN, "", " \t "])),
    "NUL bytes": ("a.jsonl", jsonl(["one\x00two\x00", *PLAIN])),
    "only emoji": ("a.jsonl", jsonl(["😀👨‍👩‍👧🏳️‍🌈" * 20] * 40)),
    "right to left": ("a.jsonl", jsonl(["שלום עולם مرحبا بالعالم \u202eabc\u202c" * 5] * 40)),
    "only special tokens": ("a.jsonl", jsonl(["[MASK] [CLS] [SEP]", *PLAIN])),
    "a line of 10 MB": ("a.txt", b"something " * 1_000_000 + b"\n" + "\n".join(PLAIN).encode()),
    "one word of 1 MB": ("a.txt", b"x" * 1_000_000 + b"\n" + "\n".join(PLAIN).encode()),
    "a byte order mark": ("a.txt", b"\xef\xbb\xbf" + "\n".join(PLAIN).encode()),
    "carriage returns": ("a.txt", "\r\n".join(PLAIN).encode()),
    "many tiny documents": ("a.txt", b"a\n" * 20_000),
    "nested JSON beside the text": (
        "a.jsonl",
        "".join(json.dumps({"text": text, "more": {"a": [1, {"b": []}]}}) + "\n" for text in PLAIN).encode(),
    ),
}
WRONG: dict[str, tuple[str, bytes, str]] = {
    "lone surrogates": ("a.jsonl", b'{"text": "a \\ud800 b"}\n' + jsonl(PLAIN), "a.jsonl"),
    "zero rows": ("a.jsonl", b"", "a.jsonl"),
    "zero bytes of text": ("a.txt", b"", "a.txt"),
    "invalid UTF-8": ("a.txt", b"caf\xe9 \xff\xfe\n" * 50, "a.txt"),
    "no such column": ("a.jsonl", b'{"body": "one"}\n' * 50, "text"),
    "numbers for texts": ("a.jsonl", b'{"text": 5}\n' * 50, "text"),
    "lists for texts": ("a.jsonl", b'{"text": ["a"]}\n' * 50, "text"),
    "no JSON": ("a.jsonl", b'{"text": "a"\n' * 50, "a.jsonl"),
    "no parquet": ("a.parquet", b"PAR1 nothing", "a.parquet"),
    "only nulls": ("a.jsonl", b'{"text": null}\n' * 50, "text"),
    "one short document": ("a.txt", b"One.\n", "chunk"),
    "only white space": ("a.txt", b"   \n\t\n" * 50, ""),
    "an archive": ("a.zip", b"PK\x03\x04" + b"0" * 100, "a.zip"),
    "an unknown kind": ("a.docx", b"text", "a.docx"),
}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    (tmp_path / "work").mkdir()
    return Bench(tmp_path / "work", tmp_path / "outputs")


def prepared(bench: Bench, name: str, contents: bytes) -> Ending:
    (bench.folder / name).write_bytes(contents)
    sizes = ["chunk_size=16", "dataset.eval_chunks=0.1", "dataset.train_chunks=0.9", "heldout.documents=4"]
    return bench.run(["prepare", "model=scratch", "dataset=files", f"dataset.path={name}", *sizes])


@pytest.mark.parametrize("kind", RIGHT)
def test_an_odd_corpus_is_right(kind: str, bench: Bench):
    ending = prepared(bench, *RIGHT[kind])
    assert ending.code == 0, ending
    assert "Traceback" not in ending.out + ending.err


@pytest.mark.parametrize("kind", WRONG)
def test_a_corpus_that_is_none_is_refused_by_name(kind: str, bench: Bench):
    name, contents, named = WRONG[kind]
    ending = prepared(bench, name, contents)
    assert ending.code == 2, ending
    assert ending.err.startswith("mlmx: ")
    assert ending.err.count("\n") == 1
    assert named in ending.err
    assert ending.written == []


def test_a_folder_and_a_file_that_is_not_there_are_refused(bench: Bench):
    (bench.folder / "folder").mkdir()
    for path in ("folder", "nowhere.txt", "*.nothing"):
        ending = bench.run(["prepare", "model=scratch", "dataset=files", f"dataset.path={path}"])
        assert (ending.code, ending.err.count("\n")) == (2, 1), ending
        assert path in ending.err


def test_an_odd_corpus_trains(bench: Bench):
    (bench.folder / "a.jsonl").write_bytes(jsonl(["", "one\x00two", "😀" * 30, "[MASK]", "x" * 50_000, *PLAIN]))
    tiny = ["model=scratch", "model.layers=1", "model.hidden_size=16", "model.heads=1", "chunk_size=16", "epochs=1"]
    corpus = ["dataset=files", "dataset.path=a.jsonl", "heldout.documents=4", "tracking=none"]
    ending = bench.run(["train", *tiny, *corpus])
    assert ending.code == 0, ending
    assert not all_runs() or all_runs()[-1].status == "FINISHED"


TEXTS = st.lists(st.text(max_size=60), min_size=1, max_size=12)
QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@given(texts=TEXTS)
@example(texts=["\x00", "\u2028", "[SEP]", "e\u0301"])
@QUICK
def test_no_token_is_lost_or_invented(texts: list[str], tokenizer, tmp_path: Path):
    """Documents of any characters: the flat array is their tokens end to end, and chunks are its rows."""
    read = read_back(texts, tmp_path)
    tokens = tokenize(read, tokenizer)
    assert len(tokens.offsets) == len(read) + 1
    for number, text in enumerate(read["text"]):
        own = tokens.ids[tokens.offsets[number] : tokens.offsets[number + 1]]
        assert own.tolist() == tokenizer(text, truncation=False)["input_ids"]
    for chunking in (concat, document):
        check_rows(chunking, tokens)


def read_back(texts: list[str], folder: Path) -> Any:
    path = folder / "texts.jsonl"
    path.write_bytes(jsonl([*texts, "a film"]))
    read = files(path=str(path))
    return read["train"] if isinstance(read, dict) else read


def check_rows(chunking: Callable[..., Any], tokens: Any) -> None:
    chunks = chunking(tokens, 8)
    sizes = [len(chunks[row]["input_ids"]) for row in range(len(chunks))]
    assert all(0 < size <= 8 for size in sizes)
    assert sum(sizes) <= len(tokens.ids) + 2 * len(sizes)
