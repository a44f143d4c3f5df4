"""The label that every room knows."""

IGNORE_INDEX = -100  # the label of a position that is not scored, as in torch's cross-entropy
