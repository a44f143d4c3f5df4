# ruff: noqa: E501 (tables of values)
"""Whatever stands on a command line or in a config file: a right request, or one line and nothing left behind."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlmx.commands.main import COMMANDS
from mlmx.sweeps.parent import Plan
from tests.fuzz.harness import Bench, complaint, examples
from tests.fuzz.strategies import LOCAL, request_of, requests, values

FEW, MANY = 15, 2000


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Commands that are composed and checked as ever, and then do nothing."""
    for name in COMMANDS:
        monkeypatch.setattr(importlib.import_module(f"mlmx.commands.{name}"), name, lambda config, job: None)
    monkeypatch.setattr("mlmx.sweeps.parent.recorded", nothing_recorded)
    folder = tmp_path / "work"
    (folder / "conf").mkdir(parents=True)
    (folder / "good.txt").write_text("A film.\n" * 30, encoding="utf-8")
    return Bench(folder, tmp_path / "outputs")


@contextlib.contextmanager
def nothing_recorded(plan: Plan) -> Iterator[None]:
    """Where a sweep of `train` would begin, this ends it."""
    raise SystemExit(0)
    yield


def check(bench: Bench, arguments: list[str]) -> None:
    ending = bench.run(arguments)
    assert complaint(ending) is None, (arguments, ending)


FOUND = [
    ["model=[[1]]"],
    ["seed=" + "9" * 5000],
    ["note=\x1b[31mred"],
    ["model=glob(*)", "-m"],
    ["lr=range(0,1,1e-9)", "-m"],
    ["lr=choice()", "-m"],
    ["note=" + "[" * 2000 + "]" * 2000],
    ["--cfg", "job", "-m"],
    ["note=\ud800"],
    ["chunk_size=nan"],
    ["lr=1e400"],
    ["mlm_probability=${mlm_probability}"],
    ["resume=[[]]"],
    ["resume.allow=lr"],
    ["resume=\x00"],
    ["resume=" + "a" * 5000],
    ["save_minutes=nan"],
    ["experiment=16", "--cfg", "all"],
    ["model=[16]", "--cfg", "job"],
    ["chunking=-0", "-m"],
    ["masking.final_probability=" + "9" * 400],
    ["note='\ud800'"],
    ["run_name='a\x00b'"],
    ["dataset.path=~nobody/x"],
    ["model.path=" + "a" * 5000],
    ["model.tokenizer='\x00'"],
    ["model.layers=1000000000"],
    ["model.hidden_size=1000000000"],
    ["epochs=1e300"],
    ["batch_size=" + str(10**30)],
    ["resume=~nobody/x"],
    ["--config-dir", "a" * 5000],
]


@pytest.mark.parametrize("arguments", FOUND, ids=lambda arguments: ascii(arguments[0][:30]))
def test_what_was_found_once(arguments: list[str], bench: Bench):
    check(bench, ["train", *LOCAL, *arguments])


@given(request_of("train"))
@examples(2 * FEW)
def test_train_is_right_or_refused(bench: Bench, arguments: list[str]):
    check(bench, arguments)


@given(requests())
@examples(FEW)
def test_every_command_is_right_or_refused(bench: Bench, arguments: list[str]):
    check(bench, arguments)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@given(requests())
@examples(MANY)
def test_every_command_is_right_or_refused_many_times(bench: Bench, arguments: list[str]):
    check(bench, arguments)


YAML = [
    "", "[1, 2]", "text", "a: [", "\tname: scratch", "name: scratch\nlayers: 1", "name: scratch\nlayers: two", "name: 5", "name: null",
    "!!python/object/apply:os.system ['true']", "a: !!python/name:os.system", "a: &a [*a]", "name: scratch\nname: packaged",
    "a: &a [x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: &d [*c, *c, *c, *c]\ne: &e [*d, *d, *d, *d]\nf: [*e, *e, *e, *e]",
    "_target_: os.system", "name: scratch\nlayers:\n  _target_: os.system", "name: ${oc.env:HOME}", "name: ${name}", "\x00", "\ufeffname: scratch",
    "name: scratch\n---\nname: scratch", "defaults: [nope]", "defaults: [/model: nope]", "[" * 500, "{a: " * 40 + "1" + "}" * 40,
    "name: scratch\nlayers: 0x" + "f" * 5000, "name: !!bool maybe", "name: !!int ''", "name: !!timestamp now", "name: !!binary x",
    "name: scratch\nlayers: .nan", "name: scratch\nlayers: 1e400", "? [a]\n: b", "1: 2", "name: scratch\n\"\\0\": 1", "- name: scratch",
]  # fmt: skip


@pytest.mark.parametrize("text", YAML, ids=lambda text: ascii(text[:24]))
def test_a_config_file_is_right_or_refused(text: str, bench: Bench):
    option = bench.folder / "conf" / "model" / "mine.yaml"
    option.parent.mkdir()
    option.write_text(text, encoding="utf-8")
    check(bench, ["train", "--config-dir", "conf", "model=mine", "dataset=files", "dataset.path=good.txt"])


def test_bytes_that_are_no_text_are_refused_as_a_config_file(bench: Bench):
    option = bench.folder / "conf" / "model" / "mine.yaml"
    option.parent.mkdir()
    option.write_bytes(b"name: \xff\xfe\x00")
    check(bench, ["train", "--config-dir", "conf", "model=mine"])


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@given(st.dictionaries(st.text(max_size=8), values | st.integers() | st.floats() | st.none(), max_size=4))
@example({"name": "scratch", "layers": 2**70})
@examples(MANY // 4)
def test_a_written_config_file_is_right_or_refused(bench: Bench, contents: dict[str, object]):
    import yaml

    option = bench.folder / "conf" / "model" / "mine.yaml"
    option.parent.mkdir(exist_ok=True)
    option.write_text(yaml.safe_dump(contents, allow_unicode=True), encoding="utf-8", errors="replace")
    check(bench, ["train", "--config-dir", "conf", "model=mine"])
