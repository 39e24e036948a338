"""Secure sums: messages that look random, and whose sum is exact."""

from __future__ import annotations

import hashlib
import hmac
import struct
import threading
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import tfdist
from tfdist.errors import ArgumentError, DisagreementError
from tfdist.federated import masks
from tfdist.federated.secure_sum import STATE, FixedPoint
from tfdist.federated.sums import NOT_CANCELLED, MaskedSums
from tfdist.federated.validation import check_secure
from tfdist.strategies.base import Place

pytestmark = pytest.mark.quick


def members(count: int) -> list[Any]:
    """The masks and the fingerprint of each of so many workers, which exchange keys."""
    barrier = threading.Barrier(count)
    sent: list[Any] = [None] * count
    agreed: list[Any] = [None] * count

    def work(worker: int) -> None:
        def exchange(value: Any) -> list[Any]:
            sent[worker] = value
            barrier.wait(60)
            return list(sent)

        agreed[worker] = masks.agree(worker, exchange)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return agreed


@pytest.mark.parametrize("count", [3, 8, 32])
def test_the_sum_of_messages_is_the_plain_one_bit_by_bit(count):
    agreed = members(count)
    assert len({fingerprint for _, fingerprint in agreed}) == 1
    random = np.random.default_rng(count)
    parts = [
        [random.integers(-(2**62), 2**62, 100), random.integers(-9, 9, 51, np.int32)]
        for _ in range(count)
    ]
    for number in (0, 7, 7):  # a repeated round too
        sent = [m.add_to(number, 0, v) for (m, _), v in zip(agreed, parts, strict=True)]
        for column, dtype in ((0, np.int64), (1, np.int32)):
            assert sent[0][column].dtype == dtype
            total = np.sum([message[column] for message in sent], 0, dtype=dtype)
            plain = np.sum([part[column] for part in parts], 0, dtype=dtype)
            np.testing.assert_array_equal(total, plain)


def test_a_message_looks_random_and_no_mask_is_used_twice():
    zeros = np.zeros(2**17, np.int64)
    seen: set[bytes] = set()
    for _ in range(2):  # the second training is one that was started again
        (mask, _), *others = members(3)
        for number, lane in [(0, 0), (0, 0), (1, 0), (1, 1)]:  # the second one is repeated
            (message,) = mask.add_to(number, lane, [zeros])
            counts = np.bincount(message.view(np.uint8), minlength=256)
            expected = zeros.nbytes / 256
            statistic = float(((counts - expected) ** 2 / expected).sum())
            assert 255 - 6 * 510**0.5 < statistic < 255 + 6 * 510**0.5
            seen.update(message[:64].tobytes()[i : i + 16] for i in range(0, 512, 16))
        keys = [mask._key(other, 3, 1, 0) for other in (1, 2)]
        assert keys == [other._key(0, 3, 1, 0) for other, _ in others]
    assert len(seen) == 2 * 4 * 32


def test_keys_are_those_of_the_standard():
    """HKDF as RFC 5869 defines it, by Python's own HMAC."""
    (mask, _), *_ = members(3)
    extracted = hmac.digest(bytes(32), mask._secrets[2], hashlib.sha256)
    place = struct.pack(">5q", 6, 0, 0, 2, 0)
    info = b"tfdist secure sum 1" + mask._training + place
    assert mask._key(2, 6, 0, 0) == hmac.digest(extracted, info + b"\x01", hashlib.sha256)


def test_a_worker_without_a_key_is_named():
    def exchange(value: Any) -> list[Any]:
        return [value, {"another": "training"}, value]

    with pytest.raises(DisagreementError, match="no key of worker 1"):
        masks.agree(0, exchange)


def test_rounding_to_whole_numbers():
    numbers = FixedPoint(64, 4, 2.0)
    values = [0.03, 0.04, -0.5, 2.0, 2.1, -9.0, np.inf, np.nan]
    for encode in (numbers.encode, tf.function(numbers.encode)):  # NaN is counted in graphs too
        encoded, clipped = encode(tf.constant(values, tf.float64))
        assert encoded.numpy().tolist() == [0, 1, -8, 32, 32, -32, 0, 0]
        assert int(clipped) == 4
    np.testing.assert_array_equal(numbers.decode(encoded)[:4], [0, 1 / 16, -0.5, 2])


def test_sums_of_metrics_have_no_limit_that_shows():
    """As Python adds up fractions; and what has no words is NaN, on all workers."""
    values = np.array([
        [3.39e9, -3.0e38, 1e-9, 2.0**100, np.nan, 1.0, 1e300],
        [1.1e10, 2.99e38, 2e-9, 0.1 - 2.0**100, 1.0, -np.inf, 1.0],
        [0.25, 1e36, 1 / 3, 2.0**-60, 1.0, np.inf, 1.0],
    ])  # fmt: skip
    for encode in (STATE.encode, tf.function(STATE.encode)):
        sent, without = zip(*(encode(tf.constant(row)) for row in values), strict=True)
        assert [int(count) for count in without] == [2, 1, 1]
        total = STATE.decode(tf.add_n(sent)).numpy()
        exact = [float(sum(map(Fraction, column))) for column in values.T[:4].tolist()]
        np.testing.assert_allclose(total[:4], exact, rtol=1e-15, atol=3 * 2.0**-72)
        assert np.isnan(total[4:]).all()


class Alone:
    """Stands for the replicas whose messages the test adds up."""

    place = Place(3, 0, 1, 3, 0)

    def replica_id(self) -> int:
        return 0


def messages(settings: Any, are_whole: bool = False) -> tuple[list[Any], list[Any]]:
    updates = [tf.constant([[0.5, -3.25]]), tf.constant(1.5)]
    others = [
        tf.constant([7], tf.int64),
        tf.constant([[2e9], [np.nan]]),
        tf.constant(3, tf.int32),
    ]
    made = [
        MaskedSums(settings, mask, Alone()).message(
            tf.constant(4, tf.int64), updates, others, are_whole
        )
        for mask, _ in members(3)
    ]
    columns = zip(*(message.vectors for message in made), strict=True)
    return made, [tf.add_n(column) for column in columns]


@pytest.mark.parametrize("bits", [64, 32])
def test_tensors_are_read_from_a_sum(bits):
    made, sums = messages(tfdist.SecureSum(bits=bits, max_value=2.0))
    sent = [np.concatenate([vector.numpy() for vector in m.vectors]) for m in made]
    assert all(np.abs(vector.astype(float)).min() > 2.0**10 for vector in sent)  # all masked
    updates, others, clipped = made[1].read(sums)
    np.testing.assert_array_equal(updates[0], [[1.5, -6.0]])  # -3.25 is clipped
    assert float(updates[1]) == 4.5
    assert [o.dtype for o in others] == [tf.int64, tf.float32, tf.int32]
    for other, expected in zip(others, ([21], [[6e9], [np.nan]], 9), strict=True):
        np.testing.assert_array_equal(other, expected)
    assert float(clipped) == pytest.approx(2 / 7)


def test_masks_that_are_left_are_noticed():
    made, sums = messages(tfdist.SecureSum())
    with pytest.raises(tf.errors.InvalidArgumentError, match=NOT_CANCELLED):
        made[0].read([sums[0], sums[1] + made[1].vectors[1]])


@pytest.mark.parametrize("workers", [1, 2])
def test_fewer_than_three_workers_are_refused(workers):
    strategy = SimpleNamespace(place=Place(workers, 0, 1, workers, 0))
    request: Any = SimpleNamespace(session=SimpleNamespace(strategy=strategy))
    with pytest.raises(ArgumentError, match=rf"at least 3 workers.*Received: {workers}"):
        check_secure(request, tfdist.SecureSum())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bits": 16}, "bits=16"),
        ({"fraction_bits": 64}, "fraction_bits=64"),
        ({"fraction_bits": -1}, "fraction_bits=-1"),
        ({"max_value": 0}, "max_value=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, match):
    with pytest.raises(ArgumentError, match=match):
        tfdist.SecureSum(**settings)


def test_a_sum_that_could_overflow_is_refused():
    settings = tfdist.SecureSum(fraction_bits=40, max_value=2.0**20)
    settings.check_width(7)  # 7 * 2^60 is below 2^63, and 8 * 2^60 is not
    with pytest.raises(ArgumentError, match=r"65 bits.*8 replicas"):
        settings.check_width(8)
    with pytest.raises(ArgumentError, match="fewer replicas"):
        tfdist.SecureSum(bits=32, max_value=0.1).check_width(128)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"secure": True}, "Received: secure=True"),
        ({"secure": tfdist.SecureSum(), "keep_optimizer": True}, "keep_optimizer=True"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, match):
    with pytest.raises(ArgumentError, match=match):
        tfdist.FedAvg(**settings)
