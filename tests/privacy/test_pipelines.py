"""DPFTRL on data sets: examples keep their places whatever the others hold, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfdist._keras.pipelines import misplaced
from tfdist.data.separation import check_places
from tfdist.errors import ArgumentError

pytestmark = pytest.mark.quick
X = np.arange(48, dtype="float32").reshape(24, 2)
Y = np.arange(24, dtype="int32")
Data = tf.data.Dataset
Change = Callable[[Any], Any]


def examples() -> Any:
    return Data.from_tensor_slices((X, Y))


def batch(value: Any) -> Any:
    return Data.from_tensor_slices(value).batch(4)


def doubled(x: Any, y: Any) -> Any:
    return 2 * x, y


def row_by_row(x: Any, y: Any) -> Any:
    wide = tf.concat([x, tf.cast(y, tf.float32)[:, None]], 1)
    centered = wide - tf.reduce_mean(wide, 1, keepdims=True)
    image = tf.reshape(centered, [-1, 3, 1])
    return tf.where(image > 0, image, 0.0), tf.one_hot(tf.gather([0, 1, 0], y % 3), 2)


def jittered(x: Any, y: Any) -> Any:
    return x + tf.random.normal(tf.shape(x)), y


def written(folder: Path) -> list[str]:
    names = []
    for number in range(2):
        names.append(str(folder / f"{number}.tfrecord"))
        with tf.io.TFRecordWriter(names[-1]) as writer:
            for row in range(6):
                writer.write(np.float32([number, row]).tobytes())
    return names


def read(record: Any) -> Any:
    values = tf.ensure_shape(tf.io.decode_raw(record, tf.float32), [2])
    return values, values[0]


def in_branch_and_loop(x: Any, y: Any) -> Any:
    found = tf.cond(y > 3, lambda: x[::-1], lambda: x)
    _, found = tf.while_loop(lambda n, _: n < y, lambda n, v: (n + 1, 2 * v), [0, found])
    return tf.switch_case(y % 2, [lambda: found, lambda: -found])


def table(values: Any) -> Any:
    rows = tf.lookup.KeyValueTensorInitializer(Y[: len(values)], values)
    return tf.lookup.StaticHashTable(rows, 0.0)


WIDE, CLASSES, HASHED = np.eye(2, dtype="float32")[Y % 2], table([0.5, 2.0]), table(X[:, 0])
KEEP: dict[str, Change] = {
    "shuffle": lambda d: d.shuffle(9, seed=1).map(doubled).cache().batch(4).prefetch(2),
    "numbers": lambda d: d.skip(2).take(20).shard(2, 0).batch(4, drop_remainder=True),
    "parallel": lambda d: d.map(jittered, num_parallel_calls=2).batch(4, num_parallel_calls=2),
    "map_batches": lambda d: d.batch(4).map(doubled),
    "map_rows": lambda d: d.batch(4).map(row_by_row),
    "enumerate": lambda d: d.enumerate().map(lambda n, e: e).batch(4),
    "zip": lambda d: Data.zip((batch(X), batch(Y))),
    "joined": lambda d: d.take(8).batch(4).concatenate(batch((X[8:] + 1, Y[8:]))),
    "sampled": lambda d: Data.sample_from_datasets(
        [batch((X, Y)), batch((X + 1, Y))], [0.3, 0.7]
    ),
    "chosen": lambda d: Data.choose_from_datasets(
        [batch((X, Y)), batch((X + 1, Y))], Data.range(4).map(lambda n: n % 2)
    ),
    "options": lambda d: d.batch(4).with_options(tf.data.Options()),
    "unbatch": lambda d: d.batch(3, drop_remainder=True).unbatch().batch(4),
    "padded": lambda d: d.padded_batch(4, ([5], [])),
    "layer": lambda d: d.map(lambda x, y: (keras.layers.Rescaling(0.5)(x), y)).batch(4),
    "full_batches": lambda d: Data.zip((d.batch(4, **FOURS).shuffle(9), batch(X + 1))).map(
        lambda e, z: e[0] * z
    ),
    "draws_in_function": lambda d: d.map(tf.function(jittered)).batch(4),
    "repeated_choice": lambda d: Data.choose_from_datasets(
        [batch((X, Y)), batch((X + 1, Y))], Data.range(2).repeat(6)
    ),
    "tokens": lambda d: Data.from_tensor_slices(Y).map(lambda y: (y + 1, y)).batch(4),
    "branch": lambda d: d.map(lambda x, y: (tf.cond(y > 3, lambda: x, lambda: -x), y)).batch(4),
    "shapes": lambda d: d.map(in_branch_and_loop).batch(4).map(lambda x: x[..., None]),
    "same_labels": lambda d: batch((X, Y, WIDE)).concatenate(batch((X + 1, Y, WIDE))),
    "classes": lambda d: d.map(lambda x, y: (x, y, CLASSES.lookup(y % 2))).batch(4),
}


@pytest.mark.parametrize("name", KEEP)
def test_what_goes_by_number_keeps_places(name: str) -> None:
    assert misplaced(KEEP[name](examples()), promised=False) is None


def test_a_record_decides_nothing_about_others(tmp_path: Path) -> None:
    files = Data.from_tensor_slices(written(tmp_path))
    records = tf.data.TFRecordDataset
    for function in (
        lambda f: records(f).flat_map(
            lambda r: Data.from_tensor_slices(tf.strings.bytes_split(r))
        ),
        lambda f: records(f).take(tf.cast(tf.strings.length(f), tf.int64)),
        lambda f: records(f).batch(4).map(lambda r: tf.roll(r, 1, 0)),
        lambda f: records(f).flat_map(records),
        lambda f: records(f).skip(tf.cast(tf.strings.length(f), tf.int64)),
    ):
        found = misplaced(files.flat_map(function).batch(4), promised=True)
        assert found is not None
        assert "only read the file" in found[1]


def test_records_of_several_files_keep_places(tmp_path: Path) -> None:
    names = written(tmp_path)
    files = Data.from_tensor_slices(names)
    for data in (
        tf.data.TFRecordDataset(names, num_parallel_reads=2),
        files.interleave(tf.data.TFRecordDataset, cycle_length=2, num_parallel_calls=2),
        files.flat_map(lambda name: tf.data.TFRecordDataset(name).skip(1)),
    ):
        assert misplaced(data.map(read).batch(4), promised=False) is None
    examples().save(str(tmp_path / "saved"))
    assert misplaced(Data.load(str(tmp_path / "saved")).batch(4), promised=False) is None
    twice = tf.data.TFRecordDataset(names).concatenate(tf.data.TFRecordDataset(names))
    assert "one source in several places" in str(misplaced(twice.batch(4), promised=False))


def test_a_file_that_is_read_twice_needs_a_promise(tmp_path: Path) -> None:
    records = tf.data.TFRecordDataset
    names = written(tmp_path)
    files = Data.from_tensor_slices(names)
    for data in (
        records([*names, f"{tmp_path}/./0.tfrecord"]),
        files.map(lambda f: tf.strings.regex_replace(f, "1", "0")).interleave(records),
        files.interleave(lambda f: records(names[0])),
        files.interleave(lambda f: records([f, f])),
        files.interleave(lambda f: records(tf.strings.join([f, f]))),
        records(names).concatenate(records(names[:1])),
        records(names).concatenate(files.take(1).interleave(records)),
        records([*names, linked(names[0])]),
        Data.from_tensor_slices([*names, names[0]]).map(tf.io.read_file),
    ):
        found = misplaced(data.map(read).batch(4), promised=False)
        assert "twice" in str(found)
        assert misplaced(data.map(read).batch(4), promised=True) is None


def linked(name: str) -> str:
    Path(f"{name}-2").hardlink_to(name)
    return f"{name}-2"


def test_saved_examples_and_caches_that_are_read_twice_need_a_promise(tmp_path: Path) -> None:
    saved, cached = str(tmp_path / "saved"), str(tmp_path / "cached")
    examples().save(saved)
    loaded = Data.load(saved)
    for data in (
        loaded.concatenate(Data.load(f"{saved}/.")),
        examples().cache(cached).concatenate(Data.from_tensor_slices((X + 1, Y)).cache(cached)),
        loaded.map(lambda x, y: (x + tf.io.decode_raw(tf.io.read_file(saved), x.dtype), y)),
    ):
        assert misplaced(data.batch(4), promised=False) is not None
        assert misplaced(data.batch(4), promised=True) is None


def test_what_is_claimed_of_saved_examples_is_not_believed(tmp_path: Path) -> None:
    examples().map(lambda x, y: tf.repeat(x[:1], y)).save(str(tmp_path))
    claimed = Data.load(str(tmp_path), element_spec=tf.TensorSpec([5]))
    found = misplaced(claimed.batch(1).map(lambda v: tf.reshape(v, [-1, 5, 1])), promised=True)
    assert "(Reshape)" in str(found)


def test_a_reader_of_a_saved_data_set_changes_nothing(tmp_path: Path) -> None:
    examples().save(str(tmp_path))

    def loaded(reader: Change) -> Any:
        return Data.load(str(tmp_path), reader_func=reader).batch(4)

    def orderly(shards: Any) -> Any:
        return shards.shuffle(4, seed=1).interleave(lambda s: s, num_parallel_calls=2)

    assert misplaced(loaded(orderly), promised=False) is None
    for reader in (
        lambda shards: shards.flat_map(lambda s: s.batch(4).map(mixed_up).unbatch()),
        lambda shards: shards.flat_map(lambda s: s.concatenate(s)),
        lambda shards: shards.repeat(2).flat_map(lambda s: s),
        lambda shards: shards.interleave(
            lambda s: s, num_parallel_calls=2, deterministic=False
        ),
    ):
        assert "reader_func" in str(misplaced(loaded(reader), promised=True))


SEEN = tf.Variable(0)


def counted(data: Any) -> Any:
    seen = tf.Variable(0.0)
    return data.map(lambda x, y: (x + seen.assign_add(x[0]), y)).batch(4)


def by_length(data: Any) -> Any:
    ragged = data.map(lambda x, y: (tf.range(y + 1), y))
    return ragged.bucket_by_sequence_length(lambda x, y: y, [9], [4, 4])


def of_luck(x: Any, y: Any) -> Any:
    return tf.cond(y > 3, lambda: x + tf.random.uniform([]), lambda: x), y


def mixed_up(x: Any, y: Any) -> Any:
    return 0.7 * x + 0.3 * tf.reverse(x, [0]), y


def drawn_by_label(x: Any, y: Any) -> Any:
    return x + tf.reduce_sum(tf.random.normal([y], seed=3)), y


def drawn_by_a_draw(data: Any) -> Any:
    normal = tf.random.Generator.from_seed(1).normal
    return data.map(
        lambda x, y: (x + tf.reduce_sum(normal([tf.random.uniform([], 0, y + 1, y.dtype)])), y)
    ).batch(4)


def drawn_in_parallel(x: Any, y: Any) -> Any:
    return x + tf.reduce_sum(
        tf.vectorized_map(lambda _: tf.random.normal([], seed=3), tf.range(y))
    ), y


def advanced_by_data(data: Any) -> Any:
    seeds = keras.random.SeedGenerator(1)

    def move(x: Any, y: Any) -> Any:
        seeds.state.assign(tf.cast(tf.stack([y, y]), seeds.state.dtype))
        return x, y

    return data.map(move).batch(4)


def written_over(data: Any) -> Any:
    kept = tf.zeros([1, 2])
    return data.map(
        lambda x, y: (x + tf.raw_ops.InplaceAdd(x=kept, i=[0], v=x[None])[0], y)
    ).batch(4)


def brought_together(data: Any) -> Any:
    @tf.nondifferentiable_batch_function(4, 4, 10**6, [4])
    def centered(x: Any) -> Any:
        return x - tf.reduce_mean(x, 0)

    return data.map(lambda x, y: (centered(x[None])[0], y), num_parallel_calls=4).batch(4)


def of_wrong_shape(x: Any, y: Any) -> Any:
    values = tf.boolean_mask(tf.repeat(x[:1], y + 1), tf.repeat(True, y + 1))
    values.set_shape([5])
    return values


def chosen_by(numbers: Any) -> Change:
    sets = [batch((X, Y)), batch((X + 1, Y))]
    return lambda d: Data.choose_from_datasets(sets, numbers())


FOURS: Any = {"drop_remainder": True}
TWICE: Change = lambda d: d.batch(2, **FOURS).batch(2, **FOURS)  # noqa: E731
MOVE: dict[str, tuple[Change, str]] = {
    "one_row_to_four": (
        lambda d: d.batch(1).map(
            lambda x, y: (x + tf.zeros([4, 1]), y + tf.zeros([4], y.dtype))
        ),
        "in which a row may depend on others (AddV2)",
    ),
    "sizes": (lambda d: Data.zip((batch(X), Data.from_tensor_slices(Y).batch(1))), "of rows"),
    "short_last": (
        lambda d: Data.zip((batch(X), batch(X[:21] + 1))).map(lambda a, b: a + b),
        "in which a row may depend on others (AddV2)",
    ),
    "rows_of_another": (
        lambda d: Data.zip((batch(X), Data.from_tensor_slices(X).batch(2))).map(
            lambda a, b: tf.reshape(a, [tf.shape(b)[0], -1])
        ),
        "in which a row may depend on others (Reshape)",
    ),
    "believed": (
        lambda d: d.map(of_wrong_shape).batch(4).map(lambda v: tf.reshape(v, [-1, 5])),
        "in which a row may depend on others (Reshape)",
    ),
    "believed_in_branch": (
        lambda d: (
            d.map(lambda x, y: tf.cond(y > 3, *[lambda: of_wrong_shape(x, y)] * 2))
            .batch(1)
            .map(lambda v: tf.reshape(v, [-1, 5, 1]))
        ),
        "in which a row may depend on others (Reshape)",
    ),
    "believed_in_loop": (
        lambda d: (
            d.map(
                lambda x, y: tf.while_loop(
                    lambda v: tf.reduce_all(v < 9),
                    lambda v: (of_wrong_shape(x, y),),
                    [tf.zeros([5])],
                )[0]
            )
            .batch(1)
            .map(lambda v: tf.reshape(v, [-1, 5, 1]))
        ),
        "in which a row may depend on others (Reshape)",
    ),
    "by_number_in_branch": (
        lambda d: Data.range(6).map(
            lambda n: tf.cond(n > 2, lambda: tf.cumsum(X[:4], 0), lambda: tf.constant(X[4:8]))
        ),
        "in which a row may depend on others",
    ),
    "numbered": (
        lambda d: d.batch(4).enumerate().map(lambda n, e: mixed_up(*e)),
        "in which a row may depend on others (ReverseV2)",
    ),
    "whole_batches": (
        lambda d: Data.range(6).map(lambda n: tf.cumsum(tf.constant(X)[n : n + 4], 0)),
        "in which a row may depend on others (Cumsum)",
    ),
    "two_levels": (
        lambda d: TWICE(d).map(lambda x, y: (tf.cumsum(x, 1), y)).unbatch().unbatch().batch(4),
        "a map of batches of batches",
    ),
    "ragged_levels": (
        lambda d: (
            d.batch(4, **FOURS).map(mixed_up).ragged_batch(2, **FOURS).unbatch().unbatch()
        ),
        "unbatch of batches whose",
    ),
    "unknown_rank": (
        lambda d: (
            d.map(lambda x, y: tf.numpy_function(np.copy, [x], tf.float32))
            .batch(4)
            .map(lambda x: x - tf.reduce_mean(x, 0))
        ),
        "of unknown shape",
    ),
    "set_shape": (lambda d: d.map(of_wrong_shape).unbatch().batch(4), "unbatch of batches"),
    "draws_of_sizes": (lambda d: d.map(drawn_by_label).batch(4), "Normal of unknown shape"),
    "draws_of_draws": (drawn_by_a_draw, "RngReadAndSkip of an element"),
    "draws_in_parallel": (lambda d: d.map(drawn_in_parallel).batch(4), "of unknown shape"),
    "seeds": (advanced_by_data, "AssignVariableOp of an element"),
    "in_place": (written_over, "InplaceAdd"),
    "together": (brought_together, "BatchFunction"),
    "chosen_by_labels": (
        chosen_by(lambda: Data.range(24).map(lambda n: tf.cast(tf.gather(Y, n) % 2, n.dtype))),
        "choices that come from data",
    ),
    "chosen_by_variable": (
        chosen_by(lambda: Data.range(24).map(lambda n: tf.cast(SEEN, n.dtype) % 2)),
        "choices that come from data",
    ),
    "filter": (lambda d: d.filter(lambda x, y: y > 3).batch(4), "the operation filter"),
    "buckets": (by_length, "the operation group_by_window"),
    "scan": (
        lambda d: d.scan(0, lambda s, e: (s + 1, e)).batch(4),
        "the operation scan",
    ),
    "take_while": (lambda d: d.take_while(lambda x, y: y < 9).batch(4), "take_while"),
    "unbatch": (lambda d: d.batch(5).unbatch().batch(4), "unbatch of batches whose"),
    "flat_map": (
        lambda d: d.flat_map(lambda x, y: Data.from_tensors((x, y)).repeat(2)).batch(4),
        "flat_map of other things than files",
    ),
    "padded": (
        lambda d: d.map(lambda x, y: (tf.range(y), y)).padded_batch(4),
        "padded_batch to the longest",
    ),
    "state": (counted, "may keep state (Assign"),
    "draws": (lambda d: d.map(of_luck).batch(4), "in a branch"),
    "mixup": (lambda d: d.batch(4).map(mixed_up), "in which a row may depend on others"),
    "standardized": (
        lambda d: d.batch(4).map(lambda x, y: (x - tf.reduce_mean(x, 0), y)),
        "in which a row may depend on others",
    ),
    "dropped": (
        lambda d: d.batch(4).map(lambda x, y: (x[y > 3], y[y > 3])),
        "in which a row may depend on others",
    ),
    "noise": (
        lambda d: d.batch(4).map(jittered),
        "draws or calls Python (RandomStandardNormal)",
    ),
    "order": (
        lambda d: d.map(doubled, num_parallel_calls=2, deterministic=False).batch(4),
        "deterministic=False",
    ),
    "chosen": (
        lambda d: Data.choose_from_datasets(
            [batch((X, Y)), batch((X + 1, Y))], d.map(lambda x, y: tf.cast(y % 2, tf.int64))
        ),
        "choices that come from data",
    ),
}


@pytest.mark.parametrize("name", MOVE)
def test_what_goes_by_contents_is_refused_with_a_promise_too(name: str) -> None:
    make, message = MOVE[name]
    found = misplaced(make(examples()), promised=True)
    assert found is not None
    assert message in found[0]


TABLE, COUNT = tf.Variable(X[:20]), tf.Variable(0, name="seed_generator_state")
REPEAT: dict[str, Change] = {
    "zip": lambda d: Data.zip((d.batch(4), d.shuffle(9).batch(4))),
    "concatenate": lambda d: d.batch(4).concatenate(d.batch(4)),
    "copies": lambda d: batch((X, Y)).concatenate(batch((X, Y)).skip(1)),
    "sampled": lambda d: Data.sample_from_datasets([d.batch(4), d.batch(4)]),
    "generator": lambda d: Data.from_generator(
        lambda: zip(X, Y, strict=True),
        output_signature=(tf.TensorSpec([2]), tf.TensorSpec([], tf.int32)),
    ).batch(4),
    "by_number": lambda d: Data.range(24).map(lambda n: (tf.gather(X, n // 2), n)).batch(4),
    "pairs": lambda d: (
        Data.from_tensor_slices(np.c_[Y, Y[::-1]])
        .map(lambda n: (tf.gather(X, n[0]), tf.gather(X, n[1])))
        .batch(4)
    ),
    "variable": lambda d: (
        d.enumerate().map(lambda n, e: (tf.gather(TABLE, n // 2), e[1])).batch(4)
    ),
    "other_type": lambda d: Data.zip((batch(X), batch(X.astype("float64")))),
    "by_luck": lambda d: d.map(
        lambda x, y: (x + tf.gather(TABLE, tf.random.uniform([], 0, 20, y.dtype)), y)
    ).batch(4),
    "by_count": lambda d: d.map(
        lambda x, y: (x + tf.gather(X[:20], COUNT.assign_add(1) // 2), y)
    ).batch(4),
    "by_key": lambda d: d.map(lambda x, y: (x + HASHED.lookup(y // 2), y)).batch(4),
    "mean": lambda d: d.batch(4).map(lambda x, y: (x - tf.reduce_mean(X, 0), y)),
    "one_class_more": lambda d: d.concatenate(
        Data.from_tensor_slices((X[Y > 18], Y[:5]))
    ).batch(4),
    "permuted": lambda d: Data.zip(
        (d, Data.from_tensor_slices(X[::-1].astype("float64")))
    ).batch(4),
    "numbers_again": lambda d: Data.zip((batch(X[:, 0]), batch(X[::-1, 0]))),
    "function": lambda d: Data.range(6).map(lambda n: (tf.constant(X)[n % 2 :], Y[:23])),
}


@pytest.mark.parametrize("name", REPEAT)
def test_what_may_come_twice_needs_a_promise(name: str) -> None:
    data = REPEAT[name](examples())
    with pytest.raises(ArgumentError, match="unless `min_separation` says how often"):
        check_places(data, None)
    if name == "zip":  # one of its parts is shuffled
        data = Data.zip((examples().batch(4), examples().batch(4)))
    check_places(data, 1)


def test_a_try_moves_no_shuffle_on() -> None:
    def order(tried: bool) -> list[int]:
        data = examples().shuffle(24, seed=5).batch(4).map(doubled)
        if tried:
            assert misplaced(data, promised=False) is None
        return [int(n) for _, y in data for n in y]

    tf.random.set_seed(1)
    untried = order(tried=False)
    tf.random.set_seed(1)
    assert order(tried=True) == untried


FIXED: dict[str, Any] = {"buffer_size": 24, "reshuffle_each_iteration": False}
# Datasets, whether they are drawn more than once, and the least promise that is refused.
ORDERS: dict[str, tuple[Change, bool, int | None]] = {
    "once": (lambda d: d.shuffle(24).batch(4), False, None),
    "fixed": (lambda d: d.shuffle(**FIXED).repeat(3).batch(4), True, None),
    "no_shuffle": (lambda d: d.repeat(3).batch(4), True, None),
    "pairs": (lambda d: Data.zip((d.batch(4), d.batch(4))), True, None),
    "several_epochs": (lambda d: d.shuffle(24).batch(4), True, 2),
    "noise": (lambda d: d.shuffle(24).map(jittered).batch(4), True, 2),
    "cached": (lambda d: d.shuffle(24).cache().batch(4), True, 2),
    "rows": (lambda d: d.shuffle(24).repeat(2).batch(4), False, 1),
    "endless": (lambda d: d.shuffle(24).repeat().batch(4).take(9), False, 1),
    "once_repeated": (lambda d: d.shuffle(24).repeat(1).batch(4), False, None),
    "batches": (lambda d: d.shuffle(24).batch(4).repeat(2), False, 2),
    "rebatched": (
        lambda d: d.shuffle(24).batch(3, drop_remainder=True).repeat(2).unbatch().batch(4),
        False,
        1,
    ),
    "after_repeat": (lambda d: d.repeat(2).shuffle(**FIXED).batch(4), False, 1),
    "batches_after_repeat": (lambda d: d.batch(4).repeat(2).shuffle(**FIXED), False, 2),
    "joined": (lambda d: d.shuffle(**FIXED).concatenate(d).batch(4), False, 1),
    "joined_batches": (lambda d: d.batch(4).concatenate(d.batch(4).shuffle(9)), False, 2),
    "zipped": (lambda d: Data.zip((d.batch(4), d.shuffle(**FIXED).batch(4))), False, 1),
    "chosen": (
        lambda d: Data.sample_from_datasets(
            [batch((X, Y)), batch((X + 1, Y))], rerandomize_each_iteration=True
        ),
        True,
        2,
    ),
    "choices": (
        lambda d: Data.choose_from_datasets(
            [batch((X, Y)), batch((X + 1, Y))], Data.range(2).repeat(6).shuffle(12)
        ),
        True,
        2,
    ),
}


@pytest.mark.parametrize("name", ORDERS)
def test_a_shuffle_keeps_no_promise_of_what_comes_again(name: str) -> None:
    make, comes_again, refused = ORDERS[name]
    data = make(examples())
    for separation in (1, 2):
        if refused is None or separation < refused:
            check_places(data, separation, comes_again)
            continue
        message = "twice in a batch" if refused == 1 else "steps that follow each other"
        with pytest.raises(ArgumentError, match=message):
            check_places(data, separation, comes_again)


def test_shuffled_names_of_files_are_shuffled_examples(tmp_path: Path) -> None:
    written(tmp_path)
    files = Data.list_files(f"{tmp_path}/*.tfrecord")
    for records in (
        tf.data.TFRecordDataset(files),
        files.interleave(tf.data.TFRecordDataset),
        saved_and_shuffled(tmp_path),
    ):
        check_places(records.batch(4), 2, comes_again=False)
        with pytest.raises(ArgumentError, match="steps that follow each other"):
            check_places(records.batch(4), 2, comes_again=True)


def saved_and_shuffled(folder: Path) -> Any:
    examples().save(f"{folder}/saved")
    return Data.load(
        f"{folder}/saved", reader_func=lambda shards: shards.shuffle(4).interleave(lambda s: s)
    )
