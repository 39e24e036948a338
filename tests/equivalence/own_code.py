"""Models, losses and steps as people write them: nothing is built first, nothing is weighed.

Some of what they compute is no mean over the rows of a batch, some draws noise, and some keeps
optimizers and state where nobody looks for them. One process's result is the right one.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

import tfdist
from tests.equivalence.cases import CASES, FAMILIES, Train, case, sequences, table

__all__ = ["CASES", "FAMILIES"]
L, ops = keras.layers, keras.ops


def rows(number: int = 163, columns: int = 6) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(number, columns)).astype("float32")
    return x, (2 * x[:, :1] + rng.normal(size=(number, 1))).astype("float32")


def mlp(cls: Any = keras.Model, units: int = 1, activation: Any = None) -> Any:
    inputs = keras.Input((6,))
    return cls(inputs, L.Dense(units, activation)(L.Dense(8, "tanh")(inputs)))


def updated(optimizer: Any, tape: Any, loss: Any, weights: Any) -> None:
    optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))


FIT = {"batch_size": 16, "epochs": 2, "shuffle": False}


class Gan(keras.Model):
    """Has no `call`; its optimizers are built in its first step."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = keras.Sequential([L.Dense(8, "tanh"), L.Dense(6)])
        self.judge = keras.Sequential([L.Dense(8, "tanh"), L.Dense(1)])
        self.seeds = keras.random.SeedGenerator(7)
        self.trackers = {name: keras.metrics.Mean(name=name) for name in ("made", "judged")}

    def compile(self, maker: Any, judge: Any) -> None:
        super().compile()
        self.by_part = {"maker": maker, "judge": judge}

    @property
    def metrics(self) -> list[Any]:
        return list(self.trackers.values())

    def train_step(self, x: Any) -> Any:
        noise = keras.random.normal((ops.shape(x)[0], 3), seed=self.seeds)
        with tf.GradientTape() as tape:
            scores = self.judge(x) - self.judge(self.maker(noise))
            judged = ops.mean(ops.softplus(-scores))
        updated(self.by_part["judge"], tape, judged, self.judge.trainable_weights)
        with tf.GradientTape() as tape:
            made = ops.mean(ops.softplus(-self.judge(self.maker(noise))))
        updated(self.by_part["maker"], tape, made, self.maker.trainable_weights)
        self.trackers["judged"].update_state(judged)
        self.trackers["made"].update_state(made)
        return {"d_loss": self.trackers["judged"].result(), "g": self.trackers["made"].result()}


@case("own code")
def gan_without_call(train: Train) -> tuple[Any, Any]:
    model = Gan()
    model.compile(keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.2, momentum=0.5))
    history = train(model, rows()[0], **FIT)
    return [model.maker, model.judge], history


class Sampling(L.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.seeds = keras.random.SeedGenerator(5)

    def call(self, inputs: Any) -> Any:
        mean, log_variance = inputs
        noise = keras.random.normal(ops.shape(mean), seed=self.seeds)
        return mean + ops.exp(0.5 * log_variance) * noise


class Vae(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = L.Dense(8, "tanh"), L.Dense(6)
        self.mean, self.log_variance, self.sampling = L.Dense(2), L.Dense(2), Sampling()
        self.total = keras.metrics.Mean(name="total_loss")

    @property
    def metrics(self) -> list[Any]:
        return [self.total]

    def train_step(self, x: Any) -> Any:
        with tf.GradientTape() as tape:
            hidden = self.hidden(x)
            mean, log_variance = self.mean(hidden), self.log_variance(hidden)
            made = self.out(self.sampling([mean, log_variance]))
            distance = ops.mean(ops.sum((made - x) ** 2, 1))
            divergence = 1 + log_variance - mean**2 - ops.exp(log_variance)
            loss = distance - 0.5 * ops.mean(ops.sum(divergence, 1))
        updated(self.optimizer, tape, loss, self.trainable_weights)
        self.total.update_state(loss)
        return {"loss": self.total.result()}


@case("own code")
def vae_of_random_samples(train: Train) -> tuple[Any, Any]:
    model = Vae()
    model.compile(keras.optimizers.SGD(0.02, momentum=0.9))
    return model, train(model, rows()[0], **FIT)


@case("own code")
def noise_layers(train: Train) -> tuple[Any, Any]:
    noise = [L.GaussianNoise(0.5, seed=1), L.GaussianDropout(0.3, seed=2)]
    noise += [L.AlphaDropout(0.2, seed=3)]
    model = keras.Sequential([keras.Input((6,)), *noise, L.Dense(8, "tanh"), L.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model, train(model, *rows(), **FIT)


class Accumulating(keras.Model):
    """Applies the gradients of two batches at once, in a branch of the graph."""

    def compile(self, *args: Any, **kwargs: Any) -> None:
        super().compile(*args, **kwargs)
        self.seen = keras.Variable(0, dtype="int32", trainable=False)
        self.sums = [
            keras.Variable(ops.zeros_like(v), trainable=False) for v in self.trainable_weights
        ]

    def train_step(self, data: Any) -> Any:
        x, y = data
        self.seen.assign_add(1)
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        for total, gradient in zip(
            self.sums, tape.gradient(loss, self.trainable_weights), strict=True
        ):
            total.assign_add(gradient / 2)
        tf.cond(ops.equal(self.seen, 2), self.flush, lambda: None)
        return {"loss": loss}

    def flush(self) -> None:
        sums = [ops.convert_to_tensor(total) for total in self.sums]
        self.optimizer.apply_gradients(zip(sums, self.trainable_weights, strict=True))
        self.seen.assign(0)
        for total in self.sums:
            total.assign(ops.zeros_like(total))


@case("own code")
def accumulation_by_hand(train: Train) -> tuple[Any, Any]:
    model = mlp(Accumulating)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model, train(model, *rows(), **FIT)


class Sharp(keras.Model):
    """Sharpness-aware minimization (Foret et al., 2021): gradients at moved weights."""

    @tf.function
    def train_step(self, data: Any) -> Any:
        x, y = data
        weights = self.trainable_weights
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(loss, weights)
        norm = tf.linalg.global_norm(gradients) + 1e-12
        moves = [0.05 * gradient / norm for gradient in gradients]
        for weight, move in zip(weights, moves, strict=True):
            weight.assign_add(move)
        with tf.GradientTape() as tape:
            moved = self.compute_loss(x, y, self(x, training=True))
        gradients = tape.gradient(moved, weights)
        for weight, move in zip(weights, moves, strict=True):
            weight.assign_sub(move)
        self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return {"loss": loss}


@case("own code")
def sharpness_aware(train: Train) -> tuple[Any, Any]:
    model = mlp(Sharp)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model, train(model, *rows(), **FIT)


class Quantizer(L.Layer):
    """A codebook of moving averages of sums, as a VQ-VAE has it."""

    def build(self, shape: Any) -> None:
        made = {"initializer": keras.initializers.RandomNormal(seed=3), "trainable": False}
        self.book = self.add_weight(shape=(4, 5), **made)
        self.sums = self.add_weight(shape=(4, 5), **made)
        self.counts = self.add_weight(shape=(5,), initializer="ones", trainable=False)

    def call(self, x: Any, training: bool = False) -> Any:
        book = ops.convert_to_tensor(self.book)
        distances = ops.sum(book**2, 0) - 2 * x @ book
        nearest = ops.one_hot(ops.argmin(distances, 1), 5)
        if training:
            self.counts.assign(self.counts * 0.9 + 0.1 * ops.sum(nearest, 0))
            self.sums.assign(self.sums * 0.9 + 0.1 * ops.transpose(x) @ nearest)
            self.book.assign(self.sums / (self.counts + 1e-5))
        code = nearest @ ops.transpose(book)
        self.add_loss(0.25 * ops.mean((ops.stop_gradient(code) - x) ** 2))
        return x + ops.stop_gradient(code - x)


@case("own code")
def codebook(train: Train) -> tuple[Any, Any]:
    model = keras.Sequential([keras.Input((6,)), L.Dense(4), Quantizer(), L.Dense(6)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x, _ = rows()
    return model, train(model, x, x, **FIT)


def recall(y: Any, p: Any) -> Any:
    return ops.sum(y * ops.round(p)) / (ops.sum(y) + 1e-6)


@case("own code")
def dice_and_recall_of_a_batch(train: Train) -> tuple[Any, Any]:
    x, _ = rows()
    y = (np.random.default_rng(1).random((len(x), 3)) < 0.4).astype("float32")
    model = mlp(units=3, activation="sigmoid")
    model.compile(keras.optimizers.SGD(0.5), keras.losses.Dice(), metrics=[recall])
    return model, train(model, x, y, validation_data=(x[:21], y[:21]), **FIT)


@case("own code")
def pairs_of_a_batch(train: Train) -> tuple[Any, Any]:
    def contrast(y: Any, z: Any) -> Any:
        z = ops.normalize(z, -1)
        same = ops.cast(ops.equal(y, ops.transpose(y)), z.dtype)
        return -ops.sum(same * ops.log_softmax(z @ ops.transpose(z)), -1)

    x, _ = rows()
    model = mlp(units=4)
    model.compile(keras.optimizers.SGD(0.1), contrast)
    return model, train(model, x, np.arange(len(x))[:, None] % 4, **FIT)


@case("own code")
def rows_by_rank(train: Train) -> tuple[Any, Any]:
    """Each row has its loss, but which count is known of the whole batch; rows have weights."""

    def lower(y: Any, p: Any) -> Any:
        losses = ops.mean((y - p) ** 2, -1)
        return ops.where(losses <= ops.quantile(losses, 0.7), losses, 0.0)

    def worst(y: Any, p: Any) -> Any:
        errors = ops.mean(ops.abs(y - p), -1)
        return ops.where(ops.argsort(ops.argsort(-errors)) < 5, errors, 0.0)

    x, y = rows()
    weights = np.linspace(0.5, 2.0, len(x)).astype("float32")
    model = mlp()
    model.compile(keras.optimizers.SGD(0.1), lower, metrics=[worst], weighted_metrics=[worst])
    return model, train(model, x, y, sample_weight=weights, **FIT)


class MedianError(keras.metrics.Metric):  # type: ignore[misc]
    """Keeps what it has seen in a list, as sklearn's functions want it."""

    def __init__(self) -> None:
        super().__init__(name="median")
        self.seen: list[Any] = []

    def update_state(self, y: Any, p: Any, sample_weight: Any = None) -> None:
        self.seen.append(np.abs(np.asarray(y) - np.asarray(p)).ravel())

    def result(self) -> float:
        return float(np.median(np.concatenate(self.seen))) if self.seen else 0.0

    def reset_state(self) -> None:
        self.seen = []


@case("own code")
def a_metric_of_lists(train: Train) -> tuple[Any, Any]:
    x, y = rows(37)
    model = mlp()
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=[MedianError()], run_eagerly=True)
    return model, train(model, x, y, validation_data=(x[:21], y[:21]), **FIT)


class Summing(keras.Model):
    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            loss = ops.sum((self(x, training=True) - y) ** 2)
        updated(self.optimizer, tape, loss, self.trainable_weights)
        return {"loss": loss}


@case("own code")
def sum_over_a_batch(train: Train) -> tuple[Any, Any]:
    model = mlp(Summing)
    model.compile(keras.optimizers.SGD(0.002))
    return model, train(model, *rows(), **FIT)


class Positions(L.Layer):
    def build(self, shape: Any) -> None:
        self.tokens, self.places = L.Embedding(50, 8), L.Embedding(12, 8)
        self.tokens.build(shape)
        self.places.build((12,))

    def call(self, x: Any) -> Any:
        return self.tokens(x) + self.places(ops.arange(0, ops.shape(x)[-1]))


@case("own code")
def embedded_positions(train: Train) -> tuple[Any, Any]:
    """Their rows are those of all examples; Adam's moments tell a sum from its parts."""
    inputs = keras.Input((None,), dtype="int32")
    outputs = L.Dense(1)(L.GlobalAveragePooling1D()(Positions()(inputs)))
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    x, y = sequences(161)
    return model, train(model, x, y[:, None], **FIT)


@case("own code")
def stateful_rnn(train: Train) -> tuple[Any, Any]:
    x = np.random.default_rng(0).normal(size=(96, 5, 3)).astype("float32")
    inputs = keras.Input(batch_shape=(16, 5, 3))
    model = keras.Model(inputs, L.Dense(1)(L.SimpleRNN(4, stateful=True)(inputs)))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model, train(model, x, x.sum((1, 2))[:, None], **FIT)


@case("own code")
def a_variable_of_tensorflow(train: Train) -> tuple[Any, Any]:
    """It counts the steps, which one process makes once."""

    class Decaying(keras.Model):
        def train_step(self, data: Any) -> Any:
            x, y = data
            self.made.assign_add(1.0)
            with tf.GradientTape() as tape:
                loss = ops.mean((self(x, training=True) - y) ** 2) / self.made
            updated(self.optimizer, tape, loss, self.trainable_weights)
            return {"loss": loss}

    model = mlp(Decaying)
    model.made = tf.Variable(0.0)
    model.compile(keras.optimizers.SGD(0.5))
    return model, train(model, *rows(), **FIT)


@case("own code")
def callbacks_that_predict_and_assign(train: Train) -> tuple[Any, Any]:
    x, y = rows()
    seen: dict[str, list[float]] = {"seen": []}

    class Curious(keras.callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 2:
                seen["seen"].append(float(self.model.predict(x[:5], verbose=0).sum()))

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            seen["seen"].append(float(self.model.evaluate(x[:23], y[:23], verbose=0)))
            kernel = self.model.layers[1].kernel
            kernel.assign(kernel * 0.9)
            seen["seen"].append(float(ops.sum(kernel)))

    model = mlp()
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)
    model.compile(optimizer, "mse")
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    history = train(model, x, y, callbacks=[Curious(), swap], **FIT)
    history.history |= {"seen": np.array(seen["seen"]).reshape(2, 3).tolist()}
    return model, history


@case("own code")
def losses_of_a_layer(train: Train) -> tuple[Any, Any]:
    class Summed(L.Layer):
        def call(self, x: Any) -> Any:
            self.add_loss(1e-3 * ops.sum(x**2))
            return x

    model = keras.Sequential([keras.Input((20,)), L.Dense(8, "tanh"), Summed(), L.Dense(3)])
    crossentropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), crossentropy)
    return model, train(model, *table(161), **FIT)


@case("own code")
def dice_by_column_summed(train: Train) -> tuple[Any, Any]:
    x, _ = rows()
    y = (np.random.default_rng(1).random((len(x), 3)) < 0.4).astype("float32")
    model = mlp(units=3, activation="sigmoid")
    model.compile(keras.optimizers.SGD(0.2), keras.losses.Dice(axis=0, reduction="sum"))
    return model, train(model, x, y, **FIT)


class Normalizing(keras.optimizers.SGD):
    """Divides gradients by their norm, and adds noise to its updates."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seeds = keras.random.SeedGenerator(3)

    def apply_gradients(self, grads_and_vars: Any) -> Any:
        pairs = [(g / (ops.norm(g) + 1e-6), v) for g, v in grads_and_vars]
        return super().apply_gradients(pairs)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        noise = keras.random.normal(variable.shape, seed=self.seeds)
        super().update_step(gradient + 0.1 * noise, variable, learning_rate)


class Following(keras.optimizers.Optimizer):
    """Wraps another optimizer, and follows it half the way."""

    def __init__(self, fast: Any) -> None:
        super().__init__(learning_rate=0.1)
        self.fast = fast

    def build(self, variables: Any) -> None:
        super().build(variables)
        self.fast.build(variables)
        self.slow = [self.add_variable_from_reference(v, "slow") for v in variables]

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        if not self.built:
            self.build(trainable_variables)
            self.built = True
        self.fast.apply(grads, trainable_variables)
        for slow, variable in zip(self.slow, trainable_variables, strict=True):
            slow.assign(0.5 * slow + 0.5 * variable)


@case("own code")
def optimizers_of_ones_own(train: Train) -> tuple[Any, Any]:
    class Both(keras.Model):
        def train_step(self, data: Any) -> Any:
            x, y = data
            with tf.GradientTape(persistent=True) as tape:
                loss = ops.mean((self(x, training=True) - y) ** 2)
            half = len(self.trainable_weights) // 2
            first, last = self.trainable_weights[:half], self.trainable_weights[half:]
            updated(self.by_hand, tape, loss, first)
            self.optimizer.apply(tape.gradient(loss, last), last)
            return {"loss": loss}

    model = mlp(Both)
    model.by_hand = Normalizing(0.01)
    model.compile(Following(keras.optimizers.SGD(0.1, momentum=0.9)))
    return model, train(model, *rows(), **FIT)


@case("own code")
def a_metric_that_is_no_sum(train: Train) -> tuple[Any, Any]:
    class Largest(keras.metrics.Metric):
        def __init__(self) -> None:
            super().__init__(name="largest")
            self.largest = self.add_variable((), "zeros", name="largest")

        def update_state(self, y: Any, p: Any, sample_weight: Any = None) -> None:
            self.largest.assign(ops.maximum(self.largest, ops.max(ops.abs(y - p))))

        def result(self) -> Any:
            return self.largest.value

    x, y = rows()
    model = mlp()
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=[Largest()])
    history = train(model, x, y, validation_data=(x[:30], y[:30]), **FIT)
    history.history["found"] = model.evaluate(x[:31], y[:31], batch_size=16, verbose=0)
    return model, history


@case("own code")
def weights_that_a_layer_assigns(train: Train) -> tuple[Any, Any]:
    inputs = keras.Input((6,))
    hidden = L.SpectralNormalization(L.Dense(8, "tanh"))(inputs)
    model = keras.Model(inputs, L.Dense(1)(hidden))
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model, train(model, *rows(), **FIT)


@case("own code")
def a_layer_with_a_variable_of_tensorflow(train: Train) -> tuple[Any, Any]:
    class Centred(L.Layer):
        def build(self, shape: Any) -> None:
            self.total = tf.Variable(tf.zeros(shape[-1:]), trainable=False)

        def call(self, x: Any) -> Any:
            self.total.assign_add(tf.reduce_sum(x, 0))
            return x - 0.01 * self.total

    model = keras.Sequential([keras.Input((6,)), Centred(), L.Dense(1)])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model, train(model, *rows(), **FIT)


@case("recomputed")
def recomputed_blocks(train: Train) -> tuple[Any, Any]:
    def block(number: int) -> Any:
        norm = L.BatchNormalization(synchronized=True, momentum=0.9)
        wide = L.Dense(9, "tanh", activity_regularizer="l2")
        return keras.Sequential([wide, norm, L.Dropout(0.3, seed=number), L.Dense(6)])

    model = keras.Sequential([keras.Input((6,)), *map(block, range(2)), L.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=0.5), "mse")
    tfdist.recompute(model)
    return model, train(model, *rows(), **FIT)


@case("recomputed")
def recomputed_words(train: Train) -> tuple[Any, Any]:
    words = keras.Input((12,), dtype="int32")
    embedding = L.Embedding(50, 8, mask_zero=True, name="table")
    block = keras.Sequential([L.LSTM(8, dropout=0.2, seed=1), L.Dense(8, "tanh")], name="block")
    model = keras.Model(words, L.Dense(1)(block(embedding(words))))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    tfdist.recompute(model, ["table", "block"])
    return model, train(model, *sequences(), batch_size=32, epochs=2)
