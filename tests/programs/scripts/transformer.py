"""A small causal transformer: a custom masked loss, text generated after each epoch."""

import keras
import numpy as np
import outcome
from keras import layers, ops

keras.utils.set_random_seed(1)
LENGTH, WORDS = 12, 20
rng = np.random.default_rng(11)
text = (rng.integers(1, 5, (400, 1)) * np.arange(LENGTH + 1)) % (WORDS - 1) + 1
text[np.arange(LENGTH + 1) > rng.integers(4, LENGTH + 2, (400, 1))] = 0
x, y = text[:, :-1], text[:, 1:]


class Positions(layers.Layer):
    def __init__(self, length, words, width, **kwargs):
        super().__init__(**kwargs)
        self.token_emb = layers.Embedding(words, width, mask_zero=True)
        self.pos_emb = layers.Embedding(length, width)

    def call(self, x):
        return self.token_emb(x) + self.pos_emb(ops.arange(0, ops.shape(x)[-1]))

    def compute_mask(self, x, mask=None):
        return self.token_emb.compute_mask(x)


class Block(layers.Layer):
    def __init__(self, width, heads, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.attention = layers.MultiHeadAttention(heads, width, dropout=0.1, use_bias=False)
        self.feed_forward = keras.Sequential([layers.Dense(32, "gelu"), layers.Dense(width)])
        self.norms = [layers.LayerNormalization(epsilon=1e-6) for _ in range(2)]

    def call(self, x, training=None):
        attended = self.attention(x, x, use_causal_mask=True, training=training)
        x = self.norms[0](x + attended)
        return self.norms[1](x + self.feed_forward(x))


def masked_loss(label, pred):
    loss = keras.losses.sparse_categorical_crossentropy(label, pred, from_logits=True)
    return loss * ops.cast(label != 0, loss.dtype)


generated = []


class TextGenerator(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        start = np.zeros((1, LENGTH), "int64")
        start[0, 0] = 3
        for position in range(1, 3):
            scores = self.model.predict(start, verbose=0)[0, position - 1]
            start[0, position] = scores.argmax()
            generated.append(scores)


inputs = keras.Input((LENGTH,), dtype="int64")
hidden = Block(16, 2)(Positions(LENGTH, WORDS, 16)(inputs))
model = keras.Model(inputs, layers.Dense(WORDS)(hidden))
model.compile(keras.optimizers.Adam(1e-3), loss=masked_loss)
history = model.fit(
    x, y, batch_size=50, epochs=2, shuffle=False, callbacks=[TextGenerator()], verbose=0
)
outcome.save(model, history, generated=generated)
