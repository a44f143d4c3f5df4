"""What a model puts into the same held-out sentences, before training and after each epoch: a table to be compared.

``examples.json`` is in the form of MLflow's tables: ``{"columns": […], "data": [[…], …]}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlmx import masking, model
from mlmx.data import Example
from mlmx.measure import fast_kernels

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOP = 5


@dataclass(frozen=True)
class Fills:
    """Fills the gaps of the examples with a model; in one batch, in fp32, without drawing a random number."""

    examples: Sequence[Example]
    tokenizer: PreTrainedTokenizerBase
    vocabulary: masking.Vocabulary

    def __call__(self, trained: PreTrainedModel) -> list[dict[str, Any]]:
        """A row per example that the model can hold: sentence, the word that stood there, and the likeliest ones."""
        from mlmx import scoring

        held = [example for example in self.examples if model.holds(trained, len(example.input_ids))]
        if not held:
            return []
        with fast_kernels(trained):
            found = scoring.likeliest(trained, self._batch(held), model.masked_logits, min(TOP, len(self.tokenizer)))
        return [
            {
                "sentence": example.sentence,
                "target": example.target,
                "target_probability": round(own, 4),
                **{f"fill_{n}": str(self.tokenizer.decode([token])).strip() for n, token in enumerate(ids, start=1)},
                "probabilities": " ".join(f"{probability:.4f}" for probability in probabilities),
            }
            for example, ids, probabilities, own in zip(held, *(part.tolist() for part in found), strict=True)
        ]

    def _batch(self, held: Sequence[Example]) -> dict[str, torch.Tensor]:
        rows = [{"input_ids": np.array(example.input_ids, np.int64), "word_starts": None} for example in held]
        ids, _, real = masking.pad(rows, self.vocabulary.pad_id)
        at = np.arange(len(held)) * ids.shape[1] + np.array([example.position for example in held])
        return masking.batch(ids, at, self.vocabulary.mask_id, real)
