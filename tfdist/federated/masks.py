"""Masks of secure sums: numbers that look random, and cancel in the sum over all workers.

The cryptography is that of the package `cryptography`: X25519 (RFC 7748) agrees on a secret of
two workers, HKDF with SHA-256 (RFC 5869) derives a key for each sum from it, and ChaCha20
(RFC 8439) turns a key into a stream of bytes.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfdist.errors import DisagreementError, MissingPackageError

_PURPOSE = b"tfdist secure sum 1"
_CHUNK = 2**22  # bytes of a stream at a time
Exchange = Callable[[Any], list[Any]]


def require_cryptography() -> None:
    """Imports the package, so that a missing one is reported before training.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        import cryptography.hazmat.primitives.ciphers  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"Secure sums must have the package cryptography. Received: {error}. Install it "
            'with: pip install "tfdist[secure]"'
        ) from None


class PairwiseMasks:
    """The masks of one worker, in one training. No key masks two sums.

    Args:
        worker: The worker's number.
        secrets: The secret that it shares with each other worker, by that worker's number.
        training: Bytes that name the training, the same on all workers.

    Attributes:
        worker: The worker's number.
    """

    def __init__(self, worker: int, secrets: Mapping[int, bytes], training: bytes) -> None:
        self.worker = worker
        self._secrets = dict(secrets)
        self._training = training
        self._attempts: Counter[tuple[int, int]] = Counter()

    def add_to(
        self, number: int, lane: int, vectors: Sequence[NDArray[Any]]
    ) -> list[NDArray[Any]]:
        """Adds masks to vectors, modulo 2^bits.

        If a round is repeated, it gets other masks. If masks were used again, the difference of
        two messages would be that of the updates.

        Args:
            number: The number of the round.
            lane: The number of a replica among those of its worker. It is masked together with
                the replicas of other workers that have the same number.
            vectors: Whole numbers of 32 or 64 bits.

        Returns:
            The masked vectors, which look random to whoever lacks the secrets.
        """
        attempt = self._attempts[number, lane]
        self._attempts[number, lane] += 1
        masked = [vector.view(f"u{vector.itemsize}").copy() for vector in vectors]
        for other in sorted(self._secrets):
            key = self._key(other, number, attempt, lane)
            stream = _Stream(key)
            for vector in masked:
                mask = stream.read(len(vector), vector.dtype)
                if other > self.worker:
                    vector += mask
                else:
                    vector -= mask
        return [m.view(v.dtype) for m, v in zip(masked, vectors, strict=True)]

    def _key(self, other: int, number: int, attempt: int, lane: int) -> bytes:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        first, second = sorted((self.worker, other))
        # Each part has a fixed length, so different parts never give the same bytes.
        place = struct.pack(">5q", number, attempt, first, second, lane)
        info = _PURPOSE + self._training + place
        derived = HKDF(hashes.SHA256(), 32, None, info).derive(self._secrets[other])
        return bytes(derived)


class _Stream:
    """The bytes that ChaCha20 makes of a key.

    Args:
        key: 32 bytes. It is used for one stream only, so the nonce is 0.
    """

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        self._encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor()

    def read(self, count: int, dtype: Any) -> NDArray[Any]:
        """Returns the next numbers.

        Args:
            count: How many.
            dtype: Their type, unsigned.
        """
        numbers = np.empty(count, np.dtype(dtype))
        octets = numbers.view(np.uint8)
        for begin in range(0, len(octets), _CHUNK):
            part = octets[begin : begin + _CHUNK]
            part[:] = np.frombuffer(self._encryptor.update(bytes(len(part))), np.uint8)
        return numbers


def agree(worker: int, exchange: Exchange) -> tuple[PairwiseMasks, str]:
    """Agrees on secrets with all other workers, by new keys.

    Args:
        worker: The number of this worker.
        exchange: Collects an object of each worker, in the workers' order.

    Returns:
        The masks of this worker, and a fingerprint of the keys of all workers. It is equal on
        all workers if nobody on the way has exchanged keys.

    Raises:
        DisagreementError: A worker has sent no key.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.x25519 import (
        X25519PrivateKey,
        X25519PublicKey,
    )

    own = X25519PrivateKey.generate()
    raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
    received = exchange((_PURPOSE, own.public_key().public_bytes(*raw)))
    lacking = [n for n, part in enumerate(received) if not _is_key(part)]
    if lacking:
        raise DisagreementError(
            "All workers must take part in a secure sum. Received: no key of worker "
            f"{', '.join(map(str, lacking))}. Pass the same `secure` on every worker."
        )
    keys = [key for _, key in received]
    training = hashlib.sha256(_PURPOSE + b"".join(keys)).digest()
    secrets = {
        other: own.exchange(X25519PublicKey.from_public_bytes(key))
        for other, key in enumerate(keys)
        if other != worker
    }
    return PairwiseMasks(worker, secrets, training), _readable(training)


def _is_key(received: Any) -> bool:
    """Returns whether a worker has sent a key, not what another training exchanges."""
    if not isinstance(received, tuple) or len(received) != 2:
        return False
    purpose, key = received
    return bool(purpose == _PURPOSE) and isinstance(key, bytes) and len(key) == 32


def _readable(digest: bytes) -> str:
    """Returns 160 bits in groups. Of fewer, two sets of keys with equal ones could be found."""
    text = digest[:20].hex()
    return " ".join(text[begin : begin + 4] for begin in range(0, len(text), 4))
