"""A training loop from scratch: a tape, an optimizer, metrics, and no `fit`."""

import keras
import outcome
import tensorflow as tf
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
x, y = load_digits(return_X_y=True)
x = x.astype("float32") / 16
dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(500, seed=1).batch(64)

model = keras.Sequential(
    [keras.Input((64,)), keras.layers.Dense(16, "tanh"), keras.layers.Dense(10)]
)
optimizer = keras.optimizers.Adam(learning_rate=1e-3)
loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
accuracy = keras.metrics.SparseCategoricalAccuracy()


@tf.function
def train_step(x, y):
    with tf.GradientTape() as tape:
        logits = model(x, training=True)
        loss_value = loss_fn(y, logits)
    gradients = tape.gradient(loss_value, model.trainable_weights)
    optimizer.apply(gradients, model.trainable_weights)
    accuracy.update_state(y, logits)
    return loss_value


losses, accuracies = [], []
for _ in range(2):
    for x_batch, y_batch in dataset:
        losses.append(train_step(x_batch, y_batch))
    accuracies.append(accuracy.result())
    accuracy.reset_state()
outcome.save(model, losses=losses, accuracies=accuracies)
