"""What a model puts into the same held-out sentences, before training and after each epoch: a table to be compared.

``examples.json`` is in the form of MLflow's tables: ``{"columns": […], "data": [[…], …]}``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlmx.data.examples import Example
from mlmx.data.masking import batch, pad
from mlmx.evaluation import scoring
from mlmx.evaluation.measure import Measure
from mlmx.models.encoders import longest_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOP = 5


@dataclass(frozen=True)
class Fills:
    """Fills the gaps of the examples with a model, in fp32, without drawing a random number."""

    examples: Sequence[Example]
    tokenizer: PreTrainedTokenizerBase
    measure: Measure  # says how many rows fit into memory at once, mostly all of them

    def __call__(self, trained: PreTrainedModel) -> list[dict[str, Any]]:
        """A row per example that the model can hold: sentence, the word that stood there, and the likeliest ones."""
        most = longest_input(trained.config.to_dict()) or math.inf
        held = [example for example in self.examples if len(example.input_ids) <= most]
        return self.measure.within_memory(lambda: self._filled(trained, held))

    def _filled(self, trained: PreTrainedModel, held: Sequence[Example]) -> list[dict[str, Any]]:
        rows, size, top = [], self.measure.batch_size, min(TOP, len(self.tokenizer))
        with scoring.exactly(trained):
            for some in (held[first : first + size] for first in range(0, len(held), size)):
                chunks = [{"input_ids": np.array(one.input_ids, np.int64), "word_starts": None} for one in some]
                ids, _, real = pad(chunks, self.measure.vocabulary.pad_id)
                at = np.arange(len(some)) * ids.shape[1] + np.array([one.position for one in some])
                masked = batch(ids, at, self.measure.vocabulary.mask_id, real)
                parts = (part.tolist() for part in scoring.likeliest(trained, masked, top))
                for one, ids, chances, own in zip(some, *parts, strict=True):
                    row = {"sentence": one.sentence, "target": one.target, "target_probability": round(own, 4)}
                    row |= {f"fill_{n}": str(self.tokenizer.decode([token])).strip() for n, token in enumerate(ids, 1)}
                    rows.append(row | {"probabilities": " ".join(f"{chance:.4f}" for chance in chances)})
        return rows
