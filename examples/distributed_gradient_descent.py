"""Distributed gradient descent, spelled out: what `tfdist.fit` does, in a page.

Logistic regression on scikit-learn's breast cancer data. The loss over n examples is a
mean, L(w) = 1/n * sum_i l(w; x_i, y_i), and a sum can be taken in parts. So each step of
distributed gradient descent is

    1. split     replica r of R takes its rows of the batch,
    2. map       and the sum of their gradients, with their count;
    3. reduce    both are summed over all replicas, in one collective;
    4. update    every replica divides, and makes the same step from the same weights.

Dividing after the reduction, by the number of examples, is what makes the result that of
one process. A mean of the replicas' means would be another one here: 569 rows do not
divide by two. (Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 3.)

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

# Connects to the other workers, if there are any: before TensorFlow does anything else.
session = tfdist.init(seed=1)
strategy, place = session.strategy, session.strategy.place

x, y = load_breast_cancer(return_X_y=True)
x = tf.constant((x - x.mean(0)) / x.std(0), tf.float32)  # [569, 30]
y = tf.constant(y, tf.float32)  # [569]: 1 is benign


def summed_gradient(weights, bias, x, y):
    """The gradient of the summed cross-entropy, by hand: x^T (sigmoid(x w + b) - y)."""
    error = tf.sigmoid(tf.linalg.matvec(x, weights) + bias) - y
    return tf.linalg.matvec(x, error, transpose_a=True), tf.reduce_sum(error)


@tf.function
def distributed_step(weights, bias):
    """One update of the weights, on all replicas."""

    def on_replica(weights, bias):
        # 1. Split.
        begin, end = bounds(len(x), strategy.replica_id(), place)
        # 2. Map. An empty share would have a gradient of zero and a count of zero.
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
everyone = strategy.gather_objects((weights.tobytes(), bias.tobytes()))

if session.is_chief:
    shares = [bounds(len(x), r, place) for r in range(place.num_replicas)]
    print(f"rows of each replica:         {', '.join(f'{b}..{e - 1}' for b, e in shares)}")
    print(f"accuracy on these rows:       {accuracy:.2%}")
    print(f"largest weight:               {largest:.6f}")
    print(f"largest difference to one:    {difference:.1e}")
    print(f"equal to one process's:       {difference < 1e-5 * largest}")
    print(f"the same on all {place.num_workers} worker(s):  {len(set(everyone)) == 1}")
