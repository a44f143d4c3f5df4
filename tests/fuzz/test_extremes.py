"""Values at the edge of what a number can be, through to the library that meets them: right, refused, or failed."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmx.config.errors import RequestError
from mlmx.training.arguments import SET_BY, training_arguments
from tests.fuzz.harness import Bench, examples, misspoken
from tests.fuzz.strategies import LOCAL

TINY = [*LOCAL, "model.layers=1", "model.hidden_size=8", "model.heads=1", "epochs=1", "heldout.share=0"]
EXTREMES = [
    ["lr=1e300"],
    ["lr=1e-300"],
    ["epochs=1e-9"],
    ["weight_decay=1e300"],
    ["batch_size=1000000"],
    ["mlm_probability=0.999999"],
    ["seed=4294967295"],
    ["dataset.split_seed=" + str(10**30)],
    ["dataset.train_chunks=1e300"],
    ["heldout.documents=" + str(10**30), "heldout.share=0.5"],
    ["masking=span", "masking.max_words=" + str(10**30)],
    ["masking=span", "masking.geometric_p=1e-320"],
    ["masking.final_probability=1e-300"],
    ["trainer.per_device_eval_batch_size=2147483647"],
    ["trainer.logging_steps=1e-300"],
    ["trainer.warmup_steps=1e9"],
    ["trainer.max_grad_norm=0"],
    ["trainer.adam_epsilon=0", "weight_decay=0"],
    ["note='" + "x" * 9000 + "'"],
    ["run_name='\u202e😀\u0301'"],
    ["example='" + "[MASK] " * 200 + "'"],
]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "good.txt").write_text("A film it is.\n" * 60, encoding="utf-8")
    return Bench(tmp_path / "work", tmp_path / "outputs")


def check(bench: Bench, arguments: list[str]) -> None:
    """Work may fail of a value that is one, but by a line that knows why."""
    ending = bench.run(["train", *TINY, *arguments])
    assert misspoken(ending) is None, ending
    assert ending.code in (0, 1, 2)
    assert "MLMX_DEBUG" not in ending.err, ending.err


@pytest.mark.parametrize("arguments", EXTREMES[::7], ids=lambda arguments: arguments[-1][:30])
def test_an_extreme_is_trained_with_or_refused(arguments: list[str], bench: Bench):
    check(bench, arguments)


@pytest.mark.nightly
@pytest.mark.parametrize("arguments", EXTREMES, ids=lambda arguments: arguments[-1][:30])
def test_every_extreme_is_trained_with_or_refused(arguments: list[str], bench: Bench):
    check(bench, arguments)


def fields() -> list[str]:
    """Those of ``transformers.TrainingArguments`` that the group ``trainer`` takes."""
    import transformers

    names = inspect.signature(transformers.TrainingArguments).parameters
    return sorted(name for name in names if name not in SET_BY)


ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 10**30, -(10**30), 0.5, 1.5, math.nan, math.inf, 1e300, "", "abc", "1", "é"),
    *([], [1], ["a"], {}, {"a": 1}, {"a": {"b": 1}}),
]


def check_field(folder: Path, name: str, value: Any) -> None:
    try:
        made = training_arguments(
            {"name": "corrected", name: value},
            folder,
            lr=1e-3,
            epochs=1,
            batch_size=2,
            weight_decay=0.0,
            seed=1,
            precision="fp32",
        )
    except RequestError:
        return
    made.to_dict()
    assert made.get_warmup_steps(10) >= 0


@given(st.data())
@examples(200)
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_field_of_the_trainer_is_taken_or_refused(tmp_path: Path, data: st.DataObject):
    check_field(tmp_path, data.draw(st.sampled_from(fields())), data.draw(st.sampled_from(ODD)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_every_field_of_the_trainer_is_taken_or_refused(tmp_path: Path):
    for name in fields():
        for value in ODD:
            check_field(tmp_path, name, value)
    assert list(tmp_path.iterdir()) == []
