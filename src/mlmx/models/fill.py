"""Fills for the masks of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlmx.config.errors import require
from mlmx.models.encoders import longest_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def fill_masks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, top_k: int) -> list[list[Fill]]:
    """The ``top_k`` likeliest tokens for each mask of a text, each mask filled by itself.

    ``"This is a great [MASK]."`` → ``[[Fill("movie", 0.31), …]]``. ``[MASK]`` stands for any model's mask token.
    """
    from transformers import FillMaskPipeline

    prompt = prompt_of(model, tokenizer, text)
    was_training = model.training
    model.train(False)
    try:
        pipeline: Any = FillMaskPipeline
        fill = pipeline(model=model, tokenizer=tokenizer, device=model.device)
        found = fill(prompt, top_k=min(top_k, len(tokenizer)))
    finally:
        model.train(was_training)
    per_mask = found if isinstance(found[0], list) else [found]
    return [[Fill(one["token_str"].strip(), one["score"]) for one in mask] for mask in per_mask]


def prompt_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text with the model's own mask token, if it has one and fits."""
    prompt = text.replace("[MASK]", str(tokenizer.mask_token))
    ids = tokenizer(prompt)["input_ids"]
    require(tokenizer.mask_token_id in ids, f"{text!r}: holds no [MASK] (or {tokenizer.mask_token}) to fill")
    longest = longest_input(model.config.to_dict())
    shown = text if len(text) <= 40 else f"{text[:40]}…"
    fits = longest is None or len(ids) <= longest
    require(fits, f"{shown!r}: is {len(ids)} tokens long, and the model holds at most {longest}; give a shorter text")
    return prompt


@dataclass(frozen=True)
class Fill:
    """A token proposed for a mask and its probability."""

    token: str
    probability: float
