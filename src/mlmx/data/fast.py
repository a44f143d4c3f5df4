"""tokie, an optional and much faster tokenizer: used on a corpus only after it has agreed with the reference about it.

The two know different versions of Unicode, so agreement is a matter of the corpus: what is compared is some hundreds
of its documents, every character it holds beyond printable ASCII, and texts that tokenizers stumble over.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlmx.data.hashing import batches, document_keys, hashed_order, utf8

if TYPE_CHECKING:
    from datasets import Dataset
    from tokenizers import Tokenizer

log = logging.getLogger("mlmx")

WORTH_BYTES = 2_000_000  # of text; the reference needs about half a second for them
SAMPLE_DOCUMENTS = 300
SAMPLE_CHARACTERS = 600_000  # fewer documents where they are long
PRINTABLE = bytes(range(0x20, 0x7F))
ODD_TEXTS = (
    "",
    " ",
    "\n\t\r \u00a0\u2028\u3000",
    PRINTABLE.decode(),
    "a\x00b \x01 c\x85d \ufffd \ufeff",
    "zero\u200bwidth\u200c join\u200der\u2060s, so\u00adft, \u202eright to left\u202c \u200f",
    "e\u0301 \u0301x A\u030angstro\u0308m n\u0303 \u0308 " + "a\u0300\u0301\u0302\u0303" * 20,
    "Ångström ﬁne Ⅷ ½ ß ẞ İ ı ſ ŉ ǅ ΣΑΣ ς ＦＵＬＬ１２",
    "日本語テキスト 漢字かな交じり文。中文，字 \U00020000 豈 한국어 문장",
    "العربية نص ١٢٣ شَدّة ﷺ עברית נִקּוּד हिन्दी क्षत्रिय ไทยภาษา",
    "😀👍🏽👨‍👩‍👧🇩🇪❤️ 1️⃣ 𝔘𝔫𝔦 𝟙𝟚 🏴\U000e0067\U000e0062\U000e007f",
    "don't won’t ‘q’ “q” — – … · $1,000.50 €5 £3 1/2 50% a_b a+b=c <br /><br />",
    "!!!???...---***^^~`| http://x.y/z?q=1&r=2#f user@mail.com",
    "##ing ## #ing ### un##able",
    "x" * 99 + " " + "x" * 100 + " " + "x" * 101 + " " + "é" * 101 + " " + "antidis" * 200,
    "word " * 3000,
    "中" * 2000,
)


def agreeing_ids(texts: Dataset, reference: Tokenizer) -> tuple[NDArray[np.int32], NDArray[np.int64], str] | None:
    """Documents' ids end to end, how many each has, and by what they were made; None where tokie is not for this."""
    if importlib.util.find_spec("tokie") is None or sum(utf8(batch)[0][-1] for batch in batches(texts)) < WORTH_BYTES:
        return None
    try:
        tokie: Any = importlib.import_module("tokie")
        with tempfile.TemporaryDirectory(prefix="mlmx-tokie-") as folder:
            path = f"{folder}/tokenizer.json"
            reference.save(path)
            tokenizer = tokie.Tokenizer.from_json(path)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        encode, sample = tokenizer.encode_batch_flat, _sample(texts)
        # Special tokens written out in text, and each unusual character of the corpus in three places.
        special = [token.content for token in reference.get_added_tokens_decoder().values()]
        written = [f"{t} a {t} b{t}c {t}{t} {t.lower()} [ {t.strip('[]<>')} ]" for t in special]
        characters: set[str] = set()
        for batch in batches(texts):
            characters |= set(bytes(utf8(batch)[1]).translate(None, PRINTABLE).decode())
        unusual = [f"a{c}b {c} x{c}" for c in sorted(characters)]
        probes = [*ODD_TEXTS, *written, *unusual, *sample]
        ids, lengths = encode(probes)  # end to end, and how many each has
        own = np.split(ids, np.cumsum(lengths.astype(np.int64))[:-1])
        pairs = zip(probes, own, reference.encode_batch_fast(probes, add_special_tokens=True), strict=False)
        different = (text for text, tried, right in pairs if tried.tolist() != right.ids)
        wrong = next(different, None) if len(lengths) == len(probes) else probes[0]
        if wrong is None:
            made = [encode(batch.to_pylist()) for batch in batches(texts)]
            ids = np.concatenate([some for some, _ in made], dtype=np.int32, casting="same_kind")
            lengths = np.concatenate([own for _, own in made]).astype(np.int64)
            return ids, lengths, f"tokie {importlib.metadata.version('tokie')}, checked on {len(sample)} documents"
        reason = f"it differs from tokenizers on {wrong[:40]!r}"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 (a panic inside tokie is no Exception)
        reason = f"{type(error).__name__}: {error}"
    log.info("tokie is not used for these texts, tokenizers is: %s", reason)
    return None


def _sample(texts: Dataset) -> list[str]:
    """Documents chosen by content hash, as many as the limits allow and at least one."""
    order = hashed_order(document_keys(texts))[:SAMPLE_DOCUMENTS]
    chosen = [text for batch in batches(texts.select(order)) for text in batch.to_pylist()]
    before = np.cumsum([0, *map(len, chosen)])[:-1]
    return chosen[: max(1, int((before < SAMPLE_CHARACTERS).sum()))]
