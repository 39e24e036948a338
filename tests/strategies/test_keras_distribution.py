"""What scripts ask of `keras.distribution`, which does nothing on TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest

import tfdist
from tfdist.errors import StrategyError

pytestmark = pytest.mark.quick
distribution = keras.distribution


@pytest.fixture(autouse=True)
def _unset() -> Iterator[None]:
    yield
    distribution.set_distribution(None)


def model_parallel(devices: int) -> Any:
    names = [f"cpu:{number}" for number in range(devices)]
    mesh = distribution.DeviceMesh((1, devices), ("batch", "model"), names)
    layouts = distribution.LayoutMap(mesh)
    return distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")


def trained(**options: Any) -> Any:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return tfdist.fit(model, np.ones((8, 4)), np.ones((8, 1)), verbose=0, **options)


def test_model_parallelism_needs_as_many_devices_as_train() -> None:
    assert trained(strategy=model_parallel(1)).history  # nothing to divide
    with pytest.raises(StrategyError, match=r"mesh \{'batch': 1, 'model': 2\}, but 1 replica"):
        trained(strategy=model_parallel(2))
    with tfdist.drop_in():
        distribution.set_distribution(model_parallel(2))
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        with pytest.raises(StrategyError, match="1 replica"):
            model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)
    for options in ({}, {"strategy": "single"}):
        with pytest.raises(StrategyError, match="1 replica"):
            trained(**options)


def test_data_parallelism_is_what_tfdist_does() -> None:
    assert trained(strategy=distribution.DataParallel(devices=["cpu:0"])).history
    distribution.set_distribution(distribution.DataParallel(devices=["cpu:0"]))
    assert trained().history
    two = distribution.DataParallel(devices=["cpu:0", "cpu:1"])
    with pytest.raises(StrategyError, match=r"mesh \{'batch': 2\}, but 1 replica"):
        trained(strategy=two)
    distribution.set_distribution(two)
    with pytest.raises(StrategyError, match=r"mesh \{'batch': 2\}, but 1 replica"):
        trained()
    # A strategy with a name is not asked for the devices.
    assert trained(strategy="single").history
