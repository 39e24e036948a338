"""The input pipeline: from the data of `fit` to each replica's stream of batches.

There are two kinds of sources. Arrays have rows, and a sampler chooses them by number.
Everything else is a sequence of global batches. For both, replica r of R takes the rows
[n*r//R, n*(r+1)//R) of a global batch of n rows: its `Share`. A share without rows carries
one padding row, which does not count.
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
