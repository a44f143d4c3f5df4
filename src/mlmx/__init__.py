"""Masked-language-model experiments whose numbers can be compared."""

__version__ = "0.1.0"
