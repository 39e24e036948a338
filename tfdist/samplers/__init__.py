"""Samplers choose the examples of each global step, as a function of the seed and the step.

The choice depends on nothing else: not on a worker's history, its rank, or the number of
workers. So every replica computes the same rows and takes its slice. A run that resumes at
step t, on any number of workers, goes on with the same examples. A sampler returns row
numbers, as NumPy arrays. It never sees the data, and of the targets only the classes.
"""

from tfdist.samplers.balanced import ByQuota, ClassBalanced, Oversample, Undersample
from tfdist.samplers.base import Sampler, Sequential, Uniform, from_shuffle
from tfdist.samplers.permutation import Rows, permute
from tfdist.samplers.stratified import Stratified
from tfdist.samplers.weighted import Weighted

__all__ = [
    "ByQuota",
    "ClassBalanced",
    "Oversample",
    "Rows",
    "Sampler",
    "Sequential",
    "Stratified",
    "Undersample",
    "Uniform",
    "Weighted",
    "from_shuffle",
    "permute",
]
