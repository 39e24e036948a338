"""Audits of trained models by membership inference, with or without canaries."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from tfdist.errors import ArgumentError
from tfdist.privacy.accounting.arguments import check_count
from tfdist.privacy.audit_scores.membership import AuditReport
from tfdist.privacy.mechanism import example_losses

Score = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True, eq=False)
class Canaries:
    """Data in which a fair coin decided for each canary whether it is left out.

    Attributes:
        x: The inputs to train on: all rows except the canaries that were left out.
        y: The targets of `x`.
        rows: The numbers of the canaries' rows in the original data, shape [canaries].
        included: Whether each canary is in `x`, bool of shape [canaries].
        canary_x: The inputs of all canaries, in the order of `rows`.
        canary_y: The targets of `canary_x`.
    """

    x: Any
    y: Any
    rows: NDArray[np.int64]
    included: NDArray[np.bool_]
    canary_x: Any
    canary_y: Any


def canaries(x: Any, y: Any, rows: Any, seed: int | None = None) -> Canaries:
    """Throws a coin for each of some rows, the canaries, and leaves it out on tails.

    Call it before training, on the data for `fit`. After training, `audit(model, canaries)`
    bounds epsilon from below (Steinke, Nasr and Jagielski, "Privacy auditing with one (1)
    training run", NeurIPS 2023). The bound is best for rows that the model can only memorize,
    such as rows with wrong labels, or artificial rows that you append to the data. Hundreds of
    canaries are needed: m canaries that are all guessed right show an epsilon of about
    ln(m / 3). The number of rows reveals how many canaries were included. The accounting of
    tfdist assumes that this number is public.

    Args:
        x: Inputs: an array of shape [rows, ...], or several, nested as the model takes them.
        y: Targets, in the same form.
        rows: The number of canaries, which are chosen at random, or an array of the numbers of
            the rows to use.
        seed: The seed of the choice and the coins. None takes it from the operating system.
            Workers that train together must pass the same seed.

    Returns:
        The data to train on, and the canaries.

    Raises:
        ArgumentError: There are too few rows, or a row number is repeated or does not exist.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> rng = np.random.default_rng(0)
        >>> x, y = np.eye(400, dtype="float32"), rng.choice([-1.0, 1.0], size=(400, 1))
        >>> found = tfdist.privacy.canaries(x, y, rows=300, seed=1)
        >>> layer = keras.layers.Dense(1, use_bias=False)
        >>> model = keras.Sequential([keras.Input((400,)), layer])
        >>> model.compile(keras.optimizers.SGD(20.0), "mse")
        >>> history = tfdist.fit(model, found.x, found.y, epochs=5, batch_size=50, verbose=0)
        >>> tfdist.privacy.audit(model, found).epsilon_lower_bound(delta=1e-5) > 1
        True
    """
    if seed is not None:
        check_count("seed", seed, 0)
    rng = np.random.default_rng(secrets.randbits(128) if seed is None else seed)
    total = _num_rows(x, y)
    if np.ndim(rows) == 0:
        check_count("rows", rows, 2)
        if rows > total:
            raise ArgumentError(
                f"`rows` must be at most the number of rows, {total}. Received: rows={rows}. "
                "Pass a smaller number."
            )
        row_numbers = np.sort(rng.choice(total, int(rows), replace=False))
    else:
        row_numbers = np.asarray(rows)
        _check_rows(row_numbers, total)
    included = rng.integers(0, 2, len(row_numbers)).astype(bool)
    in_training = np.ones(total, bool)
    in_training[row_numbers[~included]] = False
    return Canaries(
        _rows_of(x, in_training),
        _rows_of(y, in_training),
        row_numbers.astype(np.int64),
        included,
        _rows_of(x, row_numbers),
        _rows_of(y, row_numbers),
    )


def audit(
    model: Any,
    members: Canaries | tuple[Any, Any],
    non_members: tuple[Any, Any] | None = None,
    *,
    score: Score | None = None,
    reference: Any = None,
    batch_size: int = 256,
) -> AuditReport:
    """Attacks a trained model, and measures how well members of its data are recognized.

    The attack is that of Yeom et al. ("Privacy risk in machine learning", CSF 2018): examples
    with a small loss are taken for members. With a reference model, examples whose loss is
    smaller than with the reference are taken for members. This separates memorized examples
    from easy ones (Watson et al., "On the importance of difficulty calibration in membership
    inference attacks", ICLR 2022).

    Args:
        model: The trained `keras.Model`.
        members: `Canaries`, or inputs and targets that the model was trained on, as `(x, y)`.
        non_members: Inputs and targets that the model was not trained on, from the same
            distribution. Any other difference would be taken for an effect of training. None
            with `Canaries`.
        score: A function from `(model, x, y)` to a score for each example, shape [examples]. A
            higher score means a likelier member. None is the negative loss.
        reference: A model that was trained on none of the examples, such as the model before
            training. It must be compiled with the same loss.
        batch_size: The number of examples that are computed at once.

    Returns:
        An `AuditReport`. It is computed from the members without noise, so it is not private.

    Raises:
        ArgumentError: `non_members` are missing, the model has no loss and there is no
            `score`, or a score is NaN.

    Example:
        >>> import keras, numpy as np, tfdist
        >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        >>> model.compile(loss="mse")
        >>> x = np.arange(4, dtype="float32").reshape(-1, 1)
        >>> y = model.predict(x, verbose=0)
        >>> found = tfdist.privacy.audit(model, (x, y), (x, y + 1))
        >>> print(found)
        4 members and 4 non-members: AUC 1.000, advantage 1.000
    """
    check_count("batch_size", batch_size, 1)
    if isinstance(members, Canaries):
        if non_members is not None:
            raise ArgumentError(
                "`non_members` must be None with Canaries, which contain the non-members. "
                f"Received: Canaries and non_members of type {type(non_members).__name__}. "
                "Leave `non_members` out."
            )
        parts = [(members.canary_x, members.canary_y)]
        included = members.included
    else:
        pairs = {"members": members, "non_members": non_members}
        for name, pair in pairs.items():
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ArgumentError(
                    f"`{name}` must be a pair (x, y). Received: {name} of type "
                    f"{type(pair).__name__}. Pass members and non-members, or Canaries."
                )
        parts = list(pairs.values())  # type: ignore[arg-type]
        included = np.repeat([True, False], [_num_rows(*part) for part in parts])

    def scores_of(scored: Any) -> NDArray[np.float64]:
        function = _minus_loss(scored) if score is None else functools.partial(score, scored)
        batch_scores = [
            np.asarray(function(*batch), np.float64)
            for part in parts
            for batch in _batches(*part, batch_size)
        ]
        return np.concatenate(batch_scores)

    scores = scores_of(model)
    if reference is not None:
        scores = scores - scores_of(reference)
    return AuditReport(scores, included, fair_coins=isinstance(members, Canaries))


def _minus_loss(model: Any) -> Callable[[Any, Any], Any]:
    if not model.compiled or model.loss is None:
        raise ArgumentError(
            "`model` must be compiled with a loss. Received: a model without a loss. Compile "
            "it, or pass `score`."
        )

    @tf.function(autograph=False, reduce_retracing=True)  # type: ignore[untyped-decorator]
    def minus_losses(x: Any, y: Any) -> Any:
        return -example_losses.losses_alone(model, x, y, None, model(x, training=False))

    return minus_losses  # type: ignore[no-any-return]


def _batches(x: Any, y: Any, batch_size: int) -> Any:
    for begin in range(0, _num_rows(x, y), batch_size):
        rows = slice(begin, begin + batch_size)
        yield _tensors(x, rows), _tensors(y, rows)


def _tensors(columns: Any, rows: slice) -> Any:
    return keras.tree.map_structure(
        lambda leaf: tf.convert_to_tensor(np.asarray(leaf)[rows]), columns
    )


def _rows_of(columns: Any, rows: Any) -> Any:
    return keras.tree.map_structure(lambda leaf: np.asarray(leaf)[rows], columns)


def _num_rows(x: Any, y: Any) -> int:
    counts = {len(leaf) for leaf in keras.tree.flatten((x, y))}
    if len(counts) != 1:
        raise ArgumentError(
            "`x` and `y` must have the same number of rows. Received: arrays of "
            f"{sorted(counts)} rows. Pass one row of each for an example."
        )
    return int(counts.pop())


def _check_rows(rows: Any, total: int) -> None:
    are_rows = rows.ndim == 1 and np.issubdtype(rows.dtype, np.integer) and len(rows) >= 2
    if (
        not are_rows
        or rows.min() < 0
        or rows.max() >= total
        or len(np.unique(rows)) < len(rows)
    ):
        raise ArgumentError(
            f"`rows` must be at least two different row numbers below {total}. Received: "
            f"rows={rows!r}. Pass their number instead to draw them at random."
        )
