"""Data in which some classes are rare: what it looks like, and what to do about it."""

from tfdist.data.class_weight import EffectiveNumber, class_weights

__all__ = [
    "EffectiveNumber",
    "class_weights",
]
