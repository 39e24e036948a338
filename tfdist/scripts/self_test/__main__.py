"""The program of each worker of `tfdist test`: small trainings, collectives, speeds."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np

import tfdist
from tfdist.cluster import PS, Cluster
from tfdist.errors import PeerError
from tfdist.launch.self_test.result import Compared, Result
from tfdist.scripts.self_test import measurements
from tfdist.scripts.self_test.trainings import TRAININGS, Weights, distance, train

_POLL_S = 0.1


def main() -> None:
    """Runs the parts, and lets the chief write what they found."""
    options = _options()
    strategy = tfdist.init().strategy
    place = strategy.place
    replicas = place.num_replicas
    workers = max(place.num_workers, options.workers)
    what = strategy.describe(None)
    _say(f"{strategy.name}, {what}. Small trainings are compared with one process.")
    compared = _compare(strategy, options)
    is_exact = measurements.sums_are_exact(strategy) if not strategy.has_servers else True
    _say(f"Times of collectives, for about {options.seconds:g} s.")
    if strategy.has_servers:
        timings = measurements.server_timings(
            len(Cluster.from_environment().jobs[PS]), options.seconds, options.largest
        )
        speeds = measurements.server_speeds(workers)
    else:
        timings = measurements.timings(strategy, options.seconds, options.largest)
        speeds = measurements.speeds(strategy)
    if place.is_chief:
        Result(
            strategy.name,
            what,
            workers,
            replicas,
            is_exact,
            tuple(compared),
            tuple(timings),
            tuple(speeds),
        ).write(options.result)


def _options() -> Any:
    parser = argparse.ArgumentParser()
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--reference-limit", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--largest", type=int, required=True)
    parser.add_argument("--workers", type=int, default=1)
    return parser.parse_args()


def _say(line: str) -> None:
    if tfdist.is_chief():
        print(f"tfdist test: {line}", flush=True)


def _compare(strategy: Any, options: Any) -> list[Compared]:
    """Trains on all workers, and compares with one process and between the workers."""
    trainings = [t for t in TRAININGS if t.is_linear or strategy.synchronous]
    weights = {training.name: train(training, tfdist.fit) for training in trainings}
    digests = strategy.gather_objects({name: _digest(each) for name, each in weights.items()})
    distances: dict[str, float] = {}
    if strategy.place.is_chief:
        reference = _reference(options.reference, options.reference_limit)
        distances = {name: distance(each, reference[name]) for name, each in weights.items()}
    # All wait until the one process has ended: it would disturb what is measured next.
    distances = strategy.broadcast_object(distances)
    return [
        Compared(
            training.name,
            distances[training.name],
            training.tolerance,
            tuple(
                worker
                for worker, of_worker in enumerate(digests)
                if of_worker[training.name] != digests[0][training.name]
            ),
        )
        for training in trainings
    ]


def _digest(weights: Weights) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weights[name]).tobytes())
    return digest.hexdigest()


def _reference(file: Path, seconds: float) -> dict[str, Weights]:
    """Waits for the weights of one process, which trains beside the workers."""
    deadline = time.monotonic() + seconds
    failed = file.with_name(f"{file.name}.failed")
    while not file.exists():
        if failed.exists() or time.monotonic() > deadline:
            raise PeerError(
                "The training in one process must end. Received: "
                + (failed.read_text() if failed.exists() else f"nothing within {seconds:g} s.")
            )
        time.sleep(_POLL_S)
    reference: dict[str, Weights] = pickle.loads(file.read_bytes())
    return reference


if __name__ == "__main__":
    main()
