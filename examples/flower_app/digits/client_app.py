"""What Flower runs on each node."""

import tfdist.flower
from digits.task import data_fn, model_fn

app = tfdist.flower.client_app(model_fn, data_fn)
