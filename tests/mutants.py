"""Faults planted in the product, one at a time: the tests must find each of them.

python -m tests.mutants [NAME ...]

A copy of the project gets the fault and runs the tests that are named beside it, which
`make test` runs too. The result is kept in docs/development/testing.md.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT_S = 900


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        file: Where, below `tfdist`.
        right: What stands there once.
        wrong: What it is replaced by.
        tests: What pytest is told to run, as its arguments.
    """

    file: str
    right: str
    wrong: str
    tests: str


EQUIVALENCE = "tests/equivalence/test_equivalence.py"
BEHAVIOUR = "tests/behaviour/test_behaviour.py"
MUTANTS = {
    "a share begins a row too late": Mutant(
        "data/source.py",
        "return total * share // shares, total",
        "return total * share // shares + (share > 0), total",
        f"{EQUIVALENCE} -k mirrored-2-rows_961",
    ),
    "gradients of an own train_step are not weighed": Mutant(
        "step/reduction.py",
        "if not self._are_parts and id(optimizer) not in self._scaled:",
        "if False:",
        f"{EQUIVALENCE} -k mirrored-2-own_train_step",
    ),
    "a metric is reduced as a mean": Mutant(
        "_keras/metrics.py",
        'arguments["sample_weight"] = share',
        'arguments["sample_weight"] = 1.0',
        "tests/keras/test_discovery.py",
    ),
    "the chief's weights are not broadcast": Mutant(
        "strategies/connected.py",
        "if self.place.num_workers == 1 or not variables:",
        "if True:",
        f"{BEHAVIOUR} -k multi_worker-2-workers_take",
    ),
    "workers are gathered in another order": Mutant(
        "strategies/horovod/strategy.py",
        "[part.tobytes() for part in np.split(payloads, np.cumsum(sizes)[:-1])]",
        "[part.tobytes() for part in np.split(payloads, np.cumsum(sizes)[:-1])][::-1]",
        f"{BEHAVIOUR} -k horovod-2-objects",
    ),
    "noise is less by sqrt(2)": Mutant(
        "privacy/mechanism/grid.py",
        "self._noise = self._steps / math.sqrt(replicas)",
        "self._noise = 0.7071 * self._steps / math.sqrt(replicas)",
        f"{BEHAVIOUR} -k mirrored-2-noise_on_the_sum",
    ),
    "replicas add the same noise": Mutant(
        "privacy/mechanism/noise.py",
        "words[row, replica - self._first]",
        "words[row, 0]",
        f"{BEHAVIOUR} -k mirrored-2-noise_on_the_sum",
    ),
    "noise goes by the optimizer's count": Mutant(
        "privacy/mechanism/step.py",
        "self._strategy.replica_id(), self._number",
        "self._strategy.replica_id(), self._model.optimizer.iterations",
        "tests/privacy/test_counting.py -k no_callback_moves",
    ),
    "steps made again have the noise of the first time": Mutant(
        "privacy/progress.py",
        "[*reachable, (steps_in_weights, self._new_secret())]",
        "pairs",
        "tests/privacy/test_counting.py -k made_again",
    ),
    "a callback that writes runs on all workers": Mutant(
        "training/callbacks.py",
        "if strategy.place.is_chief or not writes(c)",
        "if True",
        f"{BEHAVIOUR} -k only_the_chief_writes",
    ),
    "the order of rows is the same in each epoch": Mutant(
        "samplers/base.py",
        "key = (seed, epoch)",
        "key = (seed, 0)",
        "tests/samplers/test_samplers.py tests/data/test_reading.py",
    ),
    "a stop is not told to the others": Mutant(
        "training/callbacks.py",
        "self._stop.requested = True",
        "self._stop.requested = False",
        f"{BEHAVIOUR} -k multi_worker-2-a_stop_on_any",
    ),
    "a checkpoint forgets where the data stands": Mutant(
        "data/datasets.py",
        "return self.dataset.skip(position.num_drawn) if position.num_drawn else self.dataset",
        "return self.dataset",
        "tests/resume/test_checkpoint.py",
    ),
    "a step's noise is the same on all replicas": Mutant(
        "_keras/random.py",
        "first = tf.where(is_of_share, batch.offset * repeats, first)",
        "first = tf.where(is_of_share, first, first)",
        f"{EQUIVALENCE} -k 'vae_of_random or noise_layers'",
    ),
    "parts are cut in the wrong order": Mutant(
        "sharding/cuts.py",
        "begin = tf.cast(number, tf.int32) * self.part_size",
        "begin = (self.parts - 1 - tf.cast(number, tf.int32)) * self.part_size",
        "tests/sharding/test_cuts.py",
    ),
    "a norm is of a replica's part": Mutant(
        "_keras/sharded_updates.py",
        "summed = tf.unstack(sharding.sum(local))",
        "summed = tf.unstack(local)",
        f"{EQUIVALENCE} -k mirrored-2-rows_961-zero",
    ),
    "rows of a sparse gradient come to all parts": Mutant(
        "sharding/cuts.py",
        "is_own = (indices >= 0) & (indices < rows)",
        "is_own = indices < rows",
        "tests/sharding/test_cuts.py",
    ),
    "a part is not brought back after training": Mutant(
        "sharding/slots.py",
        "return slot.cut.joined_arrays(parts)",
        "return slot.cut.joined_arrays([parts[0]] * len(parts))",
        f"{BEHAVIOUR} -k horovod-2-zero_has_the_bits",
    ),
    "a weight in parts is gathered in another order": Mutant(
        "sharding/exchange.py",
        "wholes[i] = cuts[i].joined(of_one)",
        "wholes[i] = cuts[i].joined(of_one[::-1])",
        f"{EQUIVALENCE} -k mirrored-2-rows_961-zero3",
    ),
    "a gradient in the backward pass is not summed": Mutant(
        "_keras/regathering.py",
        "parts = gathering.scatter(cuts, [results[i] for i in chosen])",
        "parts = [c.own(results[i], gathering.replica_id()) for c, i in zip(cuts, chosen)]",
        f"{EQUIVALENCE} -k mirrored-2-rows_961-zero3",
    ),
    "what is no mean is not seen": Mutant(
        "_keras/probe.py",
        "if np.linalg.norm(value - expected) > allowed:",
        "if False:",
        "tests/keras/test_discovery.py",
    ),
    "rows kept by rank are taken for rows": Mutant(
        "_keras/means.py",
        "return whole.shape[0] == rows and _are_close(whole, joined)",
        "return whole.shape[0] == rows",
        "tests/keras/test_discovery.py",
    ),
    "a part of two rows is left out": Mutant(
        "_keras/means.py",
        "half, last = rows // 2, min(2, rows - rows // 2)",
        "half, last = rows // 2, 0",
        "tests/keras/test_discovery.py",
    ),
    "a probe does not put states back": Mutant(
        "_keras/discovery.py",
        "for variable, value in [*touched, *recorder.before]:",
        "for variable, value in []:",
        "tests/keras/test_discovery.py",
    ),
    "a Dice loss sees its share": Mutant(
        "_keras/losses.py",
        "return not is_known_mean if is_scalar else is_known_mean is False",
        "return False",
        "tests/keras/test_discovery.py",
    ),
    "rows of positions stand next to each other": Mutant(
        "_keras/slices.py",
        'if not op.inputs and op.type != "Const":',
        'if op.type != "Const":',
        f"{EQUIVALENCE} -k embedded_positions",
    ),
    "workers of whole batches keep their own state": Mutant(
        "strategies/whole.py",
        "for variable, value in zip(variables, values, strict=True):",
        "for variable, value in ():",
        "tests/scripts/test_guard.py",
    ),
    "a copy of a dataset is not shuffled anew": Mutant(
        "_keras/datasets.py",
        "moved = (value + number * 0x9E3779B1) % 2**31",
        "moved = value",
        "tests/scripts/test_drop_in.py",
    ),
    "a callback's predict waits for all workers": Mutant(
        "scripts/drop_in.py",
        "if is_running():",
        "if False:",
        "tests/scripts/test_drop_in.py",
    ),
    "fit draws from Python's generator": Mutant(
        "strategies/session.py",
        "_seeds.fits += 1",
        "_seeds.fits += random.getrandbits(1) * 0 + 1",
        "tests/scripts/test_drop_in.py",
    ),
    "dropout is the same on all replicas": Mutant(
        "_keras/random.py",
        "first = tf.where(shape[0] == local, batch.offset * repeats, first)",
        "first = tf.where(shape[0] == local, first, first)",
        f"{EQUIVALENCE} -k mirrored-2-dropout",
    ),
    "replicas that differ are not seen": Mutant(
        "training/verification.py",
        "if digest != usual",
        "if False",
        f"{BEHAVIOUR} -k multi_worker-2-replicas_that_differ",
    ),
    "the optimizer is clipped before the sum": Mutant(
        "step/reduction.py",
        "grads = [g if g is None else g * batch.share_as(g.dtype) for g in grads]",
        "grads = tf.clip_by_global_norm(grads, 0.1)[0]",
        f"{EQUIVALENCE} -k mirrored-2-own_train_step",
    ),
    "rows of an embedding travel as one type": Mutant(
        "strategies/packing.py",
        "key = tensor.dtype.name",
        "key = ''",
        f"{BEHAVIOUR} -k multi_worker-2-sums_are",
    ),
    "sums along an axis are of another axis": Mutant(
        "strategies/collectives.py",
        "return self.sum_in_groups(self.place.mesh.groups(axis), tensors)",
        'return self.sum_in_groups(self.place.mesh.groups("data"), tensors)',
        f"{BEHAVIOUR} -k mirrored-4-sums_and_rows",
    ),
    "teams are those of the other axis": Mutant(
        "sharding/teams.py",
        "return self.mesh.groups(MODEL)",
        "return self.mesh.groups(DATA)",
        f"{BEHAVIOUR} -k mirrored-4-a_block_in_parts",
    ),
    "gradients of slices are summed over the team": Mutant(
        "sharding/teams.py",
        "return self._summed(self.mesh.groups(DATA), tensors)",
        "return self._summed(self.mesh.groups(MODEL), tensors)",
        f"{BEHAVIOUR} -k mirrored-4-a_block_in_parts",
    ),
    "a part of a saved tensor begins an element too late": Mutant(
        "resume/checkpoint/slices.py",
        "return slices_of_run(shape, begin, min(begin + length, size))",
        "return slices_of_run(shape, begin + (number > 0), min(begin + length, size))",
        "tests/resume/test_tensors.py -k sharded",
    ),
    "what was not sent is forgotten": Mutant(
        "compression/power_sgd.py",
        "matrix += tf.convert_to_tensor(self.residual)",
        "matrix += tf.zeros_like(matrix)",
        "tests/compression/test_compression.py -k what_is_applied",
    ),
    "vectors are drawn anew at each step": Mutant(
        "compression/power_sgd.py",
        "vectors = self._tilted(vectors)",
        "vectors = self._tilted(self._drawn(vectors.shape[0], step))",
        "tests/compression/test_compression.py -k authors_method",
    ),
    "each of other replicas gets a mean of what was not sent": Mutant(
        "resume/checkpoint/tensors.py",
        "mean = (total / replicas).astype(total.dtype)",
        "mean = (total / saved).astype(total.dtype)",
        "tests/resume/test_tensors.py -k dealt_out",
    ),
    "clients have the random numbers of one": Mutant(
        "federated/state.py",
        "_SEEDS_APART = 1_000_003",
        "_SEEDS_APART = 0",
        "tests/federated/test_federated.py -k loop_over",
    ),
    "a client takes another one's optimizer": Mutant(
        "federated/client_optimizers.py",
        "[tf.convert_to_tensor(table)[slot] for",
        "[tf.convert_to_tensor(table)[slot * 0] for",
        "tests/federated/test_federated.py -k loop_over",
    ),
    "a client begins with the weights of the one before": Mutant(
        "federated/round.py",
        "values = [*start.trained, *start.averaged, *counted]",
        "values = [*_values(state.trained), *start.averaged, *counted]",
        "tests/federated/test_federated.py -k loop_over",
    ),
    "a client's update is not clipped": Mutant(
        "privacy/mechanism/client_updates.py",
        "part * tf.cast(factor, part.dtype)",
        "part",
        "tests/federated/test_client_privacy.py -k contributes",
    ),
    "clients that protect their examples have the noise of one": Mutant(
        "privacy/mechanism/silo_step.py",
        "tf.cast(self._client, tf.int32)",
        "tf.cast(0 * self._client, tf.int32)",
        "tests/federated/test_silo_privacy.py -k each_client_adds",
    ),
    "epsilon is that of the client with the most examples": Mutant(
        "privacy/accounting/parts.py",
        "one.sampling_probability <= other.sampling_probability",
        "one.sampling_probability >= other.sampling_probability",
        "tests/federated/test_silo_privacy.py -k largest",
    ),
    "the sum over clients is divided by their number": Mutant(
        "privacy/mechanism/client_updates.py",
        "self._expected = sampling_probability * num_clients",
        "self._expected = num_clients",
        "tests/federated/test_client_privacy.py -k loop_that_clips",
    ),
    "noise on the sum over clients is less by sqrt(2)": Mutant(
        "privacy/mechanism/client_updates.py",
        "counts(tf.ensure_shape(flat, [sum(sizes)]), normal,",
        "counts(tf.ensure_shape(flat, [sum(sizes)]), normal * 0.7071,",
        "tests/federated/test_client_privacy.py -k deviation",
    ),
    "a repeated round has the masks of the first": Mutant(
        "federated/masks.py",
        "self._attempts[number, lane] += 1",
        "self._attempts[number, lane] += 0",
        "tests/federated/test_secure.py -k twice",
    ),
    "a metric that is not finite is 0 in a secure sum": Mutant(
        "federated/secure_sum.py",
        "return tf.stack([*words, outside])",
        "return tf.stack([*words, tf.zeros_like(outside)])",
        "tests/federated/test_secure.py -k sums_of_metrics",
    ),
    "a round that fails leaves the weights of a client": Mutant(
        "federated/snapshot.py",
        "            variable.assign(value)",
        "            pass",
        "tests/federated/test_client_privacy.py -k round_that_fails",
    ),
    "moments are those of the share": Mutant(
        "_keras/batch_norm.py",
        "first, second, count = tf.unstack(reduced)",
        "first, second, count = tf.unstack(sums)",
        "tests/keras/test_discovery.py -k replicas_can_share",
    ),
    "a launcher that does not know the token is admitted": Mutant(
        "launch/callers.py",
        'if hmac.compare_digest(message["proof"], handshake.launcher_proof):',
        "if True:",
        "tests/launch/test_strangers.py -k nobody",
    ),
    "a false coordinator is believed": Mutant(
        "launch/client.py",
        'and hmac.compare_digest(message["proof"], handshake.coordinator_proof)',
        "and True",
        "tests/launch/test_strangers.py -k false_coordinator",
    ),
    "who reports a hang is left out": Mutant(
        "launch/slots.py",
        "if failure.returncode != HUNG:",
        "if True:",
        "tests/launch/test_stopped.py -k hangs",
    ),
}


def found(mutant: Mutant) -> bool:
    """Tells whether a test fails where the fault is planted."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "copy"
        listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True)
        for file in listed.splitlines():
            if file.startswith(("tfdist/", "tests/", "examples/", "pyproject.toml")):
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, copy / file)
        place = copy / "tfdist" / mutant.file
        text = place.read_text()
        if mutant.right not in text:
            raise SystemExit(f"{mutant.file} has no {mutant.right!r} any more")
        place.write_text(text.replace(mutant.right, mutant.wrong))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", *shlex.split(mutant.tests)],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    if done.returncode not in (0, 1):
        raise SystemExit(done.stdout[-3000:] + done.stderr[-3000:])
    return done.returncode == 1


def main(*names: str) -> None:
    missed = 0
    for name in names or MUTANTS:
        begin = time.monotonic()
        is_found = found(MUTANTS[name])
        missed += not is_found
        seconds = time.monotonic() - begin
        print(f"{'found ' if is_found else 'MISSED'} {seconds:4.0f} s  {name}", flush=True)
    raise SystemExit(missed)


if __name__ == "__main__":
    main(*sys.argv[1:])
