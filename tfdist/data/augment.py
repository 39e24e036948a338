"""Augmentation in the input road: a function of the seed, the step and the place in it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfdist._keras import draws, keyed
from tfdist.data import leaves
from tfdist.data.epochs import START, DataPosition
from tfdist.data.source import PARALLEL, Share, Source, mapped, shortened
from tfdist.errors import ArgumentError
from tfdist.strategies.base import Place

Tensor = Any
_TRIED = 8  # examples
_CHOICE, _LAYERS = 0, 1  # what a step's seed is for: which examples, and what becomes of them


@dataclass(frozen=True, eq=False)
class Augment:
    """Changes examples at random while `fit` draws them; its `augment` argument.

    What becomes of an example is a function of the seed, the step and its place in the global
    batch, whatever the number of replicas; every example has numbers of its own, also from
    layers such as `RandomCrop` that decide once for a batch. Targets and weights stay as they
    are, and nothing but training data is changed.

    Args:
        layers: A Keras layer or several, applied in turn: those of Keras's image augmentation,
            noise layers, or layers of your own that draw by `keras.random` from a
            `SeedGenerator`. Each takes and gives one tensor, and treats examples one by one.
            For `x` that is a dict, a dict of layers by the name of the input.
        classes: The classes to change, as `y` names them: values, or columns where `y` has
            shape [examples, classes]. All if None.
        repeated: Change an example that the sampler draws r times an epoch with probability
            1 - 1/r, so that it is seen as it is once an epoch, on average. For arrays.

    Raises:
        ArgumentError: There is no layer, or one that is not a Keras layer.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> x, y = np.ones((8, 6, 6, 1), "float32"), np.array([0, 0, 0, 0, 0, 0, 0, 1])
        >>> model = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(2)])
        >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        >>> model.compile("sgd", loss)
        >>> augment = tfdist.Augment([keras.layers.RandomRotation(0.1)], repeated=True)
        >>> history = tfdist.fit(
        ...     model, x, y, sampler=tfdist.samplers.ClassBalanced(), augment=augment, verbose=0
        ... )
    """

    layers: Any
    classes: Sequence[Any] | None = None
    repeated: bool = False

    def __post_init__(self) -> None:
        lists = self.by_input.values()
        for layer in (layer for layers in lists for layer in layers):
            if not isinstance(layer, keras.Layer):
                raise ArgumentError(
                    "`layers` must be Keras layers. Received: a layer of type "
                    f"{type(layer).__name__}. Wrap a function in keras.layers.Lambda."
                )
        if not lists or not all(lists):
            raise ArgumentError(
                f"`layers` must have a layer. Received: layers={shortened(self.layers)}."
            )
        if self.classes is not None and (
            isinstance(self.classes, str | bytes) or not len(np.atleast_1d(self.classes))
        ):
            raise ArgumentError(
                "`classes` must be a list of classes, or None for all. Received: "
                f"classes={self.classes!r}."
            )

    @property
    def by_input(self) -> dict[str | None, list[Any]]:
        """The layers of each input, that of a single one under None."""
        if isinstance(self.layers, dict):
            return {name: _listed(layers) for name, layers in self.layers.items()}
        return {None: _listed(self.layers)}

    def check(self, y: Any) -> None:
        """Refuses targets that `classes` cannot be looked up in.

        Args:
            y: What has their shape and dtype.

        Raises:
            ArgumentError: There are no targets, several, or of another kind.
        """
        if y is None or tf.nest.is_nested(y) or y.shape.rank not in (1, 2):
            raise ArgumentError(
                "`classes` needs one target for each example. Received: "
                f"y={shortened(y)}. Leave `classes` out, or pass y of shape [examples]."
            )
        wanted = np.asarray(self.classes)
        if _has_columns(y):
            if wanted.dtype.kind not in "iu" or not set(wanted) <= set(range(y.shape[1])):
                raise ArgumentError(
                    "`classes` must be columns of `y`. Received: "
                    f"classes={self.classes!r} and y with shape {tuple(y.shape)}."
                )
        elif (wanted.dtype.kind in "US") != (y.dtype == tf.string):
            raise ArgumentError(
                "`classes` must be of the kind of `y`. Received: "
                f"classes={self.classes!r} and y of dtype {y.dtype.name}."
            )

    def chosen(self, y: Any) -> Any:
        """Says which examples are of `classes`.

        Args:
            y: Targets of shape [examples] or [examples, 1], or [examples, classes].

        Returns:
            Boolean tensor of shape [examples].
        """
        if _has_columns(y):
            columns = tf.gather(y, list(self.classes or ()), axis=1)
            return tf.reduce_any(tf.cast(columns, tf.float32) > 0.5, 1)
        wanted = tf.cast(np.asarray(self.classes), y.dtype)
        return tf.reduce_any(tf.reshape(y, [-1, 1]) == wanted, 1)


class _Step(NamedTuple):
    """A layer, the input that it changes, and whether it draws for each example of a batch."""

    name: str | None
    layer: Any
    by_row: bool


def _has_columns(y: Any) -> bool:
    return bool(y.shape.rank == 2 and y.shape[1] != 1)


def _listed(layers: Any) -> list[Any]:
    return list(layers) if isinstance(layers, list | tuple) else [layers]


class Augmented(Source):
    """Another source's training data, augmented.

    Args:
        source: What it is drawn from; with `augment.repeated` its batches are `(batch,
            repeats)`, the latter a float32 tensor of shape [examples].
        augment: What becomes of it.
        seed: Chooses the random numbers.
        copies: Rows of an example, if what becomes of it follows from its contents, not from
            its place in the batch: in private training it must depend on no other example.
    """

    def __init__(
        self, source: Source, augment: Augment, seed: int, copies: int | None = None
    ) -> None:
        self.source = source
        self._copies = copies
        self.augment = augment
        self.batches, self.asked_steps = source.batches, source.asked_steps
        self.flows = source.flows
        self.repeatable = source.repeatable
        self.may_be_empty = source.may_be_empty
        self.batch_size = getattr(source, "batch_size", None)
        self._seed = (
            np.random.SeedSequence((seed, *b"augment")).generate_state(2).astype(np.int64)
        )
        batch, _ = self._parts(source.spec())
        x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
        if augment.classes is not None:
            augment.check(y)
        self._steps, made = self._plan(x)
        self._spec = _with_x(batch, made)
        if copies is not None:
            self._check_alone()

    def spec(self) -> Any:
        """Gives the shapes and dtypes of a batch."""
        return self._spec

    def fingerprint(self) -> str:
        """Sums up the data and the layers."""
        configs = [f"{step.name}: {_config(step.layer)}" for step in self._steps]
        digest = hashlib.sha256("\n".join(configs).encode()).hexdigest()[:12]
        chosen = f"classes={self.augment.classes}, repeated={self.augment.repeated}"
        return f"{self.source.fingerprint()}, augmented by {digest} ({chosen})"

    @property
    def held(self) -> Any:
        """The source's examples."""
        held = self.source.held
        return None if held is None else self._parts(held)[0]

    @property
    def drawn_from(self) -> Source:
        """The source that is augmented."""
        return self.source.drawn_from

    def report(self) -> str | None:
        """Says what the source says."""
        return self.source.report()

    def go_on_after(self, epochs: int) -> None:
        """Tells the source what an earlier process has drawn."""
        self.source.go_on_after(epochs)

    def on_epoch_end(self) -> None:
        """Called when an epoch's stream has ended."""
        self.source.on_epoch_end()

    def position_after(self, steps: int) -> DataPosition:
        """Says where the source begins a new call of `fit`."""
        return self.source.position_after(steps)

    def note_iterator(self, position: DataPosition) -> None:
        """Tells the source."""
        self.source.note_iterator(position)

    def finish(self, position: DataPosition) -> None:
        """Tells the source."""
        self.source.finish(position)

    def shares(self, place: Place, position: DataPosition = START) -> Any:
        """Builds the stream of the local replicas' shares; see `Source.shares`."""
        # Where a pass's steps are not known it may have as many as are left below the next.
        number, batches = position.number, self.batches
        first_step = (number << 40 if batches is None else number * batches) + position.drawn

        def change(number: Tensor, share: Share) -> Share:
            step = first_step + number // place.local_replicas
            batch, repeats = self._parts(share.data)
            x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
            count = tf.shape(tf.nest.flatten(x)[0], tf.int64)[0]
            first = tf.constant(0, tf.int64) if share.offset is None else share.offset
            keys = None
            if self._copies is not None:
                keys = keyed.row_numbers(batch, first, self._copies)
            rows = draws.Rows(self._seed, first, count, tf.range(count), keys).of(step)
            return share._replace(data=_with_x(batch, self._changed(x, y, repeats, rows)))

        shares = self.source.shares(place, position).enumerate()
        return mapped(shares, change).prefetch(PARALLEL)

    def _parts(self, batch: Any) -> tuple[Any, Any]:
        return batch if self.augment.repeated else (batch, None)

    def _plan(self, x: Any) -> tuple[list[_Step], Any]:
        """Builds the layers and asks how they draw.

        Returns:
            What is done to each batch, and the shapes and dtypes that it gives `x`.
        """
        if any(map(leaves.is_composite, tf.nest.flatten(x))):
            raise ArgumentError(
                "`x` must be dense to be augmented. Received: x with a sparse or ragged leaf. "
                "Leave `augment` out, or convert it: tensor.to_tensor(), matrix.toarray()."
            )
        steps: list[_Step] = []
        made = x
        for name, layers in self.augment.by_input.items():
            before = x if name is None else x.get(name) if isinstance(x, dict) else None
            if before is None or tf.nest.is_nested(before):
                raise ArgumentError(
                    "`layers` of `Augment` must be a dict by the name of the input where x is "
                    f"one, and only there. Received: layers={shortened(self.augment.layers)} "
                    f"and x={shortened(x)}."
                )
            spec = before
            for layer in layers:
                given, spec = spec, draws.transformed(layer, spec)
                steps.append(_Step(name, layer, draws.draws_by_row(layer, given)))
            if self._chooses and spec.shape.as_list() != before.shape.as_list():
                raise ArgumentError(
                    "`layers` must keep the shape of examples when only some are changed. "
                    f"Received: {tuple(before.shape[1:])} becomes {tuple(spec.shape[1:])}."
                )
            made = spec if name is None else {**made, name: spec}
        return steps, made

    def _check_alone(self) -> None:
        """Sees that what becomes of examples does not depend on the others of a batch."""
        sample = self.source.sample(_TRIED)
        if sample is None:
            return
        x, _, _ = keras.utils.unpack_x_y_sample_weight(self._parts(sample)[0])
        everyone = np.arange(_TRIED)
        some = np.random.default_rng(0).permutation(_TRIED)[: _TRIED // 2]
        tried = {
            name: _jittered(x if name is None else x[name]) for name in self.augment.by_input
        }
        for name, layer, by_row in self._steps:
            before = tried[name]
            tried[name] = draws.transform(layer, before, _rows_of(everyone), by_row)
            alone = draws.transform(layer, tf.gather(before, some), _rows_of(some), by_row)
            expected, received = tf.gather(tried[name], some).numpy(), alone.numpy()
            if not np.allclose(received, expected, 1e-4, 1e-4 * np.abs(expected).max()):
                raise draws.mixes(type(layer).__name__)

    @property
    def _chooses(self) -> bool:
        return self.augment.classes is not None or self.augment.repeated

    def _changed(self, x: Any, y: Any, repeats: Any, rows: draws.Rows) -> Any:
        """Changes those examples of a share that are to be changed."""
        if not self._chooses:
            return self._through_layers(x, rows)
        chosen = tf.fill([rows.count], True)
        if self.augment.classes is not None:
            chosen &= self.augment.chosen(y)
        if repeats is not None:
            choice = rows.of(_CHOICE).uniform()
            chosen &= choice * tf.maximum(repeats, 1.0) < repeats - 1.0
        places = tf.where(chosen)[:, 0]
        number = tf.size(places)
        # Not every layer can do with no example: then one is changed for nothing.
        some = tf.cond(number > 0, lambda: places, lambda: rows.chosen[:1])
        rows = dataclasses.replace(rows, chosen=some)
        changed = self._through_layers(
            tf.nest.map_structure(lambda leaf: tf.gather(leaf, some), x), rows
        )
        return tf.nest.map_structure(
            lambda leaf, new: tf.tensor_scatter_nd_update(
                tf.cast(leaf, new.dtype), places[:, None], new[:number]
            ),
            x,
            changed,
        )

    def _through_layers(self, x: Any, rows: draws.Rows) -> Any:
        for number, (name, layer, by_row) in enumerate(self._steps):
            before = x if name is None else x[name]
            after = draws.transform(layer, before, rows.of(_LAYERS + number), by_row)
            x = after if name is None else {**x, name: after}
        return x


def _jittered(values: Any) -> Any:
    """Gives so many examples as are tried, of which no two are equal if they are floats."""
    values = tf.gather(values, np.arange(_TRIED) % values.shape[0])
    if not values.dtype.is_floating:
        return values
    noise = np.random.default_rng(1).normal(size=values.shape) * (np.std(values) or 1.0)
    return values + tf.constant(noise, values.dtype)


def _rows_of(numbers: Any) -> draws.Rows:
    """Describes examples that are told apart by their numbers."""
    count = tf.constant(len(numbers), tf.int64)
    seed, keys = tf.constant([1, 2], tf.int64), tf.constant(numbers, tf.int64)
    return draws.Rows(seed, tf.constant(0, tf.int64), count, tf.range(count), keys)


def _with_x(batch: Any, x: Any) -> Any:
    return (x, *batch[1:]) if isinstance(batch, tuple) else x


def _config(layer: Any) -> str:
    """Gives a layer's settings; seeds do not count, and names differ between workers."""
    try:
        config = _without_names(layer.get_config())
    except NotImplementedError:
        config = None
    return f"{type(layer).__qualname__} {json.dumps(config, sort_keys=True, default=repr)}"


def _without_names(config: Any) -> Any:
    if isinstance(config, dict):
        return {k: _without_names(v) for k, v in config.items() if k not in ("name", "seed")}
    return [_without_names(v) for v in config] if isinstance(config, list | tuple) else config
