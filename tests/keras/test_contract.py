"""What tfdist relies on inside Keras: fails loudly when a release changes it.

The behaviour is tested elsewhere; here each private place that `tfdist/_keras` touches
is looked at, so that a failure names the place.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.backend.common import global_state
from keras.src.backend.tensorflow import random as keras_random
from keras.src.backend.tensorflow.core import Variable
from keras.src.backend.tensorflow.optimizer import TFOptimizer
from keras.src.losses import loss as keras_loss
from keras.src.ops.operation import Operation
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.saving import saving_lib
from keras.src.trainers.data_adapters import get_data_adapter
from tensorflow.python.eager import context as _context
from tensorflow.python.eager import record

from tfdist import _keras
from tfdist._keras import (
    ReplicaBatch,
    parts,
    recomputed_ops,
    served,
    served_updates,
    sharded,
)
from tfdist._keras.random import uniform_rows
from tfdist._keras.replicated import replacements
from tfdist._keras.snapshots import memory_of

pytestmark = [pytest.mark.quick, pytest.mark.oldest]


def model() -> Any:
    made = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    made.compile("adam", "mse", metrics=["mae"])
    return made


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(getattr(function, "fget", function)).parameters)


def test_every_replaced_place_exists() -> None:
    for owner, name, value in replacements():
        assert name in vars(owner), f"{owner}.{name}"
        assert len(parameters(value)) == len(parameters(vars(owner)[name])), name


def test_replacing_is_undone() -> None:
    places = [(owner, name) for owner, name, _ in replacements()]
    before = [vars(owner)[name] for owner, name in places]
    with _keras.replicated():
        assert [vars(owner)[name] for owner, name in places] != before
    assert [vars(owner)[name] for owner, name in places] == before


def test_every_place_that_parts_replace_exists() -> None:
    for owner, name, value in sharded.replacements(Any):
        assert name in vars(owner), f"{owner}.{name}"
        assert len(parameters(value)) == len(parameters(vars(owner)[name])), name


def test_an_emptied_variable_can_be_filled_and_traces_see_it() -> None:
    variable = keras.Variable(np.arange(6.0).reshape(2, 3))
    total = tf.function(lambda: tf.reduce_sum(variable.value))
    assert total() == 15
    _keras.empty(variable.value)
    assert _keras.is_empty(variable)
    _keras.refill(variable.value, [np.ones((2, 3))])
    assert not _keras.is_empty(variable)
    assert total() == 6
    variable.assign_add(np.ones((2, 3)))
    assert total() == 12


class AssigningAdam(keras.optimizers.Adam):  # type: ignore[misc]
    """Assigns its state in `build`, as ScheduleFreeAdamW of newer Kerases does."""

    def build(self, variables: Any) -> None:
        super().build(variables)
        for slot, variable in zip(self._momentums, variables, strict=True):
            slot.assign(variable)


def test_an_optimizer_is_built_without_its_state_and_then_filled() -> None:
    made = model()
    adagrad = keras.optimizers.Adagrad(initial_accumulator_value=0.25)
    scheduled = AssigningAdam()
    with _keras.built_unfilled([adagrad, scheduled]):
        adagrad.build(made.trainable_variables)
        scheduled.build(made.trainable_variables)
        assert [_keras.is_empty(v) for v in adagrad.variables[2:]] == [True, True]
        assert _keras.unfilled_value(adagrad.variables[2]) == 0.25
        assert not any(map(_keras.is_empty, scheduled.variables))
    np.testing.assert_array_equal(adagrad.variables[2], np.full((4, 2), 0.25))


def test_no_other_optimizer_method_uses_tf_distribute() -> None:
    # One that did would reduce gradients a second time, or call merge_call in a tf.cond.
    using = {
        name
        for name, function in vars(TFOptimizer).items()
        if inspect.isfunction(function)
        and any(
            word in inspect.getsource(function) for word in ("merge_call", "extended.update")
        )
    }
    known = {
        "_apply_weight_decay",
        "_backend_update_step",
        "_backend_increment_gradient_accumulators",
        "_overwrite_model_variables_with_average_value",
        "_distributed_tf_update_step",  # called by _backend_update_step alone
    }
    assert using == known
    assert all(name in vars(BaseOptimizer) for name in known - {"_distributed_tf_update_step"})


def test_losses_reduce_through_the_module() -> None:
    assert "reduce_weighted_values(" in inspect.getsource(keras_loss.Loss.__call__)
    assert "scale_loss_for_distribution(" in inspect.getsource(keras_loss.reduce_values)
    with _keras.replicated():
        value = keras.losses.MeanSquaredError()(np.ones((3, 2)), np.zeros((3, 2)))
    assert float(value) == 1.0


def test_variable_lives_in_value() -> None:
    variable = keras.Variable([1.0, 2.0])
    other = tf.Variable([3.0, 4.0])
    before = _keras.swap_value(variable, other)
    assert isinstance(before, tf.Variable)
    np.testing.assert_array_equal(variable.numpy(), [3.0, 4.0])
    variable.assign([5.0, 6.0])
    np.testing.assert_array_equal(other.numpy(), [5.0, 6.0])
    assert "_direct_assign" in vars(Variable)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "bool"])
def test_a_value_that_is_held_keeps_its_memory(dtype: str) -> None:
    """`_keras/snapshots.py` takes the same memory for the same value."""
    variable = keras.Variable(np.ones([4, 3]), dtype=dtype, trainable=False)
    other = keras.Variable(np.ones([4, 3]), dtype=dtype, trainable=False)
    zeros = tf.zeros([4, 3], dtype)
    before = tf.convert_to_tensor(variable.value)
    again = tf.convert_to_tensor(variable.value)
    assert memory_of(before).ctypes.data == memory_of(again).ctypes.data
    row = tf.IndexedSlices(zeros[:1], tf.constant([1]))
    for write in (
        lambda: variable.assign(other),
        lambda: variable.assign(zeros),
        lambda: tf.function(lambda: variable.assign(tf.cast(tf.ones([4, 3]), dtype)))(),
        lambda: variable.value.scatter_update(row),
        lambda: variable.value.scatter_nd_update([[0, 0]], zeros[0, :1]),
    ):
        snapshot = _keras.Snapshot([variable])
        bits = memory_of(before).tobytes()
        assert not snapshot.changed()
        old = variable.numpy()
        write()
        assert (not snapshot.changed()) == (old == variable.numpy()).all()
        assert memory_of(before).tobytes() == bits


def test_optimizer_finds_swapped_variables() -> None:
    made = model()
    made.optimizer.build(made.trainable_variables)
    for variable in made.trainable_variables:
        _keras.swap_value(variable, tf.Variable(variable.numpy()))
    grads = [tf.ones(v.shape) for v in made.trainable_variables]
    with pytest.raises(ValueError, match="Unknown variable"):
        made.optimizer.apply(grads, made.trainable_variables)
    _keras.reindex_optimizer(made.optimizer)
    made.optimizer.apply(grads, made.trainable_variables)


def test_adapter_passes_through() -> None:
    adapter = _keras.StreamAdapter([], 3)
    assert get_data_adapter(adapter, batch_size=None, shuffle=False) is adapter


def test_fit_keeps_functions_that_are_set() -> None:
    made = model()
    marker = object()
    made.train_function = made.test_function = made.predict_function = marker
    for name in ("train", "test", "predict"):
        getattr(made, f"make_{name}_function")()
        assert getattr(made, f"{name}_function") is marker


def test_default_strategy_leaves_a_stream_alone() -> None:
    stream = object()
    assert tf.distribute.get_strategy().experimental_distribute_dataset(stream) is stream
    assert model()._distribute_strategy is None


def test_symbolic_build_creates_all_variables() -> None:
    made = keras.Sequential([keras.layers.Dense(2)])
    made.compile("adam", "mse", metrics=["mae"])
    spec = (tf.TensorSpec((None, 4)), tf.TensorSpec((None, 2)))
    _keras.build(made, "train_step", spec, lambda: None)
    assert made.built
    assert made.optimizer.built
    assert len(_keras.metric_variables(made)) == 4


def test_compiling_changes_the_compiled_state() -> None:
    made = model()
    before = _keras.compiled_state(made)
    assert all(a is b for a, b in zip(before, _keras.compiled_state(made), strict=True))
    made.compile("adam", "mse")
    assert before[0] is not _keras.compiled_state(made)[0]


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
def test_rows_of_noise_are_those_of_the_whole(dtype: Any) -> None:
    seed = tf.constant([5, 9])
    whole = tf.random.stateless_uniform([11, 7], seed, dtype=dtype)
    for first in (0, 1, 4, 5):
        shape = tf.constant([3, 7], tf.int64)
        rows = uniform_rows(shape, tf.constant(first, tf.int64), seed, dtype)
        np.testing.assert_array_equal(
            tf.cast(rows, tf.float64), tf.cast(whole[first : first + 3], tf.float64)
        )


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dropout_is_kerass_own_on_the_whole_batch(dtype: str, jit_compile: bool) -> None:
    inputs = tf.ones([600, 5], dtype)

    def drop(some: Any) -> Any:
        return keras_random.dropout(some, 0.4, seed=3)

    def batch(rows: int, offset: int) -> _keras.ReplicaBatch:
        numbers = (tf.constant(n, tf.int64) for n in (rows, 600, offset))
        return _keras.ReplicaBatch(*numbers, all_reduce=list, all_gather=tf.identity)

    expected = drop(inputs)
    with _keras.alone():
        alone = tf.function(drop, jit_compile=jit_compile)(inputs)
    with _keras.replicated():
        with _keras.on_replica(batch(400, 0)):
            first = drop(inputs[:400])
        with _keras.on_replica(batch(200, 400)):
            rest = drop(inputs[400:])
    for received in (alone, tf.concat([first, rest], 0)):
        assert bool(tf.reduce_all(received == expected))
    if jit_compile and dtype != "float16":  # else nothing of ours would be needed
        assert bool(tf.reduce_any(tf.function(drop, jit_compile=True)(inputs) != expected))


def test_every_served_place_exists() -> None:
    for owner, name, value in served.replacements(rows_only=True):
        assert name in vars(owner), f"{owner}.{name}"
        ours, theirs = parameters(value), parameters(vars(owner)[name])
        assert name == "gradient" or len(ours) == len(theirs), name


def test_serving_is_undone() -> None:
    places = [(owner, name) for owner, name, _ in served.replacements(rows_only=False)]
    before = [vars(owner)[name] for owner, name in places]
    with served.served(rows_only=False):
        assert [vars(owner)[name] for owner, name in places] != before
    assert [vars(owner)[name] for owner, name in places] == before


@pytest.mark.parametrize(
    ("name", "kept"),
    [("SGD", 0), ("RMSprop", 1), ("Adam", 2), ("Adagrad", 1), ("Adadelta", 2), ("Ftrl", 2)],
)
def test_an_optimizers_state_is_found(name: str, kept: int) -> None:
    made = model()
    made.compile(getattr(keras.optimizers, name)(0.1), "mse")
    made.optimizer.build(made.trainable_variables)
    for variable, slots in served_updates.trained_by(made.optimizer):
        assert len(slots) == kept
        assert all(slot.shape == variable.shape for slot in slots)


def test_a_split_variable_trains_like_a_whole_one() -> None:
    results = []
    for split in (False, True):
        keras.utils.set_random_seed(1)
        made = model()
        made.optimizer.build(made.trainable_variables)
        if split:
            for variable, slots in served_updates.trained_by(made.optimizer):
                for each in (variable, *slots):
                    rows = each.numpy()
                    halves = [tf.Variable(rows[:1]), tf.Variable(rows[1:])]
                    _keras.swap_value(each, parts.Split(halves))
            _keras.reindex_optimizer(made.optimizer)
            served_updates.register_parts(made.optimizer)
        with served.served(rows_only=False), _keras.replicated(has_servers=True):
            for _ in range(3):
                made.train_step((tf.ones([5, 4]), tf.ones([5, 2])))
        results.append(
            [np.asarray(v.value) for v in (*made.weights, *made.optimizer.variables)]
        )
    for whole, joined in zip(*results, strict=True):
        np.testing.assert_allclose(joined, whole, rtol=1e-6)


def test_a_scope_that_assigns_nothing_reads_what_is_there() -> None:
    made = model()
    kernel = made.trainable_variables[0]
    with served.StepScope([]) as scope:
        kernel.assign(kernel * 0)
        assert scope.assigned(made.trainable_variables[1]) is None
        with served.stateful():
            made.trainable_variables[1].assign([5.0, 5.0])
    assert np.abs(kernel.numpy()).max() > 0
    np.testing.assert_array_equal(made.trainable_variables[1].numpy(), [5.0, 5.0])


def test_optimizers_do_not_add_up_repeated_rows() -> None:
    """Why the gradient of an embedding does not travel as a dense one unless asked for."""
    rows = tf.IndexedSlices(tf.ones([2, 3]), tf.constant([1, 1]), tf.constant([4, 3]))
    results = []
    for gradient in (rows, tf.convert_to_tensor(rows)):
        variable = keras.Variable(tf.zeros([4, 3]))
        optimizer = keras.optimizers.Adagrad(0.1)
        optimizer.build([variable])
        optimizer.apply([gradient], [variable])
        results.append(variable.numpy()[1, 0])
    assert abs(results[0] - results[1]) > 0.01


def test_weights_that_were_read_have_the_same_gradients() -> None:
    gradients = []
    for largest in (0, 2**18):
        keras.utils.set_random_seed(1)
        made = model()
        seen: list[Any] = []
        made.optimizer.apply_gradients = lambda pairs, seen=seen: seen.extend(pairs)
        with served.served(rows_only=False):
            weights = served.read_packed(made, largest)
            assert len(weights) == 2
            with served.StepScope([], weights):
                made.train_step((tf.ones([5, 4]), tf.ones([5, 2])))
        gradients.append([g for g, _ in seen])
    for one, other in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_keras_own_generator_is_found_only_where_something_drew() -> None:
    keras.backend.clear_session()
    assert not _keras.has_global_seed()
    keras.random.uniform((1,))
    assert _keras.has_global_seed()
    state = _keras.global_seed_variable()
    before = np.asarray(state)
    drawn = keras.random.uniform((3,))
    assert (np.asarray(state) != before).any()
    state.assign(before)
    np.testing.assert_array_equal(keras.random.uniform((3,)), drawn)


def test_a_monitors_min_delta_changes_its_sign_with_its_function() -> None:
    # Checkpoints leave it out for that.
    stopping = keras.callbacks.EarlyStopping("loss", min_delta=0.5)
    assert stopping.monitor_op is None
    stopping.set_model(model())
    stopping.on_train_begin()
    stopping.on_epoch_end(0, {"loss": 1.0})
    assert stopping.monitor_op is not None
    assert stopping.min_delta == -0.5


def test_files_carry_something_more_and_other_kerases_read_them(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    saved, loaded = saving_lib._save_state, saving_lib._load_state
    found: list[bytes] = []
    try:
        _keras.carry_in_files("_more", lambda model: b"abc", lambda model, b: found.append(b))
        model.save(tmp_path / "m.keras")
        model.save_weights(tmp_path / "m.weights.h5")
        keras.models.load_model(tmp_path / "m.keras")
        model.load_weights(tmp_path / "m.weights.h5")
    finally:
        saving_lib._save_state, saving_lib._load_state = saved, loaded
    assert found == [b"abc"] * 2
    keras.models.load_model(tmp_path / "m.keras")
    model.load_weights(tmp_path / "m.weights.h5")
    assert len(found) == 2


def test_the_loop_begins_where_initial_epoch_says() -> None:
    source = inspect.getsource(keras.Model.fit)
    assert "self._initial_epoch or initial_epoch" in source


def test_what_a_client_changes_is_found() -> None:
    layers = [keras.layers.Dense(3, trainable=False), keras.layers.BatchNormalization()]
    made = keras.Sequential([keras.Input((4,)), *layers, keras.layers.Dense(2)])
    names = {variable.name for variable in _keras.statistics_of(made)}
    assert names == {"moving_mean", "moving_variance"}  # and no frozen weight
    halving = keras.optimizers.schedules.ExponentialDecay(0.8, 1, 0.5)
    optimizer = keras.optimizers.Nadam(halving)
    optimizer.build(made.trainable_variables)
    first = _keras.first_values(optimizer)
    optimizer.apply([tf.ones(v.shape) for v in made.trainable_variables])
    new = {v.name: value for v, value in zip(optimizer.variables, first, strict=True)}
    assert new["iteration"] == 0
    assert int(_keras.iterations_of(optimizer).numpy()) == 1
    assert [np.ndim(value) for value in first] == [0] * len(first)
    assert sum(float(value) == 1.0 for value in first) == 1  # the product of Nadam's momenta
    assert _keras.rates_of([optimizer, keras.optimizers.SGD(0.25)])[0].numpy() == 0.25
    with _keras.schedules_after([optimizer], tf.constant(2)):
        assert float(optimizer.learning_rate) == pytest.approx(0.8 * 0.5**3)
    assert float(optimizer.learning_rate) == pytest.approx(0.8 * 0.5)


def test_tensorflow_s_runtime_says_what_it_is() -> None:
    assert isinstance(tf.constant(1.0), _keras.EagerTensor)
    assert _keras.has_devices()
    assert not _keras.is_deterministic()
    assert _keras.key_value_store() is None  # nothing connects this process
    signature = inspect.signature(_context.Context.configure_coordination_service)
    asked = {"service_type", "service_leader", "cluster_register_timeout_in_ms"}
    assert asked | {"heartbeat_timeout_in_ms", "coordinated_jobs"} <= set(signature.parameters)
    assert hasattr(_context.Context, "get_config_key_value")


def test_all_of_tensorflow_s_checkpoints_are_written_in_one_place(tmp_path: Path) -> None:
    seen: list[str] = []
    save = _keras.CheckpointSaver.save

    def noted(saver: Any, file_prefix: str, *args: Any, **kwargs: Any) -> Any:
        seen.append(file_prefix)
        return save(saver, file_prefix, *args, **kwargs)

    with _keras.replaced(_keras.CheckpointSaver, "save", noted):
        checkpoint = tf.train.Checkpoint(v=tf.Variable(1.0))
        checkpoint.write(str(tmp_path / "a"))
        checkpoint.save(str(tmp_path / "b"))
        tf.train.CheckpointManager(checkpoint, str(tmp_path / "c"), 1).save()
    assert [Path(prefix).name for prefix in seen] == ["a", "b-1", "ckpt-2"]


def test_the_losses_of_a_layer_are_an_attribute_of_the_instance() -> None:
    made = model()
    assert "_losses" in vars(made)
    assert not hasattr(keras.Layer, "_losses")
    batches = [ReplicaBatch(tf.constant(1), tf.constant(1), tf.constant(0), list, tf.identity)]
    batches += [dataclasses.replace(batches[0])]
    with _keras.replicated():
        for number, batch in enumerate(batches):
            with _keras.on_replica(batch):
                made.add_loss(tf.constant(float(number)))
        with _keras.on_replica(batches[0]):
            assert [float(loss) for loss in made.losses] == [0.0]
    assert made.losses == []
    assert not hasattr(keras.Layer, "_losses")


def test_a_recomputed_layer_finds_what_surrounds_its_call() -> None:
    # Names of Keras's global state that the second call restores.
    seen: list[Any] = []

    class Looking(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            found = [global_state.get_global_attribute(name) for name in names]
            seen.append([found[0].training, found[1].dtype])
            return x

    names = ("current_call_ctx", "autocast_scope")
    Looking(dtype="mixed_float16")(np.ones((1, 2)), training=True)
    assert seen == [[True, "float16"]]
    with keras.StatelessScope() as scope:
        assert global_state.get_global_attribute("stateless_scope") is scope
    assert {"call", "quantized_call"} <= set(dir(keras.Layer))
    assert "self.call" in inspect.getsource(Operation.__call__)


def test_all_ops_of_a_graph_are_made_in_one_place() -> None:
    with tf.Graph().as_default() as graph:
        ops = recomputed_ops.ops_of_thread(graph)
        number = tf.compat.v1.placeholder(tf.float32, [])
        variable = tf.Variable(1.0)
        variable.assign(tf.cond(number > 0, lambda: number, lambda: number + variable))
        assert ops == graph.get_operations()
        assert not record.could_possibly_record()
        with tf.GradientTape():
            assert record.could_possibly_record()
