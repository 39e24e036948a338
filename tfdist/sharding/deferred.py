"""`tfdist.deferred_weights`: a model that is built without memory for its weights."""

from __future__ import annotations

from contextlib import AbstractContextManager

from tfdist import _keras


def deferred_weights() -> AbstractContextManager[None]:
    """Makes a context in which models are built without memory for their weights.

    A weight gets its value when it is first read, as Keras's initializer would have made it.
    With `tfdist.Zero(stage=3)` or `tfdist.ModelParallel` on several processes, `fit` makes each
    weight, keeps this process's part, and goes on to the next one. So the model may be larger
    than the memory of a process. Weights and the optimizer's state stay in parts after `fit`:
    then reading a variable gathers it, and all processes must read it.

    What has no fixed seed has its value at once: initializers that are not Keras's, or that
    were given a `keras.random.SeedGenerator`. So have variables of fewer than 1024 elements.

    Returns:
        The context. Layers make their weights in their `build`, so give the model an
        `Input`, or call `model.build` here.

    Example:
        >>> import keras, tfdist
        >>> with tfdist.deferred_weights():
        ...     model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(256)])
        >>> model.compile("adam", "mse")
        >>> model.count_params()
        16640
    """
    return _keras.deferring()
