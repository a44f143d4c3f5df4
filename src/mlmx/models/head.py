"""The masked-positions head: hidden states are gathered where labels are set, before the vocabulary projection.

Only targets have a loss, so no other position needs logits; nor, behind the last attention, anything at all: from
there on each position is computed by itself, and the last layer's networks are spent on targets alone.
Loss and gradients are those of the full head.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

from mlmx.config.labels import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutput

log = logging.getLogger("mlmx")

# Architecture → the module of its encoder that gets a position's states, and the residual's, where nothing but that
# position counts any more, "" for what follows the whole encoder: where layers share their weights (ALBERT) or the
# residual is added outside any module (ModernBERT).
IN_LAST_LAYER = "encoder.layer.-1.attention.output"
GATHERED_BEFORE = {
    "albert": "",
    "modernbert": "",
    **dict.fromkeys(("bert", "camembert", "deberta-v2", "electra", "roberta", "xlm-roberta"), IN_LAST_LAYER),
    "distilbert": "transformer.layer.-1.sa_layer_norm",
    "mpnet": "encoder.layer.-1.attention.LayerNorm",
}


def masked_logits(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], room: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the masked positions only: float[M, V], long[M].

    A hook gathers them, so that wrapped models (DDP, compiled ones) run through their own ``forward``. Of an
    architecture that is not in the table, all positions are projected and the others dropped.

    With ``room`` so many rows are returned whatever M is, the surplus not scored: shapes that never change need no word
    from the device, and what is made for a shape is made once. Logits are NaN where M exceeds it.
    """
    import torch  # noqa: PLC0415 (slow to import)

    own: Any = model  # the transformers model inside DDP or torch.compile wrappers
    while hasattr(own, "module") or hasattr(own, "_orig_mod"):
        own = own.module if hasattr(own, "module") else own._orig_mod  # noqa: SLF001 (torch.compile has no public one)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"].flatten()
    chosen = labels.ne(IGNORE_INDEX)
    lost = None
    if room is None:
        positions = chosen.nonzero().squeeze(1)
    else:
        room = min(room, len(labels))
        positions = chosen.to(torch.int8).argsort(descending=True, stable=True)[:room]
        lost = torch.where(chosen.sum() > room, torch.nan, 0.0)
    if own.config.model_type not in GATHERED_BEFORE:
        _say_full_head(own.config.model_type)
        return _rows(model(**inputs).logits, positions, lost), labels[positions]
    gather, place = _Gather(positions, lost), _place(own)
    if place is None:
        hook = own.base_model.register_forward_hook(gather.output)
    else:
        hook = place.register_forward_pre_hook(gather.inputs)
    try:
        return model(**inputs).logits.squeeze(0), labels[positions]
    finally:
        hook.remove()


def _rows(states: torch.Tensor, positions: torch.Tensor, lost: torch.Tensor | None) -> torch.Tensor:
    """[B, T, D] → [M, D], plus ``lost``: NaN where not every target has found room."""
    # Not by indexing: its backward pass has to expect a position twice, and takes several times as long.
    rows = states.reshape(-1, states.shape[-1]).index_select(0, positions)
    return rows if lost is None else rows + lost.to(rows.dtype)


class _Gather:
    """Hooks that give a module, or what follows the encoder, the rows at ``positions``: [B, T, D] → [1, M, D]."""

    def __init__(self, positions: torch.Tensor, lost: torch.Tensor | None) -> None:
        self.positions, self.lost = positions, lost

    def inputs(self, _module: torch.nn.Module, states: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(_rows(each, self.positions, self.lost).unsqueeze(0) for each in states)

    def output(self, _module: torch.nn.Module, _inputs: object, output: BaseModelOutput) -> BaseModelOutput:
        assert output.last_hidden_state is not None
        output.last_hidden_state = _rows(output.last_hidden_state, self.positions, self.lost).unsqueeze(0)
        return output


def _place(own: PreTrainedModel) -> torch.nn.Module | None:
    """The module before which to gather, None for behind the encoder."""
    place: torch.nn.Module = own.base_model
    path = GATHERED_BEFORE[own.config.model_type]
    # Activation checkpointing runs a layer a second time, when the hook is gone; DeBERTa's first layer may have a
    # convolution over neighbours behind it.
    if not path or getattr(own, "is_activation_checkpointing", False) or own.config.num_hidden_layers < 2:
        return None
    for name in path.split("."):
        place = place[int(name)] if name == "-1" else getattr(place, name)  # type: ignore[index]
    return place


@cache  # said once
def _say_full_head(kind: str) -> None:
    so = "all positions are projected, with the same numbers and more time"
    log.info("head     %s is not in the table of masked-positions heads: %s", kind, so)
