"""Kept tokens are the tokens, by content: made once, read by later runs, never for other texts or tokenizers."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from mlmx.commands import main
from mlmx.data.cache import TokenCache, token_cache
from mlmx.data.heldout import heldout_chunks
from mlmx.data.tokens import Tokens, kept_tokens, tokenize
from mlmx.runs.run import all_runs

TEXTS = Dataset.from_dict({"text": ["One film.", "Unbelievably good!"]})


@pytest.fixture
def makings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the documents that were tokenised, call by call."""
    calls: list[int] = []

    def counted(texts: Dataset, tokenizer: object) -> Tokens:
        calls.append(len(texts))
        return tokenize(texts, tokenizer)

    monkeypatch.setattr("mlmx.data.tokens.tokenize", counted)
    return calls


def kept(folder: Path, tokenizer, texts: Dataset = TEXTS) -> Tokens:
    """Tokens from the cache in a folder as a new process sees it."""
    with TokenCache(folder) as cache:
        tokens = kept_tokens(texts, tokenizer, cache)
        cache.keep()
    return tokens


def assert_same(one: Tokens, other: Tokens) -> None:
    for name in ("ids", "word_starts", "offsets"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    for name in ("num_prefix", "num_suffix", "tokenized_by"):
        assert getattr(one, name) == getattr(other, name)


def test_kept_tokens_are_the_same_memory_mapped_and_made_once(tmp_path: Path, tokenizer, makings: list[int]):
    made = kept(tmp_path, tokenizer)
    read = kept(tmp_path, tokenizer)
    assert_same(read, made)
    assert_same(read, tokenize(TEXTS, tokenizer))
    assert isinstance(read.ids.base, np.memmap)
    assert makings == [2]
    assert len(list(tmp_path.iterdir())) == 1, "one entry, nothing half-written beside it"


def test_kept_marks_of_held_out_words_are_the_same(tmp_path: Path, tokenizer, imdb):
    texts = imdb.select(range(20))
    for _ in range(2):
        with TokenCache(tmp_path) as cache:
            rows, own = (heldout_chunks(texts, tokenizer, 64, c) for c in (cache, None))
            cache.keep()
        assert_same(rows.tokens, own.tokens)
        assert np.array_equal(rows.chosen, own.chosen)
        assert np.array_equal(rows.word_bytes, own.word_bytes)
    assert isinstance(rows.chosen.base, np.memmap)


def test_nothing_is_written_unless_it_is_to_be_kept(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with TokenCache(tmp_path / "cache") as cache:
        kept_tokens(TEXTS, tokenizer, cache)
    assert not (tmp_path / "cache").exists()
    assert list((tmp_path / "tmp").iterdir()) == [], "the lock is gone as well"


def test_within_a_process_tokens_are_made_once_and_kept_when_a_job_gets_so_far(
    tmp_path: Path, tokenizer, makings: list[int]
):
    cache = TokenCache(tmp_path)
    with cache:
        first = kept_tokens(TEXTS, tokenizer, cache)
    with cache:
        assert kept_tokens(TEXTS, tokenizer, cache).ids is first.ids
        cache.keep()
    assert makings == [2]
    assert len(list(tmp_path.iterdir())) == 1


def test_other_texts_and_other_tokenizers_are_other_entries(tmp_path: Path, tokenizer, uncased: Path):
    from transformers import AutoTokenizer

    cased = AutoTokenizer.from_pretrained(uncased, do_lower_case=False)
    kept(tmp_path, tokenizer)
    kept(tmp_path, tokenizer, Dataset.from_dict({"text": ["One film.U", "nbelievably good!"]}))
    kept(tmp_path, cased)
    assert len(list(tmp_path.iterdir())) == 3


def flip(path: Path) -> None:
    """One bit of the last byte."""
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, halve, empty, Path.unlink])
@pytest.mark.parametrize("name", ["ids.npy", "word_starts.npy", "offsets.npy", "entry.json"])
def test_a_damaged_entry_is_made_anew(
    tmp_path: Path, tokenizer, makings: list[int], said: pytest.LogCaptureFixture, name: str, damage: Callable
):
    made = kept(tmp_path, tokenizer)
    (entry,) = tmp_path.iterdir()
    damage(entry / name)
    assert_same(kept(tmp_path, tokenizer), made)
    (line,) = [record.getMessage() for record in said.records]
    assert f"{entry}: damaged" in line
    assert "\n" not in line
    assert_same(kept(tmp_path, tokenizer), made)
    assert makings == [2, 2], "made anew once, then read"
    assert list(tmp_path.iterdir()) == [entry]


def test_what_is_started_together_tokenises_once(tmp_path: Path, tokenizer, makings: list[int]):
    """Of several that want the same tokens one makes them; the others wait until they are kept."""
    found: list[Tokens] = []
    threads = [threading.Thread(target=lambda: found.append(kept(tmp_path, tokenizer))) for _ in range(3)]
    with TokenCache(tmp_path) as first:
        made = kept_tokens(TEXTS, tokenizer, first)
        for thread in threads:
            thread.start()
        threads[0].join(timeout=0.3)
        assert found == [], "they wait"
        first.keep()
    for thread in threads:
        thread.join()
    assert makings == [2]
    for tokens in found:
        assert_same(tokens, made)


def test_whoever_waits_makes_them_if_the_first_is_refused(tmp_path: Path, tokenizer, makings: list[int]):
    thread = threading.Thread(target=kept, args=(tmp_path, tokenizer))
    with TokenCache(tmp_path) as refused:
        kept_tokens(TEXTS, tokenizer, refused)
        thread.start()
    thread.join()
    assert makings == [2, 2]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_stops_no_run(tmp_path: Path, tokenizer, said: pytest.LogCaptureFixture):
    (tmp_path / "cache").write_text("a file where the folder should be")
    kept(tmp_path / "cache", tokenizer)
    assert "cannot be kept for later runs" in said.text


# ---------------------------------------------------------------------------------------- in runs


@pytest.fixture
def dials(tiny: Path, corpus: Path) -> list[str]:
    sizes = ["dataset.train_chunks=16", "dataset.eval_chunks=8"]
    return [f"model.path={tiny}", "dataset=files", f"dataset.path={corpus}", "chunk_size=32", *sizes]


TRAINING = ["epochs=1", "tracking=none", "trainer.use_cpu=true"]


def without_speed(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(("perf/", "train/tokens"))}


@pytest.mark.parametrize("trainer", ["reference", "default"])
def test_a_prepared_run_is_the_run_without(
    dials: list[str], outputs: Path, trainer: str, makings: list[int], monkeypatch: pytest.MonkeyPatch
):
    command = ["train", f"trainer={trainer}", *dials, *TRAINING]
    assert main.main(command) == 0
    entries = sorted((outputs / "cache").iterdir())
    token_cache.cache_clear()  # as another process
    assert main.main(["prepare", *dials]) == 0
    token_cache.cache_clear()
    assert main.main(command) == 0
    assert len(makings) == 1, "the first run made them, the others read them"
    assert sorted((outputs / "cache").iterdir()) == entries
    first, prepared = (run.read_json("result.json")["metrics"] for run in all_runs())
    assert without_speed(first) == without_speed(prepared)


def test_a_sweep_reads_hashes_and_tokenises_once(dials: list[str], makings: list[int], monkeypatch: pytest.MonkeyPatch):
    from mlmx.data import hashing, texts

    read: list[Path] = []
    hashed: list[int] = []
    monkeypatch.setattr(texts, "_read", lambda *args, own=texts._read: read.append(args[0]) or own(*args))
    monkeypatch.setattr(hashing, "batches", lambda some, own=hashing.batches: hashed.append(len(some)) or own(some))
    texts._read_files.cache_clear()
    assert main.main(["train", "-m", *dials, *TRAINING, "lr=1e-5,1e-4"]) == 0
    assert len(all_runs()) == 2
    assert len(read) == len(makings) == 1
    assert sorted(hashed) == [4, 4, 196, 200], "all texts, to draw the held-out ones by content, then each side"


def test_a_refusal_after_tokenising_leaves_nothing(
    dials: list[str], outputs: Path, makings: list[int], capsys: pytest.CaptureFixture[str]
):
    for refused in ("dataset.train_chunks=99999", "example=a"):
        assert main.main(["train", *dials, *TRAINING, refused]) == 2
    assert len(makings) == 1, "made, and at hand for the next try in this process"
    assert not outputs.exists()
