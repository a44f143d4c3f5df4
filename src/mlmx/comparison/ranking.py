"""Rows side by side: what varies, which may be ranked together, and by how much each differs from the best."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mlmx.comparison.rows import Row, documents_of, rows_for
from mlmx.config.errors import RequestError, did_you_mean
from mlmx.evaluation.bootstrap import Difference, DocumentSums, Resampled, resampled
from mlmx.evaluation.metrics import higher_is_better
from mlmx.runs import identity
from mlmx.runs.run import Run

YARDSTICK, ACROSS_TOKENIZERS, OWN = "heldout/loss", "heldout/bits_per_byte", "eval/loss"
# What two protocols, or two sets of validation chunks, may differ in; the first that differs explains those after it.
IN_WORDS = {
    "documents": "the choice of held-out documents",
    "tokenizer": "the tokenizer",
    "vocabulary": "the tokenizer's vocabulary",
    "special_tokens": "the tokenizer's set of special tokens",
    "tokens": "how the documents are split into tokens",
    "rate": "the share of targets",
    "shares": "what stands in the targets' place",
    "version": "the version of the draws",
    "chunks": "the set of validation chunks",
    "mlm_probability": "mlm_probability",
    "seed": "the seed of the masks",
}
EXPLAINED_BY = {"tokens": ("documents", "tokenizer", "vocabulary")}
NOT_PART_OF_IT = ("source", "number")


@dataclass(frozen=True)
class Group:
    """Finished runs that may be ranked together, best first."""

    key: str  # their protocol, or another name of what they were measured on
    parts: dict[str, Any]  # what that is made of
    rows: list[Row]
    best: Row  # the one that the others are compared with


@dataclass(frozen=True)
class Table:
    """Runs side by side."""

    rows: list[Row]  # best first within a group, the largest group first, what is not ranked last
    keys: list[str]  # dials that vary
    groups: list[Group]  # the ranked rows, by what they were measured on
    differences: dict[str, Difference]  # of each row's ``heldout/loss`` to the best of its group, paired, by `Row.name`
    sort: str  # what rows are sorted by
    judge: str  # what decides which is the best
    refusal: str  # why not all of them are ranked together, in one sentence; empty where they are

    @property
    def best(self) -> Row | None:
        """The best of all; None where the runs are of several groups."""
        return self.groups[0].best if len(self.groups) == 1 else None

    @property
    def unranked(self) -> list[Row]:
        """What has not finished, or was measured on nothing that others were."""
        return [row for row in self.rows if self.standing(row) == "unranked"]

    def standing(self, row: Row) -> Literal["best", "ranked", "unranked"]:
        """Whether a row is the best of its group, one of the others, or in none."""
        if any(row is group.best for group in self.groups):
            return "best"
        return "ranked" if any(row is one for group in self.groups for one in group.rows) else "unranked"

    @property
    def alike(self) -> list[Row]:
        """The rows whose curves may be drawn together: all that were measured as the largest group was."""
        if not self.groups:
            return self.rows
        best = self.groups[0].best
        if self.curve == YARDSTICK:
            return [row for row in self.rows if row.protocol == best.protocol]
        return [row for row in self.rows if row.validation == best.validation]

    @property
    def curve(self) -> str:
        """The loss that learning curves are drawn of."""
        return YARDSTICK if any(YARDSTICK in row.curves for row in self.rows) else OWN


def tabulate(
    runs: Sequence[Run],
    sort: str = YARDSTICK,  # from its best value; with ``-`` before it from the highest, also if that is not known here
    keys: Sequence[str] | None = None,  # dials to show, also groups (``model``); else those that vary
    failures: Mapping[Path, str] | None = None,  # why jobs failed, by their folders, which may not be there
) -> Table:
    """Read runs and set them side by side; `RequestError` where none has the metric."""
    rows = rows_for(runs, failures or {})
    chosen = list(keys) if keys is not None else varying(rows)
    rows = [replace(row, varies={key: value for key in chosen for value in _value(row, key)}) for row in rows]
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    metric = sort.removeprefix("-")
    if metric not in names and metric != YARDSTICK:
        known = f"{did_you_mean(sort, names)} (known: {', '.join(list(names)[:20]) or 'none'})"
        raise RequestError(f"sort={sort}: none of these runs has such a metric{known}")
    if metric not in names and OWN in names:
        metric = OWN
    place = partial(_place, metric=metric, highest_first=sort.startswith("-") or higher_is_better(metric))
    judge = ACROSS_TOKENIZERS if metric == ACROSS_TOKENIZERS else YARDSTICK if _have(rows, YARDSTICK) else OWN
    samples = {} if judge == OWN else _samples(rows)
    intervals = {name: drawn.interval(at) for name, (drawn, at) in samples.items()}
    alike: dict[str, tuple[dict[str, Any], list[Row]]] = {}
    rest = []
    for row in [replace(row, interval=intervals.get(row.name)) for row in rows]:
        if measured := _measured_on(row, judge):
            alike.setdefault(measured[0], (measured[1], []))[1].append(row)
        else:
            rest.append(row)
    groups: list[Group] = []
    differences: dict[str, Difference] = {}
    for key, (parts, those) in alike.items():
        those.sort(key=place)
        best = min(those, key=partial(_place, metric=judge))
        groups.append(Group(key, parts, those, best))
        drawn, of_best = samples.get(best.name, (None, 0))
        for row in those:
            own, at = samples.get(row.name, (None, 0))
            if drawn is not None and own is drawn and row is not best:
                differences[row.name] = drawn.difference(at, of_best)
    groups.sort(key=lambda group: (-len(group.rows), _place(group.best, judge)))
    rest.sort(key=lambda row: (row.protocol or "~", place(row)))
    ordered = [row for group in groups for row in group.rows] + rest
    return Table(ordered, chosen, groups, differences, metric, judge, _refusal(groups, judge))


def varying(rows: Sequence[Row]) -> list[str]:
    """Dials that are not the same in all configs that could be read, in the order of a config."""
    known = [row.dials for row in rows if row.dials]
    found = {key for dials in known[1:] for key in identity.differences(known[0], dials)}
    order = dict.fromkeys(key for dials in known for key in dials)
    return [key for key in order if key in found]


def _value(row: Row, key: str) -> list[Any]:
    """The value of a dial or the option of a group, as a list of one; none where it is not known."""
    if key in row.dials:
        return [row.dials[key]]
    options = [row.choices.get(key), row.dials.get(f"{key}.path"), row.dials.get(f"{key}.name")]
    return [option for option in options if option is not None][:1]


def _have(rows: Iterable[Row], metric: str) -> bool:
    return any(math.isfinite(row.value(metric)) for row in rows)


def _place(row: Row, metric: str, highest_first: bool = False) -> float:
    """Where a row stands when sorted; what has no number stands last."""
    value = row.value(metric)
    if math.isnan(value):
        return math.inf
    return -value if highest_first else value


def _samples(rows: Iterable[Row]) -> dict[str, tuple[Resampled, int]]:
    """Bootstrap samples of rows that scored the same targets: by a row's name those it is in, and its place there."""
    same: list[tuple[str, list[str], list[DocumentSums]]] = []
    for row in rows:
        documents = documents_of(row) if row.status == "FINISHED" and row.protocol else None
        if documents is None or row.protocol is None:
            continue
        for protocol, names, others in same:
            if protocol == row.protocol and others[0].same_targets(documents):
                names.append(row.name)
                others.append(documents)
                break
        else:
            same.append((row.protocol, [row.name], [documents]))
    drawn = [(names, resampled(those)) for _, names, those in same]
    return {name: (samples, place) for names, samples in drawn for place, name in enumerate(names)}


def _measured_on(row: Row, judge: str) -> tuple[str, dict[str, Any]] | None:
    """What a finished run was measured on, as a name that is that of all runs it may be ranked with."""
    if row.status != "FINISHED" or not math.isfinite(row.value(judge)):
        return None
    name = partial(json.dumps, sort_keys=True, default=str)
    if judge == OWN:
        return (name(row.validation), row.validation) if row.validation else None
    texts = {key: row.parts.get(key) for key in ("documents", "rate", "version")}
    if judge == ACROSS_TOKENIZERS and texts["documents"]:
        return name(texts), texts | {key: row.parts.get(key) for key in NOT_PART_OF_IT}
    return (row.protocol, row.parts) if row.protocol else None


def _refusal(groups: Sequence[Group], judge: str) -> str:
    if len(groups) < 2:
        return ""
    first, reasons = groups[0], []
    for group in groups[1:]:
        reasons += [reason for reason in what_differs(first.parts, group.parts) if reason not in reasons]
    because = " and ".join(reasons) or "something that was not recorded"
    because += " differ" if len(reasons) > 1 else " differs"
    same_texts = len({str(group.parts.get("documents")) for group in groups}) == 1
    if judge == YARDSTICK and same_texts and all(_have(group.rows, ACROSS_TOKENIZERS) for group in groups):
        because += f"; sort={ACROSS_TOKENIZERS} compares across tokenizers"
    return f"these runs were not all measured alike and are ranked apart: {because}"


def what_differs(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In words, what two protocols differ in as far as both tell of it.

    >>> what_differs({"documents": "a", "tokens": "b", "rate": 0.15}, {"documents": "c", "tokens": "d", "rate": 0.15})
    ['the choice of held-out documents']
    """
    keys = [key for key in [*IN_WORDS, *one] if key in one and key in other and key not in NOT_PART_OF_IT]
    found = [key for key in dict.fromkeys(keys) if one[key] != other[key]]
    told = [key for key in found if not set(EXPLAINED_BY.get(key, ())) & set(found)]
    return [IN_WORDS.get(key, key) for key in told]
