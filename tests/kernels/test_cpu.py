"""Kernels of the CPU: dropout by the law of torch's own, attention and linear layers with the same results."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM

from mlmx.kernels import cpu
from mlmx.kernels.cpu import CpuKernels

DTYPES = [torch.float32, torch.bfloat16]


def heads(seed: int, batch: int = 3, count: int = 4, length: int = 40, size: int = 8) -> torch.Tensor:
    """float64[B, H, T, D] laid out as projections are, [B, T, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, count, size, generator=generator, dtype=torch.float64).transpose(1, 2)


@pytest.mark.parametrize("tile", [cpu.TILE, 1, 7777])
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.003, cpu.MOST])
@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_are_dropped_at_the_rate_and_the_others_scaled(
    p: float, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mlmx.kernels.cpu.TILE", tile)
    torch.manual_seed(1)
    x = torch.ones(2000, 1000, dtype=dtype, requires_grad=True)
    with CpuKernels():
        y = functional.dropout(x, p, True)
    assert (y == 0).double().mean().item() == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / y.numel()) + p * 1e-3)
    assert y[y != 0].unique().tolist() == [pytest.approx(1 / (1 - p), rel=1e-2 if dtype == torch.bfloat16 else 1e-6)]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y), "the gradient goes through what was kept, and nothing else"


def test_neighbours_are_dropped_independently():
    torch.manual_seed(2)
    with CpuKernels():
        kept = functional.dropout(torch.ones(1000, 1000), 0.3, True) > 0
    assert kept.double().mean(0).std() == pytest.approx(math.sqrt(0.3 * 0.7 / 1000), rel=0.15)
    for near in (torch.roll(kept, 1, 1), torch.roll(kept, 1, 0), torch.roll(kept, 8, 1)):
        both = (~kept & ~near).double().mean()
        assert both.item() == pytest.approx(0.09, abs=0.002)


def test_every_byte_is_as_likely_and_a_row_has_one_of_two_thresholds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mlmx.kernels.cpu.ZEROS", memoryview(bytes(1000)))  # fewer than are asked for
    torch.manual_seed(6)
    drawn, thresholds = cpu.Draws(0.1).draw(torch.Size([5000, 8, 128]))
    counts = torch.bincount(drawn.flatten().int() + 128, minlength=256).double()
    expected = drawn.numel() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * math.sqrt(2 * 255), "chi-squared"
    assert thresholds.shape == (5000, 1, 1)
    assert thresholds.unique().tolist() == [25 - 128, 26 - 128]
    assert (thresholds + 128).double().mean().item() == pytest.approx(25.6, abs=5 * math.sqrt(0.24 / 5000))


def test_a_seed_repeats_the_draw_and_another_does_not():
    x = torch.ones(20, 500)
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        with CpuKernels():
            drawn.append((functional.dropout(x, 0.1), functional.dropout(x, 0.1)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[0][1]), "two calls draw two masks"
    assert not torch.equal(drawn[0][0], drawn[2][0])


# Of 3 samples of 4 heads of 40 × 40 scores: all at once, a head, 2 of 3 that would fit, a sample, 2 samples and a rest.
TILES = [cpu.TILE, 1, 3 * 1600, 4 * 1600, 8 * 1600]
MASKS = {
    "none": None,
    "padded": (torch.arange(40) < torch.tensor([40, 25, 7])[:, None])[:, None, None, :],
    "by head": heads(7, batch=1, size=40),
    "by pair": heads(8, batch=1, count=1, size=40)[0, 0],
    "each": heads(6, size=40),
}


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("masked", MASKS)
def test_attention_is_softmax_dropout_and_product_with_their_gradients(
    masked: str, tile: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mlmx.kernels.cpu._is_ours", lambda tensor: True)  # fp64, to compare to rounding
    monkeypatch.setattr("mlmx.kernels.cpu.TILE", tile)
    query, key, value = (heads(seed).requires_grad_() for seed in range(3))
    mask, p = MASKS[masked], 0.2
    torch.manual_seed(5)
    with CpuKernels():
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=p)
    signed = out.grad_fn.saved_tensors[3].view(3, 4, 40, 40)
    scores = query @ key.mT / math.sqrt(8)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    probabilities = scores.softmax(-1)
    assert torch.allclose(signed.abs(), probabilities, atol=1e-14)
    expected = (probabilities * (signed > 0) / (1 - p)) @ value
    assert torch.allclose(out, expected, atol=1e-13)
    towards = heads(9)
    ours = torch.autograd.grad(out, (query, key, value), towards)
    theirs = torch.autograd.grad(expected, (query, key, value), towards)
    for own, other in zip(ours, theirs, strict=True):
        assert torch.allclose(own, other, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_drops_at_the_rate_and_is_right_on_average(dtype: torch.dtype):
    query, key, value = (heads(seed, length=128).to(dtype) for seed in range(3))
    total = torch.zeros(3, 4, 128, 8)
    rates = []
    for seed in range(200):
        torch.manual_seed(seed)
        with CpuKernels():
            out = functional.scaled_dot_product_attention(query.requires_grad_(), key, value, dropout_p=0.1)
        assert out.dtype == dtype
        total += out.detach().float()
        signed = out.grad_fn.saved_tensors[3]
        rates.append((torch.signbit(signed)).double().mean().item())
    assert sum(rates) / len(rates) == pytest.approx(0.1, rel=2e-3)
    whole = functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert (total / 200 - whole).abs().mean() < 0.01


def test_what_is_not_ours_stays_the_library_s():
    x = torch.randn(4, 8)
    query = heads(1).float()
    with CpuKernels():
        assert functional.dropout(x, 0.5, training=False) is x or torch.equal(functional.dropout(x, 0.5, False), x)
        assert torch.equal(functional.dropout(x, 0.0), x)
        assert not functional.dropout(x, 1.0).any()
        assert functional.dropout(x[:0], 0.1).shape == (0, 8)
        assert functional.dropout(torch.ones(9, 9, requires_grad=True), 0.999).grad_fn.name() != "_DropoutBackward"
        plain = functional.scaled_dot_product_attention(query, query, query)
        causal = functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert torch.equal(plain, functional.scaled_dot_product_attention(query, query, query))
    assert torch.equal(causal, functional.scaled_dot_product_attention(query, query, query, is_causal=True))


@pytest.mark.skipif(not cpu.ONEDNN, reason="this torch has no oneDNN")
@pytest.mark.parametrize("biased", [True, False])
def test_linear_layers_give_the_library_s_results_and_gradients(biased: bool):
    torch.manual_seed(1)
    x, weight = torch.randn(3, 20, 32, requires_grad=True), torch.randn(50, 32, requires_grad=True)
    inputs = (x, weight, torch.randn(50, requires_grad=True)) if biased else (x, weight)
    towards = torch.randn(3, 20, 50)
    with CpuKernels():
        ours = functional.linear(*inputs)
    theirs = functional.linear(*inputs)
    assert type(ours.grad_fn).__name__ == "_LinearBackward", "else this compares the library with itself"
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    for own, other in zip(*(torch.autograd.grad(out, inputs, towards) for out in (ours, theirs)), strict=True):
        assert torch.allclose(own, other, rtol=1e-5, atol=1e-5)


def test_frozen_weights_get_no_gradient():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8)
    with CpuKernels():
        functional.linear(x, weight).sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(4, 8), atol=1e-6)
    assert weight.grad is None


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
def test_over_many_masks_a_model_s_loss_and_gradients_are_distributed_as_the_library_s(dtype: torch.dtype):
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.2,  # attention far from uniform, and all that is dropped counts
        attention_probs_dropout_prob=0.3,
    )
    model = BertForMaskedLM(config).train()
    ids = torch.randint(50, (4, 24))
    times = 150

    def passes(ours: bool) -> tuple[torch.Tensor, torch.Tensor]:
        losses, gradients = [], []
        for seed in range(times):
            torch.manual_seed(times * ours + seed)
            with CpuKernels() if ours else nullcontext(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = functional.cross_entropy(model(ids).logits.flatten(0, 1).float(), ids.flatten())
            losses.append(loss.item())
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])]))
        return torch.tensor(losses), torch.stack(gradients)

    (loss, gradient), (expected_loss, expected) = passes(True), passes(False)
    error = (expected_loss.var() / times + loss.var() / times).sqrt()
    assert abs(loss.mean() - expected_loss.mean()) < 4 * error
    assert loss.std().item() == pytest.approx(expected_loss.std().item(), rel=0.25)
    by_chance = (gradient.var(0) + expected.var(0)).sum() / times
    distance = (gradient.mean(0) - expected.mean(0)).square().sum()
    assert 0.7 < distance / by_chance < 1.4
    assert gradient.var(0).sum().item() == pytest.approx(expected.var(0).sum().item(), rel=0.1)
