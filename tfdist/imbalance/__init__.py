"""Tools for data in which some classes are rare: reports, losses, splits and metrics."""

from tfdist.data.class_weight import EffectiveNumber, class_weights
from tfdist.imbalance.loss import LogitAdjustedCrossentropy
from tfdist.imbalance.prior import PriorShift, correct_prior
from tfdist.imbalance.report import ImbalanceReport, report
from tfdist.imbalance.split import stratified_split

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
