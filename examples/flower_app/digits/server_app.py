"""What Flower runs on the server."""

import keras

import tfdist.flower
from digits.task import digits, model_fn

_, x_test, _, y_test = digits()


def report(model, history):
    accuracy = model.evaluate(x_test, y_test, verbose=0, return_dict=True)["accuracy"]
    print(f"held-out accuracy: {accuracy:.1%}", flush=True)


app = tfdist.flower.server_app(
    model_fn,
    federated=tfdist.FedAvg(
        local_steps=8, server_optimizer=keras.optimizers.Adam(0.03)
    ),  # FedAdam
    rounds=3,
    batch_size=16,
    num_clients=2,
    seed=1,
    on_end=report,
)
