"""Metrics of each class after each epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from tfdist import _keras, data
from tfdist.errors import ArgumentError
from tfdist.figures import new_figure
from tfdist.samplers import Sequential
from tfdist.strategies.base import Strategy

Counts = NDArray[np.int64]
_MOST_NUMBERED = 20  # with more classes, the numbers do not fit into the cells of a picture


class PerClassMetrics(keras.callbacks.Callback):  # type: ignore[misc]
    """Computes precision, recall, F1 and support of each class after each epoch.

    The model predicts the given data on all replicas, every row once. So the metrics are exact
    for every strategy. They are added to the logs, and appear in `History` and in later
    callbacks as `val_precision_<class>`, `val_recall_<class>`, `val_f1_<class>`,
    `val_support_<class>`, `val_macro_f1` and `val_balanced_accuracy`. The balanced accuracy is
    the mean recall of the classes that occur (Brodersen et al., "The balanced accuracy and its
    posterior distribution", ICPR 2010). A metric whose divisor is 0 is 0.

    Args:
        x: Arrays of shape [rows, ...], nested as in `fit`.
        y: Class numbers of shape [rows] or [rows, 1], or one-hot of shape [rows, classes].
        batch_size: Rows of one step over all replicas; 32 if None.
        threshold: For an output of shape [rows, 1]: values above it mean the second class. Use
            0.5 for probabilities, 0 for logits.
        class_names: The name of each class; its number if None.
        prefix: The prefix of the names in the logs.
        picture: A file for a picture of the last confusion matrix, in any format of
            matplotlib, or None. The chief writes it when training ends.

    Attributes:
        confusion: Int64 array of shape [classes, classes] after the last epoch: rows of
            class i for which the model predicts class j.

    Raises:
        ArgumentError: Lengths differ, `y` is not classes, or does not match the output.
        MissingPackageError: `picture` is given, and matplotlib is not installed.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> x, y = np.ones((10, 4), "float32"), np.arange(10) // 8
        >>> metrics = tfdist.PerClassMetrics(x, y)
        >>> history = tfdist.fit(model, x, y, callbacks=[metrics], verbose=0)
        >>> history.history["val_support_1"] == [2]
        True
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        batch_size: int | None = None,
        threshold: float = 0.5,
        class_names: Any = None,
        prefix: str = "val_",
        picture: Any = None,
    ) -> None:
        super().__init__()
        if not data.is_arrays(x):
            raise ArgumentError(
                "`x` must be arrays, to be predicted after each epoch. Received: x of type "
                f"{type(x).__name__}."
            )
        if picture is not None:
            new_figure()  # so that a missing package is found before training
        self.x = x
        self.labels = _class_numbers(y)
        self.batch_size = batch_size
        self.threshold = threshold
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.prefix = prefix
        self.picture = picture
        self.strategy: Strategy | None = None  # set by `tfdist.fit`
        self.confusion: Counts | None = None

    @property
    def counted_rows(self) -> Any:
        """The rows that are counted one by one; see `training.callback_kinds`."""
        return self.x

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Predicts, counts, and adds the metrics to the logs."""
        self.confusion = self._count(np.asarray(self._predict()))
        figures = per_class(self.confusion)
        names = self.class_names or [str(number) for number in range(len(self.confusion))]
        figures_by_name = {
            f"{self.prefix}{figure}_{name}": value
            for figure, values in figures.items()
            for name, value in zip(names, values, strict=True)
        }
        occurs = np.array(figures["support"]) > 0
        figures_by_name[f"{self.prefix}macro_f1"] = float(np.mean(figures["f1"]))
        recall = np.array(figures["recall"])[occurs]
        figures_by_name[f"{self.prefix}balanced_accuracy"] = float(recall.mean())
        if logs is not None:
            logs.update(figures_by_name)

    def on_train_end(self, logs: Any = None) -> None:
        """Writes the picture, on the chief."""
        chief = self.strategy is None or self.strategy.place.is_chief
        if self.picture is not None and self.confusion is not None and chief:
            Path(self.picture).parent.mkdir(parents=True, exist_ok=True)
            self.figure().savefig(self.picture)

    def figure(self) -> Any:
        """Draws the last confusion matrix, shaded by the share of each class's rows.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ArgumentError: No epoch has ended.
            MissingPackageError: matplotlib is not installed.
        """
        if self.confusion is None:
            raise ArgumentError(
                "`figure` needs a confusion matrix. Received: a callback before its first "
                "epoch ended. Call it after fit."
            )
        size = len(self.confusion)
        support = np.maximum(self.confusion.sum(1, keepdims=True), 1)
        shares = self.confusion / support
        side = max(3.5, min(12.0, 1.5 + 0.45 * size))
        figure = new_figure(figsize=(side, side))
        axes = figure.subplots()
        axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        if size <= _MOST_NUMBERED:
            names = self.class_names or [str(number) for number in range(size)]
            axes.set_xticks(range(size), names, rotation=90 if max(map(len, names)) > 3 else 0)
            axes.set_yticks(range(size), names)
            for (i, j), count in np.ndenumerate(self.confusion):
                color = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, str(count), ha="center", va="center", color=color)
        return figure

    def _predict(self) -> Any:
        if self.strategy is None:  # Keras's own `fit`
            return self.model.predict(self.x, batch_size=self.batch_size, verbose=0)
        settings = data.SourceSettings(
            self.batch_size, None, Sequential(), shuffle=False, seed=0, training=False
        )
        source = data.read(self.x, None, None, settings)
        stream = data.Stream(source, self.strategy)
        adapter = _keras.StreamAdapter(stream, source.steps, stream.on_epoch_end)
        # Not `tfdist.predict`: `fit` has placed the model already.
        return _keras.PREDICT(self.model, adapter, verbose=0)

    def _count(self, outputs: Any) -> Counts:
        size = 2 if outputs.ndim == 2 and outputs.shape[1] == 1 else outputs.shape[-1]
        is_matrix = (
            outputs.ndim == 2 and len(outputs) == len(self.labels) and len(self.labels) > 0
        )
        if (
            not is_matrix
            or self.labels.max() >= size
            or len(self.class_names or range(size)) != size
        ):
            raise ArgumentError(
                "`PerClassMetrics` needs outputs of shape [rows, classes], a class number for "
                "each row, and a name for each class, if any. Received: outputs of shape "
                f"{outputs.shape}, {len(self.labels)} labels up to "
                f"{self.labels.max(initial=0)}, and class_names={self.class_names}."
            )
        if outputs.shape[1] == 1:
            predicted = (outputs[:, 0] > self.threshold).astype(np.int64)
        else:
            predicted = outputs.argmax(1)
        pair_counts = np.bincount(self.labels * size + predicted, minlength=size * size)
        matrix: Counts = pair_counts.reshape(size, size)
        return matrix


def per_class(confusion: Counts) -> dict[str, list[Any]]:
    """Computes the metrics of each class from a confusion matrix.

    Args:
        confusion: As in `PerClassMetrics`.

    Returns:
        Lists by the metric's name: precision, recall, f1, support.
    """
    correct, support, predicted_as = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    return {
        "precision": (correct / np.maximum(predicted_as, 1)).tolist(),
        "recall": (correct / np.maximum(support, 1)).tolist(),
        "f1": (2 * correct / np.maximum(support + predicted_as, 1)).tolist(),
        "support": support.tolist(),
    }


def _class_numbers(y: Any) -> Counts:
    labels = np.asarray(y)
    if labels.ndim == 2 and labels.shape[1] > 1:
        one_hot = ((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all()
        numbers = labels.argmax(1) if one_hot else None
    else:
        flat = labels.reshape(-1) if labels.ndim in (1, 2) else labels
        whole = (
            labels.ndim in (1, 2) and labels.dtype.kind in "buif" and (flat == flat // 1).all()
        )
        numbers = flat.astype(np.int64) if whole and (flat >= 0).all() else None
    if numbers is None:
        raise ArgumentError(
            "`y` must be class numbers from 0 on of shape [rows], or one-hot of shape [rows, "
            f"classes]. Received: y with shape {labels.shape} and dtype {labels.dtype}."
        )
    class_numbers: Counts = numbers.astype(np.int64)
    return class_numbers
