"""Functions of installed packages: found by name, checked as the shipped ones are, held to the contract of a stage."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mlmx.commands.main import main
from mlmx.comparison.ranking import tabulate
from mlmx.config.errors import RequestError
from mlmx.config.options import bind
from mlmx.config.schema import Heldout, TrainConfig
from mlmx.data.masking import MASKINGS, masker, token
from mlmx.evaluation.metrics import all_metrics, higher_is_better
from mlmx.experiment import check_training, parts_of
from mlmx.runs.run import all_runs
from tests.support.plugins import MODULE, install

CODE = """
from mlmx.config.errors import require
from mlmx.data.chunks import Chunks
from mlmx.data.masking import strategy
from mlmx.data.texts import source
from mlmx.evaluation.metrics import metric
from mlmx.models.encoders import scratch

@strategy(words=False, uniforms=False)
def every_other(uniforms, word_starts, budgets, *, phase: int = 0):
    return np.broadcast_to(np.arange(uniforms.shape[1]) % 2 == phase, uniforms.shape)

def of_words(uniforms, word_starts, budgets):
    return word_starts

def enough(*, verses: int):
    require(verses >= 3, "dataset.verses: too few")

@source(quick_check=enough)
def poems(*, verses: int):
    from datasets import Dataset
    return Dataset.from_dict({"text": [f"A rose is a rose, {n} times a rose is a rose." for n in range(verses)]})

def halves(tokens, chunk_size, *, overlap: int = 0):
    starts = np.arange(0, len(tokens.ids) - chunk_size + 1, chunk_size - overlap)
    return Chunks(tokens, chunk_size, starts, np.full(len(starts), chunk_size), np.arange(len(starts)))

def narrow(*, width: int = 16):
    return scratch(layers=1, hidden_size=width, heads=1)

@metric(higher_is_better=True)
def mrr(logits, labels):
    assert (logits.dtype, labels.dtype) == (np.float32, np.int64)
    own = np.take_along_axis(logits, labels[:, None], 1)
    return 1 / (1 + (logits > own).sum(1))
"""
POINTS = {f"{stage}.{name}": name for stage, name in [
    *[("masking", "every_other"), ("masking", "of_words"), ("dataset", "poems"), ("chunking", "halves")],
    *[("model", "narrow"), ("metric", "mrr")],
]}  # fmt: skip


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install(tmp_path / "site", CODE, POINTS, monkeypatch)
    return tmp_path / "site"


def config(**groups: dict[str, Any]) -> TrainConfig:
    shipped: dict[str, dict[str, Any]] = {
        "model": {"name": "scratch"},
        "dataset": {"name": "packaged_reviews", "source": "imdb"},
        "chunking": {"name": "concat"},
        "masking": {"name": "token"},
        "trainer": {"name": "corrected"},
        "tracking": {"name": "none"},
    }
    return TrainConfig(**{**shipped, **groups})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- found and bound


def test_a_plugin_takes_its_place_in_a_run_beside_the_shared_options(plugin: Path):
    parts = parts_of(
        config(
            masking={"name": "every_other", "phase": 1, "mask_share": 0.5, "keep_share": 0.4},
            dataset={"name": "poems", "verses": 3, "eval_chunks": 5},
            model={"name": "narrow"},
        )
    )
    assert parts.strategy.func.__module__ == MODULE
    assert parts.strategy.keywords == {"phase": 1}
    assert parts.shares == (0.5, 0.1)
    assert len(parts.source()) == 3
    assert parts.split.keywords == {"eval_chunks": 5.0}
    assert (parts.encoder.fresh or {})["dim"] == 16


def test_held_out_documents_come_from_a_plugin_too(plugin: Path):
    source = parts_of(config(heldout=Heldout(dataset={"name": "poems", "verses": 3}))).heldout_source
    assert source is not None
    assert (source.func.__module__, source.keywords) == (MODULE, {"verses": 3})


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ({"masking": {"name": "every_other", "phas": 1}}, "masking.phas: unknown option; did you mean phase?"),
        ({"masking": {"name": "every_other", "phase": "x"}}, "masking.phase='x': a whole number is needed"),
        ({"masking": {"name": "every_othr"}}, "masking.name=every_othr: unknown; did you mean every_other?"),
        ({"dataset": {"name": "poems"}}, "dataset.verses: missing"),
        # a name counts in its own group only
        ({"masking": {"name": "poems"}}, "masking.name=poems: unknown"),
    ],
)
def test_a_plugin_is_checked_as_the_shipped_functions_are(plugin: Path, groups: dict[str, Any], words: str):
    with pytest.raises(RequestError) as refused:
        parts_of(config(**groups))
    assert words in str(refused.value)


def test_a_shipped_name_is_never_replaced_by_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install(tmp_path, CODE, {"masking.token": "every_other"}, monkeypatch)
    assert bind("masking", {"name": "token"}, MASKINGS)[0].func is token


def test_without_its_distribution_a_plugin_is_unknown():
    with pytest.raises(RequestError, match=r"masking\.name=every_other: unknown"):
        bind("masking", {"name": "every_other"}, MASKINGS)


def test_what_cannot_be_imported_or_is_brought_twice_is_refused_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    install(tmp_path / "a", "import no_such_module", {"masking.mine": "mine"}, monkeypatch)
    with pytest.raises(
        RequestError, match=f"masking 'mine': the plugin {MODULE}:mine cannot be loaded.*no_such_module"
    ):
        bind("masking", {"name": "mine"}, MASKINGS)
    install(tmp_path / "b", "mine = 1", {"masking.mine": "mine"}, monkeypatch, "another_plugin")
    with pytest.raises(RequestError, match=r"masking 'mine': is brought by .*another_plugin:mine"):
        bind("masking", {"name": "mine"}, MASKINGS)


# -------------------------------------------------------------------------- what functions say of themselves


def test_a_strategy_on_words_is_refused_where_nothing_tells_them_apart_unless_it_says_that_it_needs_none(plugin: Path):
    every_other, of_words = (bind("masking", {"name": name}, MASKINGS)[0] for name in ("every_other", "of_words"))
    assert not masker(every_other, Slow(), 0.15, 42).draws_units
    with pytest.raises(RequestError, match=r"masking=of_words: slow has no fast tokenizer"):
        masker(of_words, Slow(), 0.15, 42)


class Slow:
    """A tokenizer that does not tell where words begin."""

    name_or_path, mask_token_id, pad_token_id, all_special_ids = "slow", 4, 0, (0, 4)

    def __len__(self) -> int:
        return 9


def test_a_source_brings_its_own_quick_check(plugin: Path):
    check_training(config(dataset={"name": "poems", "verses": 3}))
    with pytest.raises(RequestError, match="verses: too few"):
        check_training(config(dataset={"name": "poems", "verses": 2}))


def test_a_plugins_metric_says_which_direction_is_better(plugin: Path):
    names = ["heldout/mrr", "evaluate/heldout/mrr", "final/heldout_mrr_rare", "words/top5_mrr"]
    assert all(map(higher_is_better, names))
    assert not higher_is_better("heldout/mrrs")


# ------------------------------------------------------------------------------- one YAML and one function


def test_one_yaml_and_one_function_make_a_run(plugin: Path, tmp_path: Path):
    own = tmp_path / "own"
    for group, option in {
        "masking": "name: every_other\nphase: 1",
        "dataset": "name: poems\nverses: 60\ntrain_chunks: 8\neval_chunks: 4",
        "chunking": "name: halves",
        "model": "name: narrow",
    }.items():
        (own / group).mkdir(parents=True)
        (own / group / "mine.yaml").write_text(option + "\n")
    mine = [f"{group}=mine" for group in ("masking", "dataset", "chunking", "model")]
    sizes = ["chunk_size=32", "epochs=1", "heldout.share=0.1", "tracking=none", "trainer.use_cpu=true"]
    for rate in ("1e-6", "3e-2"):
        assert main(["train", "--config-dir", str(own), *mine, *sizes, f"lr={rate}"]) == 0
    ranked = tabulate(all_runs(), "heldout/mrr").rows
    for row in ranked:
        for section in ("eval", "heldout"):
            assert row.value(f"{section}/accuracy") <= row.value(f"{section}/mrr") <= 1
    assert ranked[0].value("heldout/mrr") > ranked[1].value("heldout/mrr"), "more is better"


# ------------------------------------------------------------------------------------ contracts

IMPORTS = "from mlmx.data.chunks import Chunks\nfrom mlmx.evaluation.metrics import metric\n"
BROKEN = {
    ("masking", "return np.arange(8).reshape(1, 8)"): "gives int64[1, 8]; bool[B, T], where units begin, is needed",
    ("masking", "return [[True] * 8] * 2"): "gives list; bool[B, T]",
    ("masking", "return args[1][:1]"): "gives bool[1, 8]; bool[B, T]",
    ("masking", "return args[3]"): "fails (IndexError: tuple index out of range)",
    ("chunking", "return [args[0].ids[:8]]"): "gives list; Chunks of rows of 1 to 128 tokens",
    ("chunking", "return Chunks(*args, np.array([0.0]), np.array([8.0]), np.arange(1))"): "gives Chunks; Chunks of",
    ("chunking", "return Chunks(*args, np.array([0]), np.array([129]), np.arange(1))"): "gives Chunks; Chunks of",
    ("chunking", "return Chunks(*args, np.array([300]), np.array([128]), np.arange(1))"): "gives Chunks; Chunks of",
    ("model", "return {'path': 'x'}"): "gives dict of path; an Encoder is needed",
    ("metric", "return np.float32(1)"): "gives float32[]; float[M], a value for each of M targets, is needed",
    ("metric", "return args[0].argmax(1) == args[1]"): "gives bool[3]; float[M]",
    ("metric", "return args[0]"): "gives float32[3, 8]; float[M]",
    ("metric", "return [0.0] * 3"): "gives list; float[M]",
    ("metric", "return args[0].max(1) * np.nan"): "gives [nan, nan, nan] of finite logits; a mean needs numbers",
    ("metric", "args[0][:] = 0"): "fails (ValueError: assignment destination is read-only)",
}


@pytest.mark.parametrize(("stage", "body", "words"), [(*key, words) for key, words in BROKEN.items()])
def test_what_keeps_to_no_contract_is_one_line_before_anything_is_done(
    stage: str, body: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    direction = (
        "from mlmx.evaluation.metrics import metric\n@metric(higher_is_better=True)\n" if stage == "metric" else ""
    )
    code = f"from mlmx.data.chunks import Chunks\n{direction}def mine(*args):\n    {body}\n"
    install(tmp_path, code, {f"{stage}.mine": "mine"}, monkeypatch)
    groups = {} if stage == "metric" else {stage: {"name": "mine"}}
    with pytest.raises(RequestError) as refused:
        check_training(replace(config(**groups), chunk_size=128))
    assert str(refused.value).startswith(f"{stage} 'mine' of {MODULE}: {words}")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return [{'text': 'a'}]", "gives list; a datasets.Dataset of rows {'text': str}"),
        ("return Dataset.from_dict({'poem': ['a']})", "gives Dataset of poem; a datasets.Dataset"),
        ("return Dataset.from_dict({'text': [1]})", "gives Dataset of text; a datasets.Dataset"),
        ("return Dataset.from_dict({'text': ['a', None]})", "gives Dataset of text; a datasets.Dataset"),
        ("return Dataset.from_dict({'text': []})", "gives Dataset of text; a datasets.Dataset"),
        ("return {'test': Dataset.from_dict({'text': ['a']})}", "gives dict of test; a datasets.Dataset"),
        ("return {}['a']", "fails (KeyError: 'a')"),
    ],
)
def test_a_source_that_gives_no_rows_of_text_is_one_line_and_leaves_nothing(
    body: str,
    words: str,
    tmp_path: Path,
    outputs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    code = f"def mine():\n    from datasets import Dataset\n    {body}\n"
    install(tmp_path / "site", code, {"dataset.mine": "mine"}, monkeypatch)
    (tmp_path / "own" / "dataset").mkdir(parents=True)
    (tmp_path / "own" / "dataset" / "mine.yaml").write_text("name: mine\n")
    own = ["--config-dir", str(tmp_path / "own"), "dataset=mine", "model=scratch", "tracking=none"]
    assert main(["train", *own, "trainer.use_cpu=true"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mlmx: dataset 'mine' of {MODULE}: {words}")
    assert not outputs.exists()


@pytest.mark.parametrize(
    ("name", "decorator", "words"),
    [
        ("mine", "", "does not say which direction is better; decorate it with @metric(higher_is_better=…)"),
        ("loss", "@metric(higher_is_better=False)", "its name is taken; give another"),
        ("tokens", "@metric(higher_is_better=False)", "its name is taken; give another"),
        ("to-day", "@metric(higher_is_better=False)", "its name is no identifier; give another"),
    ],
)
def test_a_metric_has_a_direction_and_a_name_of_its_own(
    name: str, decorator: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    code = f"{IMPORTS}{decorator}\ndef mine(logits, labels):\n    return logits.max(1)\n"
    install(tmp_path, code, {f"metric.{name}": "mine"}, monkeypatch)
    for asked in (partial(check_training, config()), all_metrics):
        with pytest.raises(RequestError) as refused:
            asked()
        assert f"metric '{name}' of {MODULE}: {words}" in str(refused.value)
