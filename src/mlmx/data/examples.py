"""Held-out sentences with one word to be filled in, the same for every run that has the same held-out documents."""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlmx.data.hashing import document_keys, hashed_order
from mlmx.data.heldout import WORD
from mlmx.data.tokens import take_whole

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+|\s*<[^<>]*>\s*|\s*\n\s*")
FEWEST_WORDS, MOST_WORDS = 6, 40
NUMBER, MOST_TOKENS = 20, 64
FEWEST_LETTERS = 4  # of a word that is asked for: shorter ones are mostly grammar
ORDER = 7  # of documents; another than theirs for the yardstick


@dataclass(frozen=True)
class Example:
    """``The acting was [MASK] throughout.``, with "superb" to be found."""

    sentence: str
    target: str
    input_ids: tuple[int, ...]  # special tokens included, the target in place
    position: int  # of the target in them; it is one token


def choose_examples(texts: Dataset, tokenizer: PreTrainedTokenizerBase) -> tuple[Example, ...]:
    """Sentences, and a word of each, chosen by hashes of what they say; one of each document before a second of any."""
    backend = take_whole(tokenizer)
    if backend is None:
        return ()  # the tokenizer does not tell where its tokens stand in the text
    order = hashed_order(document_keys(texts), ORDER)
    waiting = deque(_examples(texts, int(row), backend, str(tokenizer.mask_token)) for row in order)
    found: dict[str, Example] = {}
    while waiting and len(found) < NUMBER:
        document = waiting.popleft()
        example = next(document, None)
        if example is not None:
            found.setdefault(example.sentence, example)
            waiting.append(document)
    return tuple(found.values())


def _examples(texts: Dataset, row: int, backend: Tokenizer, mask: str) -> Iterator[Example]:
    """Those of a document, best first; nothing is looked at before it is asked for."""
    sentences = dict.fromkeys(sentence.strip() for sentence in BETWEEN_SENTENCES.split(texts[row]["text"]))
    for sentence in sorted(sentences, key=_rank):
        if mask in sentence or not FEWEST_WORDS <= len(WORD.findall(sentence)) <= MOST_WORDS:
            continue
        encoding = backend.encode(sentence, add_special_tokens=True)
        long_enough = (match for match in WORD.finditer(sentence) if len(match.group()) >= FEWEST_LETTERS)
        words = {match.span() for match in long_enough if match.group().isalpha()}
        # Some tokens hold the space before a word.
        spans = [(end - len(sentence[start:end].lstrip()), end) for start, end in encoding.offsets]
        places = [(position, *span) for position, span in enumerate(spans) if span in words]
        if places and len(encoding.ids) <= MOST_TOKENS:
            position, start, end = min(places, key=lambda place: _rank(f"{place[1]} {sentence}"))
            gapped = f"{sentence[:start]}[MASK]{sentence[end:]}"
            yield Example(gapped, sentence[start:end], tuple(map(int, encoding.ids)), position)


def _rank(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
