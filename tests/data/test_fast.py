"""tokie makes tokens only where it makes the reference's tokens; any doubt, and the reference does."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pytest
from datasets import Dataset

from mlmx.data import fast
from mlmx.data.tokens import reference_version, tokenize

WORDS = ["a", "great", "film,", "unbelievably", "so;", "I", "rented", "it", "twice"]
TEXTS = [" ".join(WORDS[: 2 + number % 8]) + f" {number}" for number in range(400)] + ["naïve café"]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A corpus small enough for a test, and taken for one that is worth tokie."""
    monkeypatch.setattr(fast, "WORTH_BYTES", 1)
    return Dataset.from_dict({"text": TEXTS})


class Panic(BaseException):
    """What a panic in Rust becomes is no Exception."""


def stand_in(monkeypatch: pytest.MonkeyPatch, reference, wrong) -> list[int]:
    """A tokie that does as the reference, but for what ``wrong(text, ids)`` makes of it; returns its batch sizes."""
    batches: list[int] = []

    class Tokenizer:
        @staticmethod
        def from_json(path: str) -> Tokenizer:
            assert path.endswith("tokenizer.json")
            return Tokenizer()

        def no_truncation(self) -> None: ...

        def no_padding(self) -> None: ...

        def encode_batch_flat(self, texts: list[str], add_special_tokens: bool = True):
            batches.append(len(texts))
            right = [encoding.ids for encoding in reference.encode_batch(texts)]
            rows = [wrong(text, ids) for text, ids in zip(texts, right, strict=True)]
            return np.concatenate(rows).astype(np.uint32), np.array([len(row) for row in rows], np.uint64)

    module = ModuleType("tokie")
    module.__spec__ = ModuleSpec("tokie", None)
    module.Tokenizer = Tokenizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tokie", module)
    monkeypatch.setattr(fast.importlib.metadata, "version", lambda name: "9.9")
    return batches


def panicking(text: str, ids: list[int]) -> list[int]:
    raise Panic("index out of bounds")


def failing(text: str, ids: list[int]) -> list[int]:
    raise ValueError("unsupported model")


# In the corpus the letter is in one document; alone between others it is a probe.
WRONG = {
    "one sampled document": (lambda text, ids: ids[:-1] if text == SAMPLED else ids, "differs from tokenizers on"),
    "a character of the corpus": (lambda text, ids: [1] if text == "aïb ï xï" else ids, "'aïb ï xï'"),
    "a special token in text": (lambda text, ids: [1, *ids] if "[MASK]" in text else ids, "[MASK]"),
    "an empty text": (lambda text, ids: ids or [] if text else [], "on ''"),
    "an exception": (failing, "ValueError: unsupported model"),
    "a panic": (panicking, "Panic: index out of bounds"),
}
SAMPLED = fast._sample(Dataset.from_dict({"text": TEXTS}))[17]


@pytest.mark.parametrize("case", WRONG)
def test_any_difference_or_failure_leaves_it_to_the_reference_and_says_so(
    texts: Dataset, tokenizer, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, case: str
):
    wrong, words = WRONG[case]
    right = tokenize(texts, tokenizer)
    said.clear()
    stand_in(monkeypatch, tokenizer.backend_tokenizer, wrong)
    made = tokenize(texts, tokenizer)
    assert made.tokenized_by == reference_version()
    assert np.array_equal(made.ids, right.ids)
    (line,) = [record.getMessage() for record in said.records]
    assert "tokie is not used for these texts, tokenizers is" in line
    assert words in line
    assert "\n" not in line


def test_where_it_agrees_it_makes_the_tokens_and_is_named(
    texts: Dataset, tokenizer, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    batches = stand_in(monkeypatch, tokenizer.backend_tokenizer, lambda text, ids: ids)
    made = tokenize(texts, tokenizer)
    assert made.tokenized_by == "tokie 9.9, checked on 300 documents"
    assert batches[1:] == [401], "one batch to check, then the corpus"
    assert said.records == []
    monkeypatch.setattr(fast, "WORTH_BYTES", 10**9)
    reference = tokenize(texts, tokenizer)
    assert reference.tokenized_by == reference_version()
    for name in ("ids", "word_starts", "offsets"):
        assert np.array_equal(getattr(made, name), getattr(reference, name))
        assert getattr(made, name).dtype == getattr(reference, name).dtype


def test_without_it_and_for_few_texts_the_reference_is_used_and_nothing_said(
    texts: Dataset, tokenizer, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    batches = stand_in(monkeypatch, tokenizer.backend_tokenizer, lambda text, ids: ids)
    monkeypatch.setattr(fast, "WORTH_BYTES", 10**6)
    assert tokenize(texts, tokenizer).tokenized_by == reference_version()
    assert batches == []
    monkeypatch.setattr(fast, "WORTH_BYTES", 1)
    monkeypatch.setattr(fast.importlib.util, "find_spec", lambda name: None)
    assert tokenize(texts, tokenizer).tokenized_by == reference_version()
    assert said.records == []


def test_the_sample_is_a_matter_of_content_and_bounded(monkeypatch: pytest.MonkeyPatch):
    forwards, backwards = (Dataset.from_dict({"text": some}) for some in (TEXTS, TEXTS[::-1]))
    assert fast._sample(forwards) == fast._sample(backwards)
    assert len(fast._sample(forwards)) == fast.SAMPLE_DOCUMENTS
    monkeypatch.setattr(fast, "SAMPLE_CHARACTERS", 100)
    assert 1 < len(fast._sample(forwards)) < 60
    assert len(fast._sample(Dataset.from_dict({"text": ["x" * 1000]}))) == 1


def test_tokie_itself_agrees_on_real_reviews(imdb, tokenizer):
    pytest.importorskip("tokie")
    some = imdb.select(range(2500))
    found = fast.agreeing_ids(some, tokenizer.backend_tokenizer)
    assert found is not None
    ids, lengths, by = found
    assert by.startswith("tokie ")
    right = tokenize(Dataset.from_dict({"text": some[:1400]["text"]}), tokenizer)
    assert right.tokenized_by == reference_version(), "too few texts for tokie"
    assert np.array_equal(ids[: len(right.ids)], right.ids)
    assert np.array_equal(lengths[:1400], np.diff(right.offsets))
