"""Distillation: a custom `compute_loss` with a frozen teacher."""

import keras
import outcome
from keras import layers, ops
from sklearn.datasets import load_digits

keras.utils.set_random_seed(1)
x, y = load_digits(return_X_y=True)
x = x[:960].astype("float32") / 16
y = y[:960]


class Distiller(keras.Model):
    def __init__(self, student, teacher):
        super().__init__()
        self.teacher = teacher
        self.student = student

    def compile(self, optimizer, metrics, student_loss_fn, alpha=0.1, temperature=3):
        super().compile(optimizer=optimizer, metrics=metrics)
        self.student_loss_fn = student_loss_fn
        self.distillation_loss_fn = keras.losses.KLDivergence()
        self.alpha = alpha
        self.temperature = temperature

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, allow_empty=False):
        teacher_pred = self.teacher(x, training=False)
        student_loss = self.student_loss_fn(y, y_pred)
        distillation_loss = self.distillation_loss_fn(
            ops.softmax(teacher_pred / self.temperature, axis=1),
            ops.softmax(y_pred / self.temperature, axis=1),
        ) * (self.temperature**2)
        return self.alpha * student_loss + (1 - self.alpha) * distillation_loss

    def call(self, x):
        return self.student(x)


def network(units):
    return keras.Sequential([keras.Input((64,)), layers.Dense(units, "tanh"), layers.Dense(10)])


loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
teacher, student = network(32), network(8)
teacher.compile("adam", loss)
taught = teacher.fit(x, y, epochs=2, shuffle=False, verbose=0)
distiller = Distiller(student, teacher)
distiller.compile(
    optimizer=keras.optimizers.Adam(),
    metrics=[keras.metrics.SparseCategoricalAccuracy()],
    student_loss_fn=loss,
)
history = distiller.fit(x, y, epochs=2, shuffle=False, verbose=0)
tested = distiller.evaluate(x, y, verbose=0)
outcome.save([teacher, student], [taught, history], tested=tested)
