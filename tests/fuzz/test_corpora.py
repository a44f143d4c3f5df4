"""Whatever stands in a corpus: it is refused in one line that names it, or all of it is accounted for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow import parquet

from mlmx.data.chunks import DOCUMENTS_PER_GROUP, Chunks, concat, document
from mlmx.data.texts import files
from mlmx.data.tokens import tokenize
from mlmx.runs.run import all_runs
from tests.fuzz.harness import Bench, Ending, complaint, examples

PLAIN = [f"A film that I rented once, and number {number} of many." for number in range(60)]


def jsonl(texts: list[Any], **more: Any) -> bytes:
    return "".join(json.dumps({"text": text, **more}) + "\n" for text in texts).encode()


def csv(texts: list[str]) -> bytes:
    return "".join('"' + text.replace('"', '""') + '"\n' for text in ["text", *texts]).encode()


# A file's name and contents, and how many documents it has.
RIGHT: dict[str, tuple[str, bytes, int]] = {
    "empty documents": ("a.jsonl", jsonl(["", *PLAIN, "", " \t ", "\u3000"]), 60),
    "nulls": ("a.jsonl", jsonl([None, *PLAIN, None]), 60),
    "NUL bytes": ("a.jsonl", jsonl(["one\x00two\x00", *PLAIN]), 61),
    "only emoji": ("a.jsonl", jsonl(["😀👨‍👩‍👧🏳️‍🌈" * 20] * 40), 40),
    "right to left": ("a.jsonl", jsonl(["שלום עולם مرحبا بالعالم \u202eabc\u202c" * 5] * 40), 40),
    "a document of special tokens": ("a.jsonl", jsonl(["[MASK] [CLS] [SEP]", *PLAIN]), 61),
    "nothing but special tokens": ("a.jsonl", jsonl(["[MASK] [CLS] [SEP]"] * 60), 60),
    "a line of 10 MB": ("a.txt", b"something " * 1_000_000 + b"\n" + "\n".join(PLAIN).encode(), 61),
    "one word of 1 MB": ("a.txt", b"x" * 1_000_000 + b"\n" + "\n".join(PLAIN).encode(), 61),
    "a byte order mark": ("a.txt", b"\xef\xbb\xbf" + "\n".join(PLAIN).encode(), 60),
    "a byte order mark before a header": ("a.csv", b"\xef\xbb\xbf" + csv(PLAIN), 60),
    "carriage returns": ("a.txt", "\r\n".join(PLAIN).encode(), 60),
    "many tiny documents": ("a.txt", b"a\n" * 20_000, 20_000),
    "nested JSON beside the text": ("a.jsonl", jsonl(PLAIN, more={"a": [1, {"b": []}]}), 60),
    "a column that changes its kind": ("a.jsonl", jsonl(PLAIN[:30], n=1) + jsonl(PLAIN[30:], n="one"), 60),
    "line breaks in quotes": ("a.csv", csv([text + '\n"so"\n' for text in PLAIN]), 60),
    "texts that look like nothing": (
        "a.csv",
        csv([*PLAIN, "NA", "null", "None", "nan", "", "n/a"]),
        65,
    ),
    "one document of many chunks": ("a.txt", b"One of many words. " * 200, 1),
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
    "UTF-16": ("a.txt", "\n".join(PLAIN).encode("utf-16"), "a.txt"),
    "two encodings": ("a.txt", "\n".join(PLAIN).encode() + "\nsch\u00f6n".encode("latin-1"), "a.txt"),
    "JSON nested a thousand times": ("a.jsonl", b'{"text": ' + b"[" * 1000 + b"]" * 1000 + b"}\n", "a.jsonl"),
    "JSON nested without end": ("a.jsonl", b'{"text": ' + b"[" * 100_000, "a.jsonl"),
    "a key twice": ("a.jsonl", b'{"text": "a", "text": "b"}\n' * 50, "a.jsonl"),
    "NUL bytes for JSON": ("a.jsonl", b"\x00" * 5000, "a.jsonl"),
    "commas without quotes": ("a.csv", "\n".join(["text", *PLAIN]).encode(), "quotes"),
    "more cells than columns": ("a.csv", b"text\n" + b"a,b,c\n" * 50, "a.csv"),
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


def check_report(report: dict[str, dict[str, Any]], documents: int, size: int) -> None:
    """Every document is trained on or held out, every token is in a chunk or dropped, every chunk in a split."""
    corpus, train, evaluation = report["corpus"], report["train"], report["eval"]
    held = report.get("heldout", {"documents": 0})
    assert corpus["documents"] + held["documents"] == documents
    assert corpus["chunks"] * size + corpus["dropped_tokens"] == corpus["tokens"]
    assert corpus["dropped_tokens"] < size * -(-corpus["documents"] // DOCUMENTS_PER_GROUP)
    assert train["chunks"] + evaluation["chunks"] == corpus["chunks"]
    assert train["tokens"] + evaluation["tokens"] == corpus["chunks"] * size


@pytest.mark.parametrize("kind", RIGHT)
def test_an_odd_corpus_is_right(kind: str, bench: Bench):
    name, contents, documents = RIGHT[kind]
    ending = prepared(bench, name, contents)
    assert (ending.code, ending.err) == (0, ""), ending
    report, _ = json.JSONDecoder().raw_decode(ending.out[ending.out.index("{") :])
    check_report(report, documents, 16)


@pytest.mark.parametrize("kind", WRONG)
def test_a_corpus_that_is_none_is_refused_by_name(kind: str, bench: Bench):
    name, contents, named = WRONG[kind]
    ending = prepared(bench, name, contents)
    assert ending.code == 2, ending
    assert ending.err.startswith("mlmx: ")
    assert ending.err.count("\n") == 1
    assert named in ending.err
    assert ending.written == []


def test_what_is_no_file_is_refused(bench: Bench):
    (bench.folder / "folder").mkdir()
    (bench.folder / "loop.txt").symlink_to("loop.txt")
    os.mkfifo(bench.folder / "pipe.txt")
    for path in ("folder", "nowhere.txt", "*.nothing", "loop.txt", "pipe.txt", "good.txt/more.txt"):
        ending = bench.run(["prepare", "model=scratch", "dataset=files", f"dataset.path={path}"])
        assert (ending.code, ending.err.count("\n")) == (2, 1), ending
        assert path in ending.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_refused(bench: Bench):
    (bench.folder / "a.txt").touch(mode=0o000)
    ending = prepared(bench, "a.txt", b"A film.\n" * 60)
    assert (ending.code, ending.err.count("\n")) == (2, 1), ending


COLUMNS: dict[str, tuple[Any, bool]] = {
    "texts": (pa.array(PLAIN), True),
    "large texts": (pa.array(PLAIN, pa.large_string()), True),
    "texts and nulls": (pa.array([*PLAIN, None]), True),
    "a dictionary": (pa.array(PLAIN).dictionary_encode(), True),
    "views": (pa.array(PLAIN, pa.string_view()), True),
    "bytes": (pa.array([text.encode() for text in PLAIN]), False),
    "times": (pa.array([0] * 60, pa.timestamp("s")), False),
    "structs": (pa.array([{"text": text} for text in PLAIN]), False),
    "lists": (pa.array([[text] for text in PLAIN]), False),
    "no row": (pa.array([], pa.string()), False),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_a_column_of_any_type_is_right_or_refused(kind: str, bench: Bench):
    column, is_text = COLUMNS[kind]
    parquet.write_table(pa.table({"text": column}), bench.folder / "made.parquet")
    ending = prepared(bench, "a.parquet", (bench.folder / "made.parquet").read_bytes())
    assert complaint(ending) is None, ending
    assert ending.code == (0 if is_text else 2), ending


def test_an_odd_corpus_trains(bench: Bench):
    (bench.folder / "a.jsonl").write_bytes(jsonl(["", "one\x00two", "😀" * 30, "[MASK]", "x" * 50_000, *PLAIN]))
    tiny = ["model=scratch", "model.layers=1", "model.hidden_size=16", "model.heads=1", "chunk_size=16", "epochs=1"]
    corpus = ["dataset=files", "dataset.path=a.jsonl", "heldout.documents=4", "tracking=none"]
    ending = bench.run(["train", *tiny, *corpus])
    assert ending.code == 0, ending
    [run] = all_runs()
    assert run.status == "FINISHED"
    check_report(run.read_json("data.json"), 64, 16)


# What people, tokenizers and files give a meaning to, and any other character.
PIECES = [
    "[MASK]",
    "[CLS]",
    "[SEP]",
    "[UNK]",
    "##ing",
    " ",
    "\t",
    "\n",
    "\x00",
    "\ufeff",
    "\u200b",
    "\u202e",
    "e\u0301",
    "😀",
    "中",
    "שלום",
]
TEXTS = st.lists(
    st.text(max_size=60)
    | st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
    | st.sampled_from(["", " ", "\x85"]),
    min_size=1,
    max_size=12,
)


@given(texts=TEXTS, size=st.integers(3, 40))
@example(texts=["\x00", "\u2028", "[SEP]", "e\u0301"], size=8)
@example(texts=["\x1f", "\x1c a", " \x1f"], size=3)
@examples(40)
def test_no_token_is_lost_or_invented(texts: list[str], size: int, tokenizer: Any, tmp_path: Path):
    check_accounts(texts, size, tokenizer, tmp_path)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@given(texts=TEXTS, size=st.integers(3, 40))
@examples(2000)
def test_no_token_is_lost_or_invented_many_times(texts: list[str], size: int, tokenizer: Any, tmp_path: Path):
    check_accounts(texts, size, tokenizer, tmp_path)


def check_accounts(texts: list[str], size: int, tokenizer: Any, folder: Path) -> None:
    """Documents of any characters: those with text, in order; their tokens end to end; chunks are these, cut."""
    path = folder / "texts.jsonl"
    path.write_bytes(jsonl([*texts, "a film"]))
    read = files(path=str(path))["train"]
    assert read["text"] == [text for text in [*texts, "a film"] if text.strip()]
    tokens = tokenize(read, tokenizer)
    own = [tokenizer(text, truncation=False)["input_ids"] for text in read["text"]]
    assert [part.tolist() for part in np.split(tokens.ids, tokens.offsets[1:-1])] == own
    flat = tokens.ids[: len(tokens.ids) // size * size]
    assert rows_of(concat(tokens, size)) == flat.reshape(-1, size).tolist()
    begin, *_, end = own[0]
    assert rows_of(document(tokens, size)) == [
        [begin, *inside[first : first + size - 2], end]
        for _, *inside, _ in own
        for first in range(0, len(inside), size - 2)
    ]


def rows_of(chunks: Chunks) -> list[list[int]]:
    return [chunks[row]["input_ids"].tolist() for row in range(len(chunks))]
