"""Federated averaging as its authors describe it: a loop over clients, by a GradientTape."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tests.strategies.devices import Devices
from tfdist.federated import clients as of
from tfdist.federated.plan import RoundPlan
from tfdist.privacy.sampling.poisson import Poisson
from tfdist.strategies.base import Place

SEEDS_APART = 1_000_003


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Models and optimizers that are made here compute in float64."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        yield
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])


def batches(rows: int, size: int, first: int, count: int) -> list[slice]:
    """The rows of `count` local steps from step `first` on, without shuffling."""
    per_pass = -(-rows // size)
    begins = [step % per_pass * size for step in range(first, first + count)]
    return [slice(begin, min(begin + size, rows)) for begin in begins]


def federated_averaging(
    model: Any,
    parts: Sequence[tuple[Any, Any]],
    rounds: int,
    *,
    optimizer: Callable[[], Any],
    batch_size: int = 32,
    local_steps: int | Sequence[int] | None = None,
    server: Any = None,
    proximal: float = 0.0,
    uniform: bool = False,
    keeps: bool = False,
    chosen: Callable[[int], Sequence[int]] | None = None,
    clip: tuple[float, float] | None = None,
    quantile: tuple[float, float] | None = None,
    norms: list[float] | None = None,
    cap: int | None = None,
) -> list[float]:
    """Trains a compiled model in place; gives the mean loss of each round.

    With `clip`, a norm and a divisor, updates are clipped, added up and divided. With
    `quantile` and a learning rate, the norm follows that quantile; `norms` gets all of them.
    With `cap`, a client of n rows then has the weight min(n, cap) / cap.
    """
    weights, losses = model.trainable_variables, []
    statistics = [v for v in model.non_trainable_variables if "seed" not in v.name]
    seeds = [v for v in model.non_trainable_variables if "seed" in v.name]
    optimizers = [optimizer() for _ in parts]
    taken = [0] * len(parts)
    if server is not None:
        server.build(weights)
    for number in range(rounds):
        clients = range(len(parts)) if chosen is None else chosen(number)
        clients = [c for c in clients if len(parts[c][0])]
        sizes = np.array([1 if uniform else len(parts[c][0]) for c in clients], float)
        start = [v.numpy() for v in weights], [v.numpy() for v in statistics]
        delta = [np.zeros_like(v) for v in start[0]]
        average = [np.zeros_like(v) for v in start[1]]
        seeds_start = [v.numpy() for v in seeds]
        draws = [np.zeros_like(v) for v in seeds_start]
        loss_sum = seen = 0.0
        within = 0
        for client, part in zip(clients, sizes / sizes.sum(), strict=True):
            assign(weights, start[0])
            assign(statistics, start[1])
            own_seeds = [seed + np.array([client * SEEDS_APART, 0]) for seed in seeds_start]
            assign(seeds, own_seeds)
            if not keeps:
                optimizers[client] = optimizer()
            x, y = parts[client]
            steps = local_steps or -(-len(x) // batch_size)
            steps = steps[client] if isinstance(steps, Sequence) else steps
            for rows in batches(len(x), batch_size, taken[client], steps):
                loss = local_step(model, optimizers[client], x[rows], y[rows], proximal, start)
                loss_sum, seen = loss_sum + loss * len(x[rows]), seen + len(x[rows])
            taken[client] += steps
            update = [w - v.numpy() for w, v in zip(start[0], weights, strict=True)]
            scale = part
            if clip is not None:
                norm = np.sqrt(sum(float((u**2).sum()) for u in update))
                scale = min(1.0, clip[0] / norm) / clip[1]
                scale *= 1.0 if cap is None else min(len(x), cap) / cap
                within += 1 if norm <= clip[0] else -1
            delta = [d + scale * u for d, u in zip(delta, update, strict=True)]
            average = [a + part * v.numpy() for a, v in zip(average, statistics, strict=True)]
            draws = [d + v.numpy() - s for d, v, s in zip(draws, seeds, own_seeds, strict=True)]
        assign(seeds, [s + d for s, d in zip(seeds_start, draws, strict=True)])
        assign(statistics, average)
        if server is None:
            assign(weights, [w - d for w, d in zip(start[0], delta, strict=True)])
        else:
            assign(weights, start[0])
            server.apply([tf.constant(d) for d in delta], weights)
        losses.append(loss_sum / max(seen, 1))
        if clip is not None and norms is not None:
            norms.append(clip[0])
        if clip is not None and quantile is not None:
            fraction = within / 2 / clip[1] + 0.5
            clip = clip[0] * np.exp(-quantile[1] * (fraction - quantile[0])), clip[1]
    return losses


def rows_drawn(federated: Any, ids: Any, sizes: Sequence[int], seed: int) -> Any:
    """The rows of a client's local steps in a round, if it draws them by independent coins."""
    place = Place()
    clients = of.of_ids(ids, len(ids), Devices(1), is_local=False)
    sampler = Poisson(capacity=len(ids))
    plan = RoundPlan(federated, clients, place, sampler, 16, seed, seed)
    first, steps = np.cumsum((0, *sizes)), federated.local_steps

    def drawn(number: int, client: int) -> list[Any]:
        return [rows - first[client] for rows in plan._batches(client, steps * number, steps)]

    return drawn


def clipped_by_example(
    model: Any,
    parts: Sequence[tuple[Any, Any]],
    rounds: int,
    *,
    drawn: Callable[[int, int], list[Any]],
    clip: float,
    batch_size: int,
    proximal: float,
    rate: float = 0.3,
) -> None:
    """Averages clients that make steps of SGD with gradients clipped one by one, no noise."""
    weights = model.trainable_variables
    rows_in_all = sum(len(x) for x, _ in parts)
    for number in range(rounds):
        start = [v.numpy() for v in weights]
        total = [np.zeros_like(v) for v in start]
        for client, (x, y) in enumerate(parts):
            assign(weights, start)
            for rows in drawn(number, client):
                gradients = [np.zeros_like(v) for v in start]
                for row in rows:
                    with tf.GradientTape() as tape:
                        loss = model.loss(y[row : row + 1], model(x[row : row + 1]))
                    each = [g.numpy() for g in tape.gradient(loss, weights)]
                    norm = np.sqrt(sum(float((g**2).sum()) for g in each))
                    scale = min(1.0, clip / norm)
                    gradients = [g + scale * e for g, e in zip(gradients, each, strict=True)]
                for variable, g, w in zip(weights, gradients, start, strict=True):
                    pull = proximal * (variable.numpy() - w)
                    variable.assign_sub(rate * (g / batch_size + pull))
            part = len(x) / rows_in_all
            total = [t + part * v.numpy() for t, v in zip(total, weights, strict=True)]
        assign(weights, total)


def local_step(
    model: Any, optimizer: Any, x: Any, y: Any, proximal: float, start: Any
) -> float:
    with tf.GradientTape() as tape:
        loss = model.compute_loss(y=tf.constant(y), y_pred=model(x, training=True))
    variables = model.trainable_variables
    pairs = zip(tape.gradient(loss, variables), variables, start[0], strict=True)
    gradients = [g + proximal * (v.numpy() - w) for g, v, w in pairs]
    optimizer.apply(gradients, variables)
    return float(loss)


def assign(variables: Sequence[Any], values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def model_of(optimizer: Any, norm: bool = False, dropout: float = 0.0) -> Any:
    """A small compiled model in float64."""
    keras.utils.set_random_seed(3)
    layers: list[Any] = [keras.Input((6,)), keras.layers.Dense(5, "tanh")]
    layers += [keras.layers.BatchNormalization(momentum=0.8)] if norm else []
    layers += [keras.layers.Dropout(dropout)] if dropout else []
    model = keras.Sequential([*layers, keras.layers.Dense(3)])
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def rows_of(*sizes: int) -> list[tuple[Any, Any]]:
    """Rows of clients that differ from each other."""
    rng = np.random.default_rng(0)
    parts = []
    for number, size in enumerate(sizes):
        x = rng.normal(size=(size, 6)) + number / 2
        parts.append((x, (x[:, :3].argmax(1) + number) % 3))
    return parts
