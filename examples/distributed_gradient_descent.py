"""Distributed gradient descent written out by hand: what `tfdist.fit` does, on one page.

The model is a logistic regression on scikit-learn's breast cancer data. The loss over n
examples is a mean, L(w) = 1/n * sum_i l(w; x_i, y_i). A sum can be computed in parts. So each
step of distributed gradient descent is

    1. split     replica r of R takes its rows of the batch;
    2. map       it computes the sum of their gradients, and their number;
    3. reduce    one collective sums both over all replicas;
    4. update    every replica divides, and makes the same update of the same weights.

The result is that of one process because the division, by the number of examples, comes
after the reduction. A mean of the replicas' means would differ here, since 569 rows cannot
be split evenly. (Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 3.)

    python examples/distributed_gradient_descent.py
    tfdist run -n 2 examples/distributed_gradient_descent.py
"""

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_breast_cancer

import tfdist
from tfdist.data import bounds

STEPS = 200
LEARNING_RATE = 0.5

# Connects to the other workers, if any. It must come before other uses of TensorFlow.
session = tfdist.init(seed=1)
strategy, place = session.strategy, session.strategy.place

x, y = load_breast_cancer(return_X_y=True)
x = tf.constant((x - x.mean(0)) / x.std(0), tf.float32)  # [569, 30]
y = tf.constant(y, tf.float32)  # [569]: 1 is benign


def summed_gradient(weights, bias, x, y):
    """The gradient of the summed cross-entropy: x^T (sigmoid(x w + b) - y)."""
    error = tf.sigmoid(tf.linalg.matvec(x, weights) + bias) - y
    return tf.linalg.matvec(x, error, transpose_a=True), tf.reduce_sum(error)


@tf.function
def distributed_step(weights, bias):
    """One update of the weights, on all replicas."""

    def on_replica(weights, bias):
        # 1. Split.
        begin, end = bounds(len(x), strategy.replica_id(), place)
        # 2. Map. For no rows, the gradient and the count are zero.
        d_weights, d_bias = summed_gradient(weights, bias, x[begin:end], y[begin:end])
        count = tf.cast(end - begin, tf.float32)
        # 3. Reduce.
        d_weights, d_bias, count = strategy.all_reduce_sum([d_weights, d_bias, count])
        # 4. Update.
        rate = LEARNING_RATE / count
        return weights - rate * d_weights, bias - rate * d_bias

    return strategy.run(on_replica, weights, bias)


@tf.function
def plain_step(weights, bias):
    """The same update in one process, on all rows."""
    d_weights, d_bias = summed_gradient(weights, bias, x, y)
    rate = LEARNING_RATE / len(x)
    return weights - rate * d_weights, bias - rate * d_bias


def descend(step):
    weights, bias = tf.zeros([x.shape[1]]), tf.zeros([])
    for _ in range(STEPS):
        weights, bias = step(weights, bias)
    return weights.numpy(), bias.numpy()


weights, bias = descend(distributed_step)
expected_weights, expected_bias = descend(plain_step)

difference = max(np.abs(weights - expected_weights).max(), abs(bias - expected_bias))
largest = np.abs(expected_weights).max()
accuracy = np.mean((x.numpy() @ weights + bias > 0) == (y.numpy() > 0.5))
results = strategy.gather_objects((weights.tobytes(), bias.tobytes()))

if session.is_chief:
    slices = [bounds(len(x), r, place) for r in range(place.num_replicas)]
    print(f"rows of each replica:         {', '.join(f'{b}..{e - 1}' for b, e in slices)}")
    print(f"accuracy on these rows:       {accuracy:.2%}")
    print(f"largest weight:               {largest:.6f}")
    print(f"largest difference to one:    {difference:.1e}")
    print(f"equal to one process's:       {difference < 1e-5 * largest}")
    print(f"the same on all {place.num_workers} worker(s):  {len(set(results)) == 1}")
