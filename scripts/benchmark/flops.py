"""Useful floating-point operations of a training step: what the mathematics asks for, whoever computes it how."""

from __future__ import annotations

FORWARD_AND_BACKWARD = 6  # a multiply and an add per weight and token: once forward, twice backward


def flops_per_token(
    *, layers: int, hidden: int, intermediate: int, vocabulary: int, chunk_size: int, scored_share: float
) -> float:
    """Operations per token of one training step of a BERT-like encoder and its masked-LM head.

    Matrix products of the encoder, 6 × their weights; attention (QKᵀ and PV), 12 · layers · hidden · chunk_size; the
    head's two products, 6 × their weights × the share of positions that are scored. Embeddings, norms and
    activations are not counted, nor is anything that is computed again.

    Args:
        scored_share: positions projected onto the vocabulary: 1 for the full head, ``mlm_probability`` for what counts.
    """
    encoder = layers * (4 * hidden**2 + 2 * hidden * intermediate)
    head = hidden**2 + hidden * vocabulary
    attention = 12 * layers * hidden * chunk_size
    return FORWARD_AND_BACKWARD * (encoder + scored_share * head) + attention


def gemm_shapes(
    *, hidden: int, intermediate: int, vocabulary: int, tokens: int, scored_share: float
) -> list[tuple[int, int, int]]:
    """The matrix products of a step as (rows, inner, columns): attention, feed-forward both ways, vocabulary."""
    scored = max(1, round(tokens * scored_share))
    return [
        (tokens, hidden, hidden),
        (tokens, hidden, intermediate),
        (tokens, intermediate, hidden),
        (scored, hidden, vocabulary),
    ]
