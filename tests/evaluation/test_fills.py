"""The example table: the same held-out sentences for every run of a protocol, filled before training and each epoch."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mlmx.commands.main import main
from mlmx.data.examples import Example, choose_examples
from mlmx.data.masking import MASKINGS, masker
from mlmx.evaluation.fills import Fills
from mlmx.evaluation.measure import Measure
from mlmx.models.encoders import load_model, pretrained, scratch
from mlmx.models.fill import fill_masks
from mlmx.runs.run import Run
from mlmx.tracking.store import local
from tests.support.processes import ended, reached, started, wait_until
from tests.support.tracked import of, tracker
from tests.support.trainings import WEIGHTS, command, history, same

HELDOUT = "heldout.documents=30"
COLUMNS = ["step", "epoch", "sentence", "target", "target_probability"]
COLUMNS += [*(f"fill_{n}" for n in range(1, 6)), "probabilities"]


def table(folder: Path) -> list[dict[str, Any]]:
    found = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]


@pytest.fixture(scope="module")
def examples(imdb: Any, tokenizer: Any) -> tuple[Example, ...]:
    return choose_examples(imdb.select(range(300)), tokenizer)


# ---------------------------------------------------------------------------------------------- the choice


def test_twenty_sentences_of_as_many_documents_with_a_word_to_be_found(examples: Any, imdb: Any, tokenizer: Any):
    assert len(examples) == 20
    texts = imdb.select(range(300))["text"]
    whole = [example.sentence.replace("[MASK]", example.target) for example in examples]
    assert len({text for text in texts for sentence in whole if sentence in text}) == 20
    for example in examples:
        assert example.sentence.count("[MASK]") == 1
        assert example.target.isalpha()
        assert len(example.target) >= 4
        assert tokenizer.decode([example.input_ids[example.position]]) == example.target.lower()
        masked = list(example.input_ids)
        masked[example.position] = tokenizer.mask_token_id
        assert masked == tokenizer(example.sentence)["input_ids"]


def test_the_choice_is_made_by_content(examples: Any, imdb: Any, tokenizer: Any):
    turned = imdb.select(range(299, -1, -1))
    assert choose_examples(turned, tokenizer) == examples


def test_few_documents_give_several_sentences_each(imdb: Any, tokenizer: Any):
    found = choose_examples(imdb.select(range(2)), tokenizer)
    assert 2 < len(found) <= 20
    assert len({example.sentence for example in found}) == len(found)


def test_a_tokenizer_whose_tokens_hold_spaces_gives_whole_words():
    from datasets import Dataset
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    sentence = "The second sentence holds several words that were seen before."
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator([sentence] * 9, trainers.BpeTrainer(special_tokens=["<unk>", "<mask>", "<pad>"]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, mask_token="<mask>", pad_token="<pad>", unk_token="<unk>"
    )
    [example] = choose_examples(Dataset.from_dict({"text": [sentence]}), tokenizer)
    assert example.sentence.replace("[MASK]", example.target) == sentence
    assert example.target.isalpha()
    assert " [MASK]" in example.sentence or example.sentence.startswith("[MASK]")


def test_sentences_without_a_word_to_ask_for_are_left_out(tokenizer: Any):
    from datasets import Dataset

    texts = ["Too few words.", "1 2 3 4 5 6 7 8 9.", "it is as if we do so at no one of us.", "", "[MASK] " * 12]
    assert choose_examples(Dataset.from_dict({"text": texts}), tokenizer) == ()


# ------------------------------------------------------------------------------------------------ the fills


@pytest.fixture
def fills(examples: Any, tokenizer: Any) -> Fills:
    mask = masker(partial(MASKINGS["token"]), tokenizer, 0.15, 42)
    return Fills(examples, tokenizer, Measure(tokenizer, mask, None, 32))


def test_fills_are_those_of_predict(fills: Fills, tiny: Path, tokenizer: Any):
    loaded = load_model(pretrained(path=str(tiny)), tokenizer, seed=0)
    rows = fills(loaded)
    assert len(rows) == 20
    for row in rows:
        [found] = fill_masks(loaded, tokenizer, row["sentence"], 5)
        assert [row[f"fill_{n}"] for n in range(1, 6)] == [fill.token for fill in found]
        there = [float(text) for text in row["probabilities"].split()]
        assert there == pytest.approx([fill.probability for fill in found], abs=1e-4)
        assert 0 <= row["target_probability"] <= 1


def test_filling_leaves_no_trace(fills: Fills, tiny: Path, tokenizer: Any):
    import torch

    loaded = load_model(pretrained(path=str(tiny)), tokenizer, seed=0).train()
    before = torch.random.get_rng_state()
    first = fills(loaded)
    assert fills(loaded) == first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert loaded.training


def test_fewer_rows_at_once_fill_the_same(fills: Fills, tiny: Path, tokenizer: Any):
    loaded = load_model(pretrained(path=str(tiny)), tokenizer, seed=0)
    together = fills(loaded)
    fills.measure.batch_size = 3
    apart = fills(loaded)
    names = ["sentence", "target", "fill_1"]
    assert [[row[name] for name in names] for row in apart] == [[row[name] for name in names] for row in together]


def test_what_a_model_cannot_hold_is_left_out(fills: Fills, examples: Any, tokenizer: Any):
    lengths = sorted(len(example.input_ids) for example in examples)
    encoder = scratch(layers=1, hidden_size=16, heads=1, max_length=lengths[4])
    small = load_model(encoder, tokenizer, seed=0)
    assert len(fills(small)) == sum(length <= lengths[4] for length in lengths)


# ------------------------------------------------------------------------------------------------- in a run


def test_a_run_has_a_table_that_mlflow_shows_and_its_numbers_are_those_without(
    store: Path, tiny: Path, corpus: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlflow import MlflowClient

    folder = outputs / "train" / "run"
    assert main([*command(tiny, corpus, folder, HELDOUT, "trainer.save_steps=10"), "tracking=local"]) == 0
    rows = table(folder)
    assert list(rows[0]) == COLUMNS
    assert [(row["step"], row["epoch"]) for row in rows] == [
        (s, e) for s, e in ((0, 0), (10, 1), (20, 2)) for _ in "x" * 20
    ]
    sentences = [row["sentence"] for row in rows]
    assert sentences[:20] == sentences[20:40] == sentences[40:]
    assert rows[0]["probabilities"] != rows[40]["probabilities"]

    _, run = of(outputs)
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "examples.json", "type": "table"}]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", local().uri)  # it looks for runs where the environment says
    shown = MlflowClient(local().uri).load_table(run.info.experiment_id, "examples.json", run_ids=[run.info.run_id])
    assert list(shown.columns) == COLUMNS
    assert shown.to_dict("records") == rows

    other = outputs / "train" / "other"  # another chunk size and rate, the same protocol
    assert main([*command(tiny, corpus, other, HELDOUT, "trainer.save_steps=10", "chunk_size=20", "lr=1e-4")]) == 0
    assert Run(other).result().protocol == Run(folder).result().protocol
    assert [row["sentence"] for row in table(other)] == sentences
    assert table(other)[:20] == rows[:20], "before training they are one model"

    without = outputs / "train" / "without"
    monkeypatch.setattr("mlmx.evaluation.fills.Fills.__call__", lambda self, trained: [])
    assert main(command(tiny, corpus, without, HELDOUT, "trainer.save_steps=10")) == 0
    assert not (without / "examples.json").exists()
    assert history(without) == history(folder)
    assert same(without / WEIGHTS, folder / WEIGHTS)


def test_a_resumed_run_has_every_row_once(tiny: Path, corpus: Path, outputs: Path, tmp_path: Path):
    whole, killed = outputs / "train" / "whole", outputs / "train" / "killed"
    assert main(command(tiny, corpus, whole, HELDOUT, "trainer.save_steps=5")) == 0
    process = started(command(tiny, corpus, killed, HELDOUT, "trainer.save_steps=5"), outputs, tmp_path / "said.txt")
    wait_until(lambda: reached(killed, 12), process)
    os.kill(process.pid or 0, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
    assert {row["step"] for row in table(killed)} == {0, 10}
    assert main(["train", f"resume={killed}"]) == 0
    assert table(killed) == table(whole)


def test_a_torn_table_ends_no_run(outputs: Path):
    made = tracker(outputs / "run", None)
    made.fills(0, 0.0, [{"sentence": "A [MASK]."}])
    (outputs / "run" / "examples.json").write_text('{"columns": ["st')
    made.fills(1, 1.0, [{"sentence": "A [MASK]."}])
    made.finish("FINISHED", {})
    assert table(outputs / "run") == [{"step": 1, "epoch": 1.0, "sentence": "A [MASK]."}]


def test_a_run_that_holds_nothing_out_has_no_table(tiny: Path, corpus: Path, outputs: Path):
    folder = outputs / "train" / "run"
    assert main([*command(tiny, corpus, folder, "heldout.share=0"), "tracking=none"]) == 0
    assert not (folder / "examples.json").exists()
