"""Training: one loss whatever the batch is cut into, seeds that carry no history, options checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlmx.config.errors import RequestError
from mlmx.training.arguments import SET_BY, require_names, resolve_precision, training_arguments, use_tf32
from tests.support.trainings import last, train, train_scratch

DIALS = {"lr": 1e-3, "epochs": 1, "batch_size": 8, "weight_decay": 0.01, "seed": 42, "precision": "fp32"}


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_changes_neither_loss_nor_gradient_nor_weights(
    tiny: Path, corpus: Path, batch_size: int, accumulation: int
):
    whole = train(tiny, corpus, "batch_size=8")
    cut = train(tiny, corpus, f"batch_size={batch_size}", f"trainer.gradient_accumulation_steps={accumulation}")
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert last(cut, name) == pytest.approx(last(whole, name), rel=1e-5), name
    ours, theirs = (load_file(run.model / "model.safetensors") for run in (cut, whole))
    # All weights together: a key's bias has no gradient but rounding, which Adam scales up to a step.
    difference, size = (
        torch.cat([w.flatten() for w in weights.values()])
        for weights in ({name: ours[name] - theirs[name] for name in theirs}, theirs)
    )
    assert torch.linalg.norm(difference) <= 1e-6 * torch.linalg.norm(size)
    assert {row["step"] for row in cut.metrics()} == {0, 5}


def test_a_repeated_run_is_equal_to_the_bit_and_another_seed_is_not(tiny: Path, corpus: Path):
    first, again = train(tiny, corpus), train(tiny, corpus)
    other = train(tiny, corpus, "seed=7")
    weights = [(run.model / "model.safetensors").read_bytes() for run in (first, again, other)]
    assert weights[0] == weights[1] != weights[2]
    histories = [
        [
            {k: v for k, v in row.items() if k.startswith(("train/loss", "train/grad", "eval/", "heldout/"))}
            for row in run.metrics()
        ]
        for run in (first, again)
    ]
    assert histories[0] == histories[1]


@pytest.mark.long
def test_worker_processes_change_nothing(tiny: Path, corpus: Path):
    alone, workers = (
        train(tiny, corpus, "epochs=2"),
        train(tiny, corpus, "epochs=2", "trainer.dataloader_num_workers=2"),
    )
    assert last(alone, "eval/loss") == last(workers, "eval/loss")
    assert last(alone, "train/loss") == last(workers, "train/loss")


def test_dropout_is_seeded_by_step_not_by_history(corpus: Path):
    """Scoring more often draws more random numbers; it must not move the training."""
    dropout = ["model=scratch", "model.layers=1", "model.hidden_size=32", "model.heads=2", "model.dropout=0.3"]
    seldom = train_scratch(corpus, dropout)
    often = train_scratch(corpus, [*dropout, "trainer.eval_strategy=steps", "trainer.eval_steps=1"])
    assert last(seldom, "train/loss") == last(often, "train/loss")


def test_every_epoch_is_scored_logged_and_saved(tiny: Path, corpus: Path):
    run = train(tiny, corpus, "epochs=2")
    scored = [row for row in run.metrics() if "eval/loss" in row]
    assert [(row["step"], row["epoch"]) for row in scored] == [(0, 0), (5, 1), (10, 2)]
    assert [row["epoch"] for row in run.metrics() if "train/loss" in row] == [1, 2]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-5"]
    assert scored[-1]["eval/loss"] < scored[0]["eval/loss"]
    assert scored[-1]["eval/perplexity"] == pytest.approx(float(torch.tensor(scored[-1]["eval/loss"]).exp()), rel=1e-5)
    assert not (run.model / "training_args.bin").exists()


def test_masks_differ_between_epochs_and_evaluation_masks_do_not(tiny: Path, corpus: Path, tmp_path: Path):
    """With a learning rate of nearly nothing, the training loss moves only by its masks."""
    run = train(tiny, corpus, "epochs=3", "lr=1e-12")
    losses = [row["train/loss"] for row in run.metrics() if "train/loss" in row]
    scores = [row["eval/loss"] for row in run.metrics() if "eval/loss" in row]
    assert len(set(losses)) == 3
    assert max(scores) - min(scores) < 1e-6


def test_evaluation_batch_size_changes_no_score(tiny: Path, corpus: Path):
    scores = [last(train(tiny, corpus, f"trainer.per_device_eval_batch_size={n}"), "eval/loss") for n in (1, 8)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


def test_bf16_trains_and_is_scored_in_fp32(tiny: Path, corpus: Path):
    few = "dataset.train_chunks=8"  # without AVX-512 such products are slow
    half, full = train(tiny, corpus, few, "precision=bf16"), train(tiny, corpus, few)
    assert last(half, "eval/loss") == pytest.approx(last(full, "eval/loss"), rel=5e-3)
    first = [run.metrics()[0]["eval/loss"] for run in (half, full)]
    assert first[0] == first[1], "the untrained model scores the same in either precision"
    assert last(half, "train/loss") != last(full, "train/loss")


def test_whole_words_and_documents_train(tiny: Path, corpus: Path):
    run = train(tiny, corpus, "masking=whole_word", "chunking=document")
    assert last(run, "eval/loss") < run.metrics()[0]["eval/loss"]
    report = json.loads((run.folder / "data.json").read_text())
    assert report["train"]["chunks"] == 40


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 1e-3}, ["trainer.learning_rate", "the dial lr"]),
        ({"output_dir": "x"}, ["trainer.output_dir", "hydra.run.dir"]),
    ],
)
def test_fields_that_are_dials_are_refused(options: dict, words: list[str]):
    with pytest.raises(RequestError) as refused:
        require_names({"name": "corrected", **options})
    assert all(word in str(refused.value) for word in words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup_stepss": 1}, ["warmup_stepss", "did you mean warmup_steps"]),
        ({"warmup_steps": "many"}, ["trainer.warmup_steps='many'", "a number is needed"]),
        ({"lr_scheduler_type": "bent"}, ["bent"]),
        ({"eval_strategy": "sometimes"}, ["sometimes"]),
        ({"gradient_accumulation_steps": 1.5}, ["gradient_accumulation_steps=1.5", "a whole number"]),
    ],
)
def test_library_options_are_checked(tmp_path: Path, options: dict, words: list[str]):
    with pytest.raises(RequestError) as refused:
        training_arguments({"name": "corrected", **options}, tmp_path / "checkpoints", **DIALS)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert not (tmp_path / "checkpoints").exists()


def test_every_training_argument_is_reachable_or_says_who_sets_it(tmp_path: Path):
    import inspect

    import transformers

    fields = set(inspect.signature(transformers.TrainingArguments).parameters)
    assert set(SET_BY) <= fields, "a field named here has left the library"
    made = training_arguments(
        {"name": "corrected", "warmup_steps": 0.1, "adam_beta2": 0.98, "lr_scheduler_type": "cosine"}, tmp_path, **DIALS
    )
    assert (made.warmup_steps, made.adam_beta2, made.lr_scheduler_type.value) == (0.1, 0.98, "cosine")


def test_precision_auto_is_what_the_hardware_multiplies(monkeypatch: pytest.MonkeyPatch):
    for native, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert resolve_precision("auto", on_cpu=True) == expected
    assert resolve_precision("fp32", on_cpu=True) == "fp32"


@pytest.mark.long
def test_a_compiled_training_has_the_same_losses(tiny: Path, corpus: Path):
    plain, compiled = (
        train(tiny, corpus, *more)
        for more in ([], ["trainer.torch_compile=true", "trainer.torch_compile_backend=aot_eager"])
    )
    for name in ("train/loss", "eval/loss"):
        assert last(compiled, name) == pytest.approx(last(plain, name), rel=1e-5), name


def test_tf32_is_what_a_run_asks_for_and_no_score_has_it(tmp_path: Path):
    from transformers.utils.import_utils import enable_tf32

    from mlmx.evaluation.scoring import full_fp32

    def switches() -> tuple[str, bool, str]:
        matmul = torch.backends.cuda.matmul
        return torch.get_float32_matmul_precision(), matmul.allow_tf32, matmul.fp32_precision

    try:
        for wanted, found in ((True, ("high", True, "tf32")), (False, ("highest", False, "ieee"))):
            enable_tf32(True)  # as TrainingArguments does, and leaves it to whatever trains next
            use_tf32(wanted)
            assert switches() == found
            with full_fp32():
                assert switches() == ("highest", False, "ieee")
                assert torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert switches() == found
        enable_tf32(True)
        training_arguments({"name": "corrected", "use_cpu": True}, tmp_path, **DIALS)
        assert switches() == ("highest", False, "ieee")
    finally:
        use_tf32(False)
