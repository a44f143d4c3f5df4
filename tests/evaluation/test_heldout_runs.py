"""The yardstick inside real runs: what moves it, what does not, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlmx.commands import main
from mlmx.evaluation.bootstrap import DocumentSums, resampled
from mlmx.runs.run import HELDOUT_FILE, Run, all_runs


def train(tiny: Path, corpus: Path, *overrides: str) -> Run:
    parts = {"model.path": tiny, "dataset": "files", "dataset.path": corpus, "chunk_size": 32, "precision": "fp32"}
    sizes = {"dataset.train_chunks": 16, "dataset.eval_chunks": 8, "epochs": 1, "tracking": "none"}
    own = {"heldout.documents": 6}
    given = dict(override.partition("=")[::2] for override in overrides)
    assert main.main(["train", *(f"{key}={value}" for key, value in {**parts, **sizes, **own, **given}.items())]) == 0
    return all_runs()[-1]


def first(run: Run, name: str) -> float:
    return next(row[name] for row in run.metrics() if name in row)


def test_the_training_dials_do_not_move_the_yardstick(tiny: Path, corpus: Path):
    """One model before training, whatever it is about to be trained with."""
    plain = train(tiny, corpus)
    for dials in (
        ["mlm_probability=0.4", "masking=whole_word"],
        ["masking=span", "masking.final_probability=0.3", "chunking=document"],
        ["trainer.per_device_eval_batch_size=3", "seed=7", "batch_size=2"],
    ):
        other = train(tiny, corpus, *dials)
        assert first(other, "heldout/loss") == pytest.approx(first(plain, "heldout/loss"), rel=1e-6), dials
        assert first(other, "heldout/bits_per_byte") == pytest.approx(first(plain, "heldout/bits_per_byte"), rel=1e-6)
        assert other.read_json("result.json")["protocol"] == plain.read_json("result.json")["protocol"]
    longer = train(tiny, corpus, "chunk_size=64")
    assert first(longer, "heldout/loss") != first(plain, "heldout/loss"), "context is part of what is compared"
    assert longer.read_json("result.json")["protocol"] == plain.read_json("result.json")["protocol"]
    fewer = train(tiny, corpus, "heldout.documents=3")
    assert fewer.read_json("result.json")["protocol"] != plain.read_json("result.json")["protocol"]


def test_eval_moves_with_the_dials_that_the_yardstick_ignores(tiny: Path, corpus: Path):
    plain, other = train(tiny, corpus), train(tiny, corpus, "mlm_probability=0.4")
    assert first(other, "eval/loss") != first(plain, "eval/loss")


def test_both_are_scored_before_training_and_after_every_epoch(tiny: Path, corpus: Path):
    run = train(tiny, corpus, "epochs=2")
    for section in ("eval", "heldout"):
        for name in ("loss", "perplexity", "accuracy"):
            assert [row["step"] for row in run.metrics() if f"{section}/{name}" in row] == [0, 2, 4]
    final = [row for row in run.metrics() if any(name.startswith("final/") for name in row)]
    assert [row["step"] for row in final] == [4]
    parts = {name: value for name, value in final[0].items() if name.startswith("final/heldout_loss_")}
    assert {"final/heldout_loss_first", "final/heldout_loss_unseen"} <= set(parts)


def test_two_runs_are_compared_document_by_document(tiny: Path, corpus: Path):
    one, other = train(tiny, corpus, "lr=1e-12"), train(tiny, corpus, "lr=3e-3", "epochs=3")
    sums = [DocumentSums.load(run.folder / HELDOUT_FILE) for run in (one, other)]
    found = resampled(sums).difference(0, 1)
    losses = [run.read_json("result.json")["metrics"]["heldout/loss"] for run in (one, other)]
    assert found.mean == pytest.approx(losses[0] - losses[1], rel=1e-6)
    assert 0 < found.low < found.mean < found.high
    assert [len(one.keys) for one in sums] == [4, 4], "2 % of 200 documents"


def test_the_report_says_that_no_document_is_on_both_sides(tiny: Path, corpus: Path):
    report = json.loads((train(tiny, corpus, "heldout.share=0.1").folder / "data.json").read_text())
    assert report["heldout"]["overlap_with_training"] == 0
    assert report["heldout"]["documents"] == 6
    assert report["corpus"]["documents"] == 200 - 6
    assert report["corpus"]["chunks_spanning_documents"] > 0
    assert {"64", "512"} <= set(report["corpus"]["chunks_per_chunk_size"])
    assert report["corpus"]["tokens_per_word"] > 1
    assert len(report["corpus"]["content_sha256"]) == 64


def test_data_json_keeps_what_the_protocol_is_made_of(tiny: Path, corpus: Path):
    def parts(*overrides: str) -> dict[str, Any]:
        found: dict[str, Any] = train(tiny, corpus, *overrides).read_json("data.json")["heldout"]["protocol_parts"]
        return found

    plain = parts()
    assert set(plain) == {"documents", "tokens", "special_tokens", "vocabulary", "rate", "shares", "version"}
    assert parts("chunk_size=64", "mlm_probability=0.4") == plain
    fewer = parts("heldout.documents=3")
    assert {key for key in plain if plain[key] != fewer[key]} == {"documents", "tokens"}


def test_prepare_reports_and_previews_without_a_run(
    tiny: Path, corpus: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
):
    data = ["dataset=files", f"dataset.path={corpus}", "chunk_size=32", "masking=span", "preview=2"]
    assert main.main(["prepare", f"model.path={tiny}", *data]) == 0
    printed = capsys.readouterr().out
    report = json.loads(printed[: printed.index("\n}") + 2])
    assert report["train"]["chunks"] > report["eval"]["chunks"] > 0
    previews = [line for line in printed.splitlines() if "⟦" in line]
    assert len(previews) == 2
    assert "⟦[MASK] → " in printed
    assert [path.name for path in outputs.iterdir()] == ["cache"], "tokens are kept; there is no run"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mlm_probability=0.01"], ["mlm_probability=0.01", "chunk of 32", "smallest that works is 0.034"]),
        (["masking.final_probability=0.01"], ["0.01", "smallest that works"]),
        (["masking.final_probability=1"], ["masking.final_probability=1", "between 0 and 1"]),
        (["masking.keep_share=0.3"], ["keep_share=0.3", "together 1", "sum to 1.2"]),
        (["masking=span", "masking.geometric_p=0"], ["masking.geometric_p=0", "above 0"]),
        (["masking=span", "masking.max_words=0"], ["masking.max_words=0", "at least 1"]),
        (["heldout.documents=0"], ["heldout.documents=0", "at least 1"]),
        (["heldout.share=1"], ["heldout.share=1"]),
        (["heldout.dataset=imdbb"], ["dataset=imdbb", "did you mean imdb"]),
        (["heldout.documnets=3"], ["heldout.documnets", "did you mean documents"]),
    ],
)
def test_what_is_refused(
    tiny: Path, corpus: Path, outputs: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: list[str]
):
    base = [f"model.path={tiny}", "dataset=files", f"dataset.path={corpus}", "chunk_size=32"]
    assert main.main(["train", *base, *overrides]) == 2
    line = capsys.readouterr().err
    assert [word for word in words if word not in line] == [], line
    assert line.count("\n") == 1
    assert not outputs.exists()


def test_the_training_source_is_no_held_out_source(
    tiny: Path, corpus: Path, outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    base = ["train", f"model.path={tiny}", "dataset=files", f"dataset.path={corpus}", "chunk_size=32"]
    assert main.main([*base, f"heldout.dataset={{name: files, path: {corpus}}}"]) == 2
    assert "is the training source itself" in capsys.readouterr().err
    copied = tmp_path / "copied.jsonl"
    rows = corpus.read_text().splitlines()
    copied.write_text("\n".join([*rows[:3], json.dumps({"text": "a document of its own, not trained on"})]) + "\n")
    assert main.main([*base, f"heldout.dataset={{name: files, path: {copied}}}"]) == 2
    assert "3 of its 4 documents also stand in the training texts" in capsys.readouterr().err
    assert not outputs.exists()
    run = train(tiny, corpus, f"heldout.dataset={{name: files, path: {copied}}}", "dataset.allow_overlap=true")
    assert run.read_json("data.json")["heldout"]["left_out_for_overlap"] == 3
    assert run.read_json("data.json")["heldout"]["documents"] == 1


def test_document_sums_of_a_run_add_up_to_its_score(tiny: Path, corpus: Path):
    run = train(tiny, corpus)
    sums = DocumentSums.load(run.folder / HELDOUT_FILE)
    mean = float(sums.totals["loss"].sum() / sums.tokens.sum())
    assert mean == pytest.approx(run.read_json("result.json")["metrics"]["heldout/loss"], rel=1e-12)
    assert len(np.unique(sums.keys)) == len(sums.keys)
