"""A step whose loss is not finite moves no weight and is no secret; a batch that does not fit is run in parts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, TrainerCallback, TrainingArguments
from transformers import Trainer as LibraryTrainer

from mlmx.commands import main
from mlmx.config.errors import WorkError
from mlmx.kernels.memory import brief, is_out_of_memory, parts
from mlmx.models import head
from mlmx.runs.run import Run, all_runs
from mlmx.tracking.tracker import Tracker
from mlmx.training import failures
from mlmx.training.arguments import training_arguments
from mlmx.training.trainer import Trainer, run_and_save
from tests.support.models import CONFIGS, Notes, Rows, stack
from tests.support.processes import run_distributed

NAN, INF = math.nan, math.inf
STEPS = 5  # of 8 rows; a log after each
OUT_OF_MEMORY = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


class Log(Notes):
    """What a training reports, a row per point: (step, name, value)."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[int, str, float]] = []

    def log(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        assert round(epoch, 6) == round(step / STEPS, 6)
        self.points += [(step, name, value) for name, value in metrics.items()]

    def checkpoint(self, folder: Path, step: int, epoch: float) -> None:
        assert folder.is_dir()

    def of(self, name: str) -> dict[int, float]:
        steps = [step for step, found, _ in self.points if found == name]
        assert len(steps) == len(set(steps)), "a point twice"
        return {step: value for step, found, value in self.points if found == name}


class Weights(TrainerCallback):
    """All weights as one vector, after each step; `repeated` holds the steps that were done more than once."""

    def __init__(self) -> None:
        self.after: dict[int, torch.Tensor] = {}
        self.repeated: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.after:
            self.repeated.append(state.global_step)
        self.after[state.global_step] = flat(kwargs["model"])


def flat(of: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in of.parameters()])


class NoTokenizer:
    mask_token = "[MASK]"

    def save_pretrained(self, folder: str) -> None:
        pass


class Made:
    """A trainer of five steps of 8 rows on a small DistilBERT, with what it reports and its weights after each step.

    ``damage(step, inputs, logits)`` may change the logits of a training step, or raise.
    """

    def __init__(
        self,
        folder: Path,
        damage: Callable[[int, Any, torch.Tensor], torch.Tensor] = lambda step, inputs, logits: logits,
        *,
        on_nan: str = "stop",
        batch_size: int = 8,
        accumulation: int = 1,
        dropout: float = 0.0,
        name: str = "corrected",
        collator: Callable[[Any], Any] = stack,
        **options: Any,
    ) -> None:
        torch.manual_seed(1)
        loaded = AutoModelForMaskedLM.from_config(CONFIGS["distilbert"])
        for part in loaded.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = dropout
        fixed = {
            "name": name,
            "gradient_accumulation_steps": accumulation,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "train_sampling_strategy": "sequential",
        }
        dials = {"lr": 1e-3, "epochs": 1, "batch_size": batch_size, "weight_decay": 0.01, "seed": 42}
        self.log, self.weights, self.folder = Log(), Weights(), folder

        def masked_logits(trained: Any, inputs: Any, room: int | None) -> tuple[torch.Tensor, torch.Tensor]:
            logits, labels = head.masked_logits(trained, inputs, room)
            return damage(self.trainer.state.global_step + 1, inputs, logits), labels

        self.trainer = Trainer(
            name,
            training_arguments({**fixed, **options}, folder / "checkpoints", precision="fp32", **dials),
            model=loaded,
            tokenizer=NoTokenizer(),
            train_chunks=Rows([1, 12, 1, 1, 1, 3, 1, 16]),
            eval_chunks=Rows([2]),
            mask=collator,
            mlm_probability=0.15,
            masked_logits=masked_logits,
            scores=lambda trained: {},
            recorder=self.log,
            on_nan=on_nan,
        )
        self.start = flat(loaded)
        self.trainer.add_callback(self.weights)

    def run(self) -> Made:
        run_and_save(self.trainer, self.folder / "model")
        return self

    @property
    def end(self) -> torch.Tensor:
        return flat(self.trainer.model)


def at(*steps: int, value: float = NAN) -> Callable[[int, Any, torch.Tensor], torch.Tensor]:
    """Damage that makes the loss of these steps this value."""
    return lambda step, inputs, logits: logits * value if step in steps else logits


def infinite_loss(step: int, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
    """At step 3 every token but the first is impossible: the loss is infinite, its gradient is finite."""
    impossible = torch.where(torch.arange(logits.shape[1]) > 0, -INF, 0.0)
    return logits + impossible if step == 3 else logits


def bad_gradient(step: int, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
    """At step 3 the loss is right and its gradient is not a number."""
    if step == 3:
        logits.register_hook(lambda gradient: gradient * NAN)
    return logits


def bad_first_half(step: int, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
    """At step 3 the loss of the first micro-batch of two is not a number."""
    return logits * NAN if step == 3 and torch.equal(inputs["input_ids"], Rows([1]).ids[16:20]) else logits


FAULTS = {"nan": at(3), "infinite": infinite_loss, "gradient": bad_gradient, "half a batch": bad_first_half}


def moments(trainer: Any) -> list[torch.Tensor]:
    states = trainer.optimizer.state_dict()["state"].values()
    return [value.clone() for state in states for value in state.values()]


# --------------------------------------------------------------------------------------- stop and skip


def test_the_librarys_trainer_logs_nan_as_0_and_succeeds(tmp_path: Path):
    """What is guarded against."""
    torch.manual_seed(1)
    loaded = AutoModelForMaskedLM.from_config(CONFIGS["distilbert"])
    with torch.no_grad():
        next(iter(loaded.parameters())).fill_(NAN)
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=1, logging_steps=1, use_cpu=True, disable_tqdm=True)
    trainer = LibraryTrainer(model=loaded, args=arguments, train_dataset=Rows([2]), data_collator=stack)
    trainer.train()
    assert [row["loss"] for row in trainer.state.log_history if "loss" in row] == [0.0] * STEPS
    assert trainer.state.global_step == STEPS


@pytest.mark.parametrize("fault", FAULTS)
def test_stop_logs_the_true_value_and_leaves_the_weights_of_the_step_before(fault: str, tmp_path: Path):
    cut = {"batch_size": 4, "accumulation": 2} if fault == "half a batch" else {}
    made = Made(tmp_path, FAULTS[fault], save_strategy="steps", save_steps=1, **cut)
    with pytest.raises(WorkError) as stopped:
        made.run()
    loss, norm = made.log.of("train/loss"), made.log.of("train/grad_norm")
    assert list(loss) == list(norm) == [1, 2, 3]
    assert math.isfinite(loss[2])
    assert not (math.isfinite(loss[3]) and math.isfinite(norm[3]))
    assert math.isfinite(loss[3]) == (fault == "gradient")
    assert (loss[3] == INF) == (fault == "infinite")
    assert torch.equal(made.end, made.weights.after[2])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / "model").exists()
    said = str(stopped.value)
    assert said.startswith("step 3 has loss")
    assert "lower lr" in said
    assert f"python -m mlmx train resume={tmp_path} on_nan=skip resume.allow=[on_nan]" in said


def test_stop_without_a_checkpoint_names_what_can_be_done(tmp_path: Path):
    with pytest.raises(
        WorkError, match=r"step 1 has loss nan .* Choose a lower lr, or on_nan=skip to leave"
    ) as stopped:
        Made(tmp_path, at(1)).run()
    assert "resume" not in str(stopped.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_skip_leaves_the_step_out_and_the_schedule_goes_on(fault: str, tmp_path: Path):
    cut = {"batch_size": 4, "accumulation": 2} if fault == "half a batch" else {}
    made = Made(tmp_path, FAULTS[fault], on_nan="skip", **cut)
    seen: dict[int, list[torch.Tensor]] = {}
    made.trainer.add_callback(each_step(lambda step: seen.setdefault(step, moments(made.trainer))))
    made.run()
    assert torch.equal(made.weights.after[3], made.weights.after[2])
    assert not torch.equal(made.weights.after[4], made.weights.after[3])
    assert all(map(torch.equal, seen[3], seen[2])), "Adam's own state does not move either"
    assert torch.isfinite(made.end).all()
    loss, norm = made.log.of("train/failed_loss"), made.log.of("train/failed_grad_norm")
    assert list(loss) == list(norm) == [3]
    assert not (math.isfinite(loss[3]) and math.isfinite(norm[3]))
    assert made.log.of("train/skipped_steps") == {3: 1.0}
    assert list(made.log.of("train/loss")) == [1, 2, 4, 5]
    assert made.log.of("train/learning_rate")[4] == pytest.approx(1e-3 * (1 - 3 / STEPS))
    assert made.trainer.mishaps.skipped == [3]


def each_step(call: Callable[[int], Any]) -> TrainerCallback:
    class Each(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            call(state.global_step)

    return Each()


def test_the_mean_loss_is_over_the_steps_applied(tmp_path: Path):
    made = Made(tmp_path, at(2, 5), on_nan="skip").run()
    each = made.log.of("train/loss")
    together = Made(tmp_path, at(2, 5), on_nan="skip", logging_steps=STEPS).run().log
    assert together.of("train/loss") == {5: pytest.approx(sum(each.values()) / 3)}
    assert together.of("train/grad_norm") == {}, "that of the last step, which was not applied"


def test_too_many_in_a_row_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(failures, "MOST_SKIPPED_IN_A_ROW", 2)
    Made(tmp_path, at(1, 2, 4, 5), on_nan="skip").run()
    made = Made(tmp_path, at(2, 3, 4, 5), on_nan="skip")
    with pytest.raises(WorkError, match=r"step 4 has loss nan .* as had the 2 steps before it"):
        made.run()
    assert made.log.of("train/skipped_steps") == {2: 1.0, 3: 2.0}
    assert math.isnan(made.log.of("train/loss")[4])


def test_a_run_that_applied_no_step_does_not_succeed(tmp_path: Path):
    with pytest.raises(WorkError, match="step 5 has loss nan"):
        Made(tmp_path, at(1, 2, 3, 4, 5), on_nan="skip").run()


def test_in_fp16_infinite_gradients_are_the_scalers_affair_and_the_loss_is_ours(tmp_path: Path):
    """The scaler finds its scale by overflowing; it leaves those steps out by itself."""

    def overflow(step: int, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        if step == 2:
            logits.register_hook(lambda gradient: gradient * INF)
        return logits

    made = in_fp16(Made(tmp_path, overflow)).run()
    assert torch.equal(made.weights.after[2], made.weights.after[1])
    assert made.trainer.accelerator.scaler.get_scale() == 1.0
    with pytest.raises(WorkError, match="step 2 has loss nan"):
        in_fp16(Made(tmp_path, at(2))).run()
    for fault in (at(3), infinite_loss):
        made = in_fp16(Made(tmp_path, fault, on_nan="skip")).run()
        assert torch.equal(made.weights.after[3], made.weights.after[2])
        assert made.log.of("train/skipped_steps") == {3: 1.0}


def in_fp16(made: Made) -> Made:
    """With a gradient scaler as accelerate uses one in fp16, which it does on CUDA only."""
    accelerator = made.trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(accelerator._optimizers[0].optimizer)
    return made


def test_the_librarys_arithmetic_stops_too(tmp_path: Path):
    """trainer.name=stock does not log 0.0, and does not succeed."""
    made = Made(tmp_path, name="stock")
    stock = made.trainer
    stock.train_dataset, stock.eval_dataset, stock.data_collator = Rows([2]), Rows([2]), stack
    assert not stock.args.logging_nan_inf_filter
    with torch.no_grad():
        next(iter(stock.model.parameters())).fill_(NAN)
    with pytest.raises(WorkError, match="step 1 has loss nan"):
        run_and_save(stock, tmp_path / "model")
    assert math.isnan(made.log.of("train/loss")[1])


@pytest.mark.long
def test_processes_agree_on_a_step_that_fails_in_one_of_them(tmp_path: Path):
    run_distributed(one_of_two, tmp_path)
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["skipped"] == other["skipped"] == [3]
    assert one["weights"] == other["weights"]
    assert one["logged"] == [3]
    assert other["logged"] == []


def one_of_two(rank: int, folder: Path) -> None:
    """A process of a distributed training; in the second one, the loss of step 3 fails and its gradient does not."""
    made = Made(folder / str(rank), on_nan="skip", batch_size=4)
    own_loss = made.trainer.compute_loss

    def loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        return own_loss(*args, **kwargs) + (NAN if rank == 1 and made.trainer.state.global_step == 2 else 0.0)

    made.trainer.compute_loss = loss
    made.run()
    logged = [*made.log.of("train/failed_loss")]
    found = {"skipped": made.trainer.mishaps.skipped, "weights": made.end.tolist(), "logged": logged}
    (folder / f"{rank}.json").write_text(json.dumps(found))


# ------------------------------------------------------------------------------------------- rollback


def test_a_fault_that_does_not_come_again_leaves_no_trace_in_the_weights(tmp_path: Path):
    """The steps since the checkpoint are done again, and all of them count."""
    faults = iter([True])

    def once(step: int, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits * NAN if step == 4 and next(faults, False) else logits

    undisturbed = Made(tmp_path / "undisturbed", dropout=0.1).run()
    steps = {"save_strategy": "steps", "save_steps": 2}
    made = Made(tmp_path / "made", once, on_nan="rollback", dropout=0.1, **steps).run()
    assert made.weights.repeated == [3]
    assert torch.equal(made.end, undisturbed.end)
    assert made.log.of("train/loss") == undisturbed.log.of("train/loss")
    assert made.log.of("train/rollbacks") == {4: 1.0}
    assert math.isnan(made.log.of("train/failed_loss")[4])
    assert made.log.of("train/skipped_steps") == {}


def test_a_fault_that_comes_again_is_left_out_as_by_skip(tmp_path: Path):
    """From the beginning where there is no checkpoint yet; with each point once."""
    skipped = Made(tmp_path / "skipped", at(2, 4), on_nan="skip", dropout=0.1).run()
    made = Made(tmp_path / "made", at(2, 4), on_nan="rollback", dropout=0.1).run()
    assert made.weights.repeated == [1, 1, 2, 3]
    assert torch.equal(made.end, skipped.end)
    for name in ("train/loss", "train/skipped_steps", "train/learning_rate"):
        assert made.log.of(name) == skipped.log.of(name), name
    assert made.log.of("train/rollbacks") == {2: 1.0, 4: 2.0}
    assert made.trainer.mishaps.skipped == [2, 4]


def test_training_goes_back_three_times_at_most(tmp_path: Path):
    made = Made(tmp_path, at(2, 3, 4, 5), on_nan="rollback")
    with pytest.raises(WorkError, match=r"step 5 has loss nan .* after training went back from steps 2, 3, 4"):
        made.run()
    assert made.log.of("train/rollbacks") == {2: 1.0, 3: 2.0, 4: 3.0}


def test_nothing_whole_to_go_back_to_is_said(tmp_path: Path):
    def damaged(step: int, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        (tmp_path / "checkpoints/checkpoint-0/state.json").write_text("{}")
        return logits * NAN

    with pytest.raises(WorkError, match="no whole checkpoint to go back to"):
        Made(tmp_path, damaged, on_nan="rollback").run()


def test_what_went_wrong_is_part_of_a_checkpoint(tmp_path: Path):
    """A run taken up behind a skipped step, and after memory ran out, is the run that was not interrupted."""
    few = fits(4)

    def damage(step: int, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return few(step, inputs, at(1)(step, inputs, logits))

    steps = {"save_strategy": "steps", "save_steps": 1}
    whole = Made(tmp_path / "whole", damage, on_nan="skip", dropout=0.1, logging_steps=STEPS, **steps).run()
    again = Made(tmp_path / "again", at(1), on_nan="skip", dropout=0.1, logging_steps=STEPS, **steps)
    run_and_save(again.trainer, tmp_path / "model", tmp_path / "whole/checkpoints/checkpoint-3")
    assert (again.trainer.mishaps.skipped, again.trainer.mishaps.splits) == ([1], 2)
    assert torch.equal(again.end, whole.end)
    assert again.log.of("train/loss") == whole.log.of("train/loss")


# ---------------------------------------------------------------------------------------------- best


def test_a_score_that_is_not_finite_is_never_the_best(tmp_path: Path):
    best = {"metric_for_best_model": "accuracy", "greater_is_better": True, "eval_strategy": "epoch"}
    trainer = Made(tmp_path, **best).trainer
    good = {"eval_loss": 2.0, "eval_accuracy": 0.5, "eval_heldout_loss": 2.5}
    for name, value in (("eval_loss", NAN), ("eval_loss", INF), ("eval_heldout_loss", NAN)):
        assert not trainer._determine_best_metric(good | {name: value, "eval_accuracy": 1.0}, None)
    assert trainer.state.best_metric is None
    assert trainer._determine_best_metric(good, None)
    assert not trainer._determine_best_metric(good | {"eval_loss": NAN, "eval_accuracy": 0.9}, None)
    assert trainer.state.best_metric == 0.5
    assert trainer._determine_best_metric(good | {"eval_heldout_perplexity": INF, "eval_accuracy": 0.6}, None)


# ---------------------------------------------------------------------------------------------- memory


def fits(rows: int) -> Callable[[int, Any, torch.Tensor], torch.Tensor]:
    """A forward pass takes no more than so many rows."""

    def damage(step: int, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        if len(inputs["input_ids"]) > rows:
            raise RuntimeError(f"{OUT_OF_MEMORY} {len(inputs['input_ids'])}")
        return logits

    return damage


def backward_fits(rows: int, first: int) -> Callable[[int, Any, torch.Tensor], torch.Tensor]:
    """From the backward pass number ``first`` on, none takes more than so many rows; it breaks off halfway."""
    passes = iter(range(1, 1000))

    def damage(step: int, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        number = next(passes)
        if number >= first and len(inputs["input_ids"]) > rows:
            embedded = logits.grad_fn
            while embedded.next_functions:  # the last thing that a backward pass comes to
                embedded = embedded.next_functions[0][0]
            embedded.register_prehook(lambda gradients: out_of_memory())
        return logits

    return damage


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows as short as their number says, at most 16, the rest masked out."""
    batch = stack(rows)
    lengths = 4 + torch.arange(len(rows)) % 13
    real = torch.arange(16) < lengths[:, None]
    batch["labels"] = batch["labels"].masked_fill(~real, -100)
    return batch | {"attention_mask": real.long()}


@pytest.mark.parametrize(
    ("damage", "cut", "splits"),
    [
        (fits(4), {}, 2),
        (fits(3), {}, 4),
        (fits(2), {"batch_size": 4, "accumulation": 2}, 2),
        (backward_fits(2, first=4), {"batch_size": 4, "accumulation": 2}, 2),
        (fits(4), {"collator": padded}, 2),
    ],
    ids=["forward", "twice", "accumulated", "backward, in the second half", "padded"],
)
def test_a_batch_in_parts_has_the_same_loss_gradient_and_weights(
    damage: Any, cut: dict[str, Any], splits: int, tmp_path: Path, said: pytest.LogCaptureFixture
):
    whole, made = Made(tmp_path / "whole", **cut).run(), Made(tmp_path / "made", damage, **cut).run()
    assert made.trainer.mishaps.splits == splits
    for name in ("train/loss", "train/grad_norm"):
        values = [list(log.of(name).values()) for log in (made.log, whole.log)]
        assert len(values[0]) == STEPS
        assert values[0] == pytest.approx(values[1], rel=1e-6), name
    assert torch.linalg.norm(made.end - whole.end) <= 1e-6 * torch.linalg.norm(whole.end)
    assert made.trainer.throughput.tokens == whole.trainer.throughput.tokens
    told = [record.getMessage() for record in said.records if "out of memory" in record.getMessage()]
    assert len(told) == math.log2(splits), "said once, and remembered"
    assert [value for _, name, value in made.log.points if name == "perf/splits"][-1] == splits


def test_the_gradient_of_parts_is_that_of_the_whole(tmp_path: Path):
    """By the gradient itself: the norm above would not see a part in the wrong place."""
    whole, in_parts = Gradient(), Gradient()
    for damage, gradient in ((lambda step, inputs, logits: logits, whole), (fits(2), in_parts)):
        made = Made(tmp_path, damage, max_steps=1, max_grad_norm=0)
        made.trainer.add_callback(gradient)
        made.run()
    assert torch.linalg.norm(in_parts.found - whole.found) <= 1e-6 * torch.linalg.norm(whole.found)


class Gradient(TrainerCallback):
    """The gradient that the optimizer is given."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = torch.cat([p.grad.flatten().clone() for p in kwargs["model"].parameters() if p.grad is not None])


def test_the_room_for_targets_shrinks_with_the_parts(tmp_path: Path):
    """On a GPU logits have room for the most targets that a batch can have; a part needs its rows' share."""
    rooms: list[int | None] = []
    made = Made(tmp_path, fits(3), max_steps=1)
    corrected = made.trainer.corrected
    corrected.most_targets, own = 100, corrected.masked_logits
    corrected.masked_logits = lambda trained, inputs, room: (rooms.append(room), own(trained, inputs, room))[1]
    made.run()
    assert rooms == [100, 50, *[25] * 4]


def test_each_part_has_dropout_of_its_own(tmp_path: Path):
    seeds: list[int] = []

    def note(step: int, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        fits(2)(step, inputs, logits)
        seeds.append(torch.initial_seed())
        return logits

    Made(tmp_path, note, dropout=0.1, batch_size=4, accumulation=2).run()
    assert len(seeds) == len(set(seeds)) == STEPS * 4


def test_a_row_that_does_not_fit_is_said(tmp_path: Path):
    with pytest.raises(WorkError) as stopped:
        Made(tmp_path, fits(0)).run()
    said = str(stopped.value)
    assert said.startswith("out of memory at step 1 with a single row (DefaultCPUAllocator: can't allocate")
    assert "smaller chunk_size" in said
    assert "trainer.activation_checkpointing=true" in said
    assert "\n" not in said


def test_several_processes_do_not_split_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def damage(step: int, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(TrainingArguments, "world_size", 2)
        out_of_memory()

    with pytest.raises(WorkError, match="with several processes a batch is not split by itself; choose a smaller"):
        Made(tmp_path, damage).run()


def test_out_of_memory_elsewhere_is_one_line(tmp_path: Path):
    made = Made(tmp_path)
    made.trainer.add_callback(each_step(lambda step: out_of_memory()))
    with pytest.raises(WorkError, match=r"outside of forward and backward passes \(CUDA out of memory\)"):
        made.run()


def test_other_errors_are_not_taken_for_it(tmp_path: Path):
    def wrong(step: int, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Made(tmp_path, wrong).run()
    assert [is_out_of_memory(e) for e in (MemoryError(), WorkError("out of memory"), OSError("out of memory"))] == [
        True,
        False,
        False,
    ]
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert brief(torch.OutOfMemoryError("CUDA out of memory. Tried")) == "CUDA out of memory"


def test_parts_are_rows_in_order():
    batch = {"input_ids": torch.arange(10).view(5, 2), "labels": torch.arange(5)}
    cut = list(parts(batch, 2))
    assert [len(part["labels"]) for part in cut] == [2, 2, 1]
    for name, value in batch.items():
        assert torch.equal(torch.cat([part[name] for part in cut]), value)


# ---------------------------------------------------------------------------------- by the command line


def command(tiny: Path, corpus: Path, *more: str) -> list[str]:
    parts = [f"model.path={tiny}", "dataset=files", f"dataset.path={corpus}", "chunk_size=32", "precision=fp32"]
    sizes = ["dataset.train_chunks=40", "dataset.eval_chunks=8", "heldout.documents=4", "epochs=2", "lr=1e-3"]
    return ["train", *parts, *sizes, *more]


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Factors of the logits by the number of the training step of this process."""
    found: dict[int, float] = {}
    count, own = iter(range(1, 1000)), head.masked_logits

    def damaged(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logits, labels = own(*args)
        if not torch.is_grad_enabled():
            return logits, labels
        damage = found.get(next(count), 1.0)
        # infinite: every token but the first is impossible
        cut = torch.where(torch.arange(logits.shape[1]) > 0, -INF, 0.0) if damage == INF else 0.0
        return (logits + cut if damage == INF else logits * damage), labels

    monkeypatch.setattr(head, "masked_logits", damaged)
    return found


def test_a_run_that_stops_has_failed_and_can_be_resumed(
    tiny: Path, corpus: Path, faults: dict[int, float], capsys: pytest.CaptureFixture[str]
):
    faults[7] = INF
    assert main.main(command(tiny, corpus, "tracking=none")) == 1
    (run,) = all_runs()
    error = capsys.readouterr().err
    assert error.startswith("mlmx: step 7 has loss inf and a gradient of norm")
    assert error.count("\n") == 1
    result = run.read_json("result.json")
    assert (result["status"], result["resumable"]) == ("FAILED", True)
    last = [row for row in run.metrics() if "train/loss" in row][-1]
    assert (last["step"], last["epoch"], last["train/loss"]) == (7, 1.4, INF)
    assert [path.name for path in run.checkpoints.iterdir()] == ["checkpoint-5"]

    faults[9] = NAN  # the training step number 7 + 2: step 7 again
    assert main.main(["train", f"resume={run.folder}", "on_nan=skip", "resume.allow=[on_nan]"]) == 0
    assert run.status == "FINISHED"
    assert [(row["step"], row["train/skipped_steps"]) for row in run.metrics() if "train/skipped_steps" in row] == [
        (7, 1.0)
    ]
    assert math.isfinite(run.read_json("result.json")["metrics"]["train/loss"])
    assert (run.plots / "loss.png").is_file()


def test_a_run_goes_back_in_one_history(tiny: Path, corpus: Path, faults: dict[int, float]):
    faults[7] = NAN  # once: steps 6 and 7 are repeated from the checkpoint of step 5
    assert main.main(command(tiny, corpus, "tracking=none", "on_nan=rollback", "trainer.logging_steps=1")) == 0
    (run,) = all_runs()
    points = [(row["step"], name) for row in run.metrics() for name in row if "/" in name]
    assert len(points) == len(set(points))
    assert {(10, "train/loss"), (10, "heldout/loss"), (7, "train/rollbacks")} <= set(points)
    assert (7, "train/skipped_steps") not in points
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-5"]


def test_a_point_that_failed_gives_way_to_the_one_of_a_resumed_run(tmp_path: Path):
    """The run stopped at step 7 and was resumed with a lower rate: its loss there is a number, and the only one."""
    for values in ({6: 2.0, 7: NAN}, {6: 2.5, 7: NAN}, {6: 2.5, 7: 3.0}, {6: 2.5, 7: 3.5}):
        tracker = Tracker(Run(tmp_path), None)
        for step, value in values.items():
            tracker.log(step, step / 5, {"train/loss": value})
        tracker.lines.close()
    rows = [(row["step"], row["train/loss"]) for row in Run(tmp_path).metrics()]
    assert rows == [(6, 2.0), (7, pytest.approx(NAN, nan_ok=True)), (7, 3.0)]


def test_mlflow_takes_what_is_not_finite(tiny: Path, corpus: Path, store: Path, faults: dict[int, float]):
    from mlflow import MlflowClient

    faults |= {2: NAN, 3: INF}
    assert main.main(command(tiny, corpus, "on_nan=skip", "epochs=1")) == 0
    (run,) = all_runs()
    local = {row["step"]: row["train/failed_loss"] for row in run.metrics() if "train/failed_loss" in row}
    assert math.isnan(local[2])
    assert local[3] == INF
    client = MlflowClient(f"sqlite:///{store}")
    points = client.get_metric_history(run.read_json("result.json")["run_id"], "train/failed_loss")
    sent = {point.step: point.value for point in points}
    assert math.isnan(sent[2])
    assert sent[3] == sys.float_info.max, "the largest number there is stands for infinity in sqlite"


def test_a_run_that_hardly_fits_has_the_numbers_of_one_that_does(
    tiny: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
):
    """Training and scoring: three rows at once are all that fits."""

    def numbers() -> list[dict[str, Any]]:
        assert main.main(command(tiny, corpus, "tracking=none", "epochs=1")) == 0
        kinds = ("eval/", "heldout/", "final/", "train/loss", "train/grad_norm")
        rows = all_runs()[-1].metrics()
        return [{name: value for name, value in row.items() if name.startswith(kinds)} for row in rows]

    own, plenty = head.masked_logits, numbers()

    def cramped(trained: Any, inputs: Any, *more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if len(inputs["input_ids"]) > 3:
            raise RuntimeError(OUT_OF_MEMORY)
        return own(trained, inputs, *more)

    monkeypatch.setattr(head, "masked_logits", cramped)
    scarce = [row for row in numbers() if row]
    for mine, theirs in zip(scarce, [row for row in plenty if row], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert {"eval/loss", "heldout/loss"} <= scarce[0].keys()
    assert Run(all_runs()[-1].folder).status == "FINISHED"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["on_nan=skp"], "on_nan=skp: choose one of stop, skip, rollback; did you mean skip?"),
        (["on_nan=skip", "trainer=reference"], "on_nan=skip: trainer.name=stock takes every step as the library does"),
    ],
)
def test_policies_are_checked(overrides: list[str], said: str, capsys: pytest.CaptureFixture[str], outputs: Path):
    assert main.main(["train", "model=scratch", "dataset=imdb_packaged", *overrides]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not outputs.exists()
