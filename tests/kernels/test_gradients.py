"""The norm of all gradients is exact, and training uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from mlmx.kernels import cpu
from tests.support.trainings import last, train

SHAPES = [(30522, 96), (96, 96), (96,), (8, 8, 3), (1, 50_000), ()]


def with_gradients(*shapes: tuple[int, ...], size: float = 1.0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * size
    return [*parameters, torch.nn.Parameter(torch.zeros(3))]  # one that has none


def exact(parameters: list[torch.nn.Parameter]) -> float:
    return sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None) ** 0.5


def test_the_norm_is_that_of_fp64():
    parameters = with_gradients(*SHAPES)
    assert cpu.total_norm(parameters).item() == pytest.approx(exact(parameters), rel=1e-6)
    assert cpu.total_norm(with_gradients()).item() == 0.0


def test_gradients_are_scaled_to_the_norm_and_not_touched_within_it():
    parameters = with_gradients(*SHAPES, size=0.01)
    before = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    norm = exact(parameters)
    assert cpu.clip(parameters, norm * 1.01).item() == pytest.approx(norm, rel=1e-5)
    assert all(torch.equal(parameter.grad, one) for parameter, one in zip(parameters, before, strict=False))
    assert cpu.clip(parameters, 0.5).item() == pytest.approx(norm, rel=1e-5)
    assert exact(parameters) == pytest.approx(0.5, rel=1e-5)
    for parameter, one in zip(parameters, before, strict=False):
        assert torch.allclose(parameter.grad, one * 0.5 / norm, rtol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_that_of_clipped_gradients(fused: bool):
    ours, theirs = (with_gradients((64, 32), (33,), size=0.1) for _ in range(2))
    steps = [torch.optim.AdamW(parameters, lr=1e-2, fused=fused) for parameters in (ours, theirs)]
    for size in (1.0, 0.001, 2.0):  # clipped, not clipped, clipped
        for parameters in (ours, theirs):
            for parameter, new in zip(parameters, with_gradients((64, 32), (33,), size=size), strict=True):
                parameter.grad = new.grad
        cpu.clip(ours, 0.7, steps[0])
        torch.nn.utils.clip_grad_norm_(theirs, 0.7)
        for optimizer in steps:
            optimizer.step()
        for one, other in zip(ours, theirs, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-9)
            if one.grad is not None:
                assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(bad: float):
    parameters = with_gradients((4, 4), (3,))
    parameters[0].grad[1, 2] = bad
    assert not cpu.clip(parameters, 1.0).isfinite()


def test_training_clips_by_it_and_logs_it(tiny: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch):
    def other(*_: Any, **__: Any) -> None:
        raise AssertionError("the norm that is not exact")

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", other)
    one_step = ["dataset.train_chunks=8", "trainer.logging_strategy=steps", "trainer.logging_steps=1"]
    runs = [train(tiny, corpus, *one_step, f"trainer.max_grad_norm={most}") for most in (0, 1e-3)]
    norms = [last(run, "train/grad_norm") for run in runs]
    assert norms[0] == norms[1] > 1e-3
