"""Samplers: which examples make up a global step, as a function of the seed and the step.

Nothing else decides it: not a worker's history, its rank, or the number of workers. So
every replica finds the same rows, takes its slice, and a run that is resumed at step t,
on any number of workers, goes on with the examples it would have seen. A sampler deals in
row numbers, as NumPy arrays; it never sees the data, and of the targets only the classes.
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
