"""Tools for data in which some classes are rare: reports, weights, losses and splits."""

from tfdist.data.class_weight import EffectiveNumber, class_weights
from tfdist.data.imbalance.loss import LogitAdjustedCrossentropy
from tfdist.data.imbalance.prior import PriorShift, correct_prior
from tfdist.data.imbalance.report import ImbalanceReport, report
from tfdist.data.imbalance.split import stratified_split

__all__ = [
    "EffectiveNumber",
    "ImbalanceReport",
    "LogitAdjustedCrossentropy",
    "PriorShift",
    "class_weights",
    "correct_prior",
    "report",
    "stratified_split",
]
