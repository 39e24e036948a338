"""From what `fit` was given to each replica's stream of shares.

Two roads. Arrays have rows that a sampler chooses by number. Everything else is a
sequence of global batches. On both, replica r of R takes rows [n*r//R, n*(r+1)//R) of a
global batch of n, and a share without rows carries one row that counts nothing.
"""

from tfdist.data.augment import Augment
from tfdist.data.by_class import ByClass
from tfdist.data.columns import is_arrays, split
from tfdist.data.differences import difference
from tfdist.data.epochs import DataPosition
from tfdist.data.leaves import is_composite
from tfdist.data.local import LocalShard, local_shard
from tfdist.data.reading import read
from tfdist.data.settings import SourceSettings
from tfdist.data.source import Share, Source, bounds, no_groups
from tfdist.data.stream import Epoch, Stream

__all__ = [
    "Augment",
    "ByClass",
    "DataPosition",
    "Epoch",
    "LocalShard",
    "Share",
    "Source",
    "SourceSettings",
    "Stream",
    "bounds",
    "difference",
    "is_arrays",
    "is_composite",
    "local_shard",
    "no_groups",
    "read",
    "split",
]
