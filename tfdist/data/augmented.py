"""A source that augments the training data of another source."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfdist._keras import draws, keyed
from tfdist.data import leaves
from tfdist.data.augment import Augment, Tensor
from tfdist.data.epochs import START, DataPosition
from tfdist.data.source import PARALLEL, Share, Source, map_elements, shortened
from tfdist.errors import ArgumentError
from tfdist.strategies.base import Place

_NUM_TRIED = 8  # examples in a check of the layers
_NUM_ATTEMPTS = 8  # with other random numbers

# A step's seed has two uses: it chooses the examples, and it seeds the layers.
_CHOICE, _LAYERS = 0, 1


class _AppliedLayer(NamedTuple):
    """A layer, the name of its input, and whether it draws numbers for each example."""

    name: str | None
    layer: Any
    by_row: bool


class Augmented(Source):
    """A source that augments the training data of another source.

    Args:
        source: The other source. With `augment.repeated` its batches are `(batch, repeats)`,
            where `repeats` is a float32 tensor of shape [examples].
        augment: The augmentation.
        seed: Chooses the random numbers.
        copies: Rows of an example in private training, otherwise None. There the random
            numbers depend on an example's contents instead of its position in the batch,
            because they must not depend on other examples.
    """

    def __init__(
        self, source: Source, augment: Augment, seed: int, copies: int | None = None
    ) -> None:
        self.source = source
        self._copies = copies
        self.augment = augment
        self.batches, self.requested_steps = source.batches, source.requested_steps
        self.spans_passes = source.spans_passes
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
        self._steps, augmented_spec = self._plan(x)
        self._spec = _with_x(batch, augmented_spec)
        if copies is not None:
            self._check_alone()

    def spec(self) -> Any:
        """Returns the shapes and dtypes of a batch."""
        return self._spec

    def fingerprint(self) -> str:
        """Returns a text that differs if the data or the layers differ."""
        configs = [f"{step.name}: {_config(step.layer)}" for step in self._steps]
        digest = hashlib.sha256("\n".join(configs).encode()).hexdigest()[:12]
        selection = f"classes={self.augment.classes}, repeated={self.augment.repeated}"
        return f"{self.source.fingerprint()}, augmented by {digest} ({selection})"

    @property
    def common_data(self) -> Any:
        """The other source's data."""
        examples = self.source.common_data
        return None if examples is None else self._parts(examples)[0]

    @property
    def drawn_from(self) -> Source:
        """The source that is augmented."""
        return self.source.drawn_from

    def report(self) -> str | None:
        """Returns the other source's report."""
        return self.source.report()

    def go_on_after(self, epochs: int) -> None:
        """Tells the source how many epochs an earlier process has drawn."""
        self.source.go_on_after(epochs)

    def on_epoch_end(self) -> None:
        """Called when an epoch's stream has ended."""
        self.source.on_epoch_end()

    def position_after(self, steps: int) -> DataPosition:
        """Returns the source's position at a new call of `fit`."""
        return self.source.position_after(steps)

    def note_iterator(self, position: DataPosition) -> None:
        """Passes the call on to the source."""
        self.source.note_iterator(position)

    def finish(self, position: DataPosition) -> None:
        """Passes the call on to the source."""
        self.source.finish(position)

    def shares(self, place: Place, position: DataPosition = START) -> Any:
        """Builds the stream of the local replicas' shares; see `Source.shares`."""
        # A pass of unknown length gets 2**40 step numbers of its own.
        number, batches = position.number, self.batches
        first_step = (
            number << 40 if batches is None else number * batches
        ) + position.num_drawn

        def change(number: Tensor, share: Share) -> Share:
            step = first_step + number // place.local_replicas
            batch, repeats = self._parts(share.data)
            x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
            count = tf.shape(tf.nest.flatten(x)[0], tf.int64)[0]
            first = tf.constant(0, tf.int64) if share.offset is None else share.offset
            keys = None
            if self._copies is not None:
                keys = keyed.row_numbers(batch, first, self._copies)
            rows = draws.TransformedRows(self._seed, first, count, tf.range(count), keys).of(
                step
            )
            return share._replace(data=_with_x(batch, self._augment(x, y, repeats, rows)))

        shares = self.source.shares(place, position).enumerate()
        return map_elements(shares, change).prefetch(PARALLEL)

    def _parts(self, batch: Any) -> tuple[Any, Any]:
        return batch if self.augment.repeated else (batch, None)

    def _plan(self, x: Any) -> tuple[list[_AppliedLayer], Any]:
        """Builds the layers and finds out how they draw random numbers.

        Returns:
            The layers in their order, and the shapes and dtypes of `x` after them.
        """
        if any(map(leaves.is_composite, tf.nest.flatten(x))):
            raise ArgumentError(
                "`x` must be dense to be augmented. Received: x with a sparse or ragged leaf. "
                "Leave `augment` out, or convert it: tensor.to_tensor(), matrix.toarray()."
            )
        steps: list[_AppliedLayer] = []
        augmented_spec = x
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
                input_spec, spec = spec, draws.transformed(layer, spec)
                steps.append(_AppliedLayer(name, layer, draws.draws_by_row(layer, input_spec)))
            if self._chooses and spec.shape.as_list() != before.shape.as_list():
                raise ArgumentError(
                    "`layers` must keep the shape of examples when only some are changed. "
                    f"Received: {tuple(before.shape[1:])} becomes {tuple(spec.shape[1:])}."
                )
            augmented_spec = spec if name is None else {**augmented_spec, name: spec}
        return steps, augmented_spec

    def _check_alone(self) -> None:
        """Checks that the change of an example does not depend on other examples of a batch."""
        sample = self.source.sample(_NUM_TRIED)
        if sample is None:
            return
        x, _, _ = keras.utils.unpack_x_y_sample_weight(self._parts(sample)[0])
        random = np.random.default_rng(0)
        # Several times: a layer may mix only where an example's number says so.
        for attempt in range(_NUM_ATTEMPTS):
            all_numbers = np.arange(_NUM_TRIED) + attempt * _NUM_TRIED
            chosen_rows = random.permutation(_NUM_TRIED)[: _NUM_TRIED // 2]
            inputs = {
                name: _jittered(x if name is None else x[name])
                for name in self.augment.by_input
            }
            for name, layer, by_row in self._steps:
                before, numbers = inputs[name], all_numbers[chosen_rows]
                inputs[name] = draws.transform(layer, before, _rows_of(all_numbers), by_row)
                alone = draws.transform(
                    layer, tf.gather(before, chosen_rows), _rows_of(numbers), by_row
                )
                expected, received = tf.gather(inputs[name], chosen_rows).numpy(), alone.numpy()
                if not np.allclose(received, expected, 1e-4, 1e-4 * np.abs(expected).max()):
                    raise draws.mixes(type(layer).__name__)

    @property
    def _chooses(self) -> bool:
        return self.augment.classes is not None or self.augment.repeated

    def _augment(self, x: Any, y: Any, repeats: Any, rows: draws.TransformedRows) -> Any:
        """Changes the chosen examples of a share."""
        if not self._chooses:
            return self._through_layers(x, rows)
        is_chosen = tf.fill([rows.count], True)
        if self.augment.classes is not None:
            is_chosen &= self.augment.chosen(y)
        if repeats is not None:
            choice = rows.of(_CHOICE).uniform()
            is_chosen &= choice * tf.maximum(repeats, 1.0) < repeats - 1.0
        places = tf.where(is_chosen)[:, 0]
        number = tf.size(places)
        # Not every layer accepts an empty batch: then one example is changed and not used.
        chosen_rows = tf.cond(number > 0, lambda: places, lambda: rows.chosen[:1])
        rows = dataclasses.replace(rows, chosen=chosen_rows)
        augmented = self._through_layers(
            tf.nest.map_structure(lambda leaf: tf.gather(leaf, chosen_rows), x), rows
        )
        return tf.nest.map_structure(
            lambda leaf, new: tf.tensor_scatter_nd_update(
                tf.cast(leaf, new.dtype), places[:, None], new[:number]
            ),
            x,
            augmented,
        )

    def _through_layers(self, x: Any, rows: draws.TransformedRows) -> Any:
        for number, (name, layer, by_row) in enumerate(self._steps):
            before = x if name is None else x[name]
            after = draws.transform(layer, before, rows.of(_LAYERS + number), by_row)
            x = after if name is None else {**x, name: after}
        return x


def _jittered(values: Any) -> Any:
    """Returns `_NUM_TRIED` examples with noise, so that no two float examples are equal."""
    values = tf.gather(values, np.arange(_NUM_TRIED) % values.shape[0])
    if not values.dtype.is_floating:
        return values
    noise = np.random.default_rng(1).normal(size=values.shape) * (np.std(values) or 1.0)
    return values + tf.constant(noise, values.dtype)


def _rows_of(numbers: Any) -> draws.TransformedRows:
    """Describes examples whose random numbers depend on these numbers."""
    count = tf.constant(len(numbers), tf.int64)
    seed, keys = tf.constant([1, 2], tf.int64), tf.constant(numbers, tf.int64)
    return draws.TransformedRows(seed, tf.constant(0, tf.int64), count, tf.range(count), keys)


def _with_x(batch: Any, x: Any) -> Any:
    return (x, *batch[1:]) if isinstance(batch, tuple) else x


def _config(layer: Any) -> str:
    """Returns a layer's settings without seeds and names: names differ between workers."""
    try:
        config = _without_names(layer.get_config())
    except NotImplementedError:
        config = None
    return f"{type(layer).__qualname__} {json.dumps(config, sort_keys=True, default=repr)}"


def _without_names(config: Any) -> Any:
    if isinstance(config, dict):
        return {k: _without_names(v) for k, v in config.items() if k not in ("name", "seed")}
    return [_without_names(v) for v in config] if isinstance(config, list | tuple) else config
