"""What would make the chosen training faster, or let it fit."""

from __future__ import annotations

import math
from dataclasses import replace

from tfdist.cluster.cost import pays_below
from tfdist.strategies.choice.candidates import Candidate
from tfdist.strategies.choice.hardware import Hardware
from tfdist.strategies.choice.workload import Workload

_SKEWED = 3.0  # the largest class over the smallest
_SHORT_S = 0.02  # below, a second worker seldom pays
_GOOD = 0.8  # efficiency


def advice(
    load: Workload, hardware: Hardware, best: Candidate | None, others: list[Candidate]
) -> list[str]:
    """Lists what would help, the most useful first.

    Args:
        load: What is trained.
        hardware: Where.
        best: The recommended candidate, if there is one.
        others: All candidates.
    """
    hints = []
    if best is None:
        hints += _to_fit(load, others)
        best = others[0]
    hints += _batch(load, hardware, best, others)
    hints += _compression(load, hardware, best, others)
    if best.bottleneck == "input":
        hints.append(
            f"The input pipeline takes {load.input_s or 0:.3g} s a batch, longer than the "
            "step: cache or prefetch the data, or store it smaller."
        )
    hints += _device(load, hardware)
    if load.class_ratio is not None and load.class_ratio >= _SKEWED:
        hints.append(
            f"The largest class has {load.class_ratio:.3g} times the examples of the smallest: "
            'class_weight="balanced", or sampler=tfdist.samplers.ClassBalanced(). '
            "It changes what is learned, not the speed."
        )
    return hints


def _to_fit(load: Workload, others: list[Candidate]) -> list[str]:
    """Says what would let a training fit that no strategy fits."""
    hints = []
    largest = max(
        ("weights", load.weight_bytes),
        ("optimizer", load.slot_bytes),
        ("activations", others[0].memory["activations"] if others[0].memory else 0),
        key=lambda part: part[1],
    )[0]
    if largest == "activations":
        hints.append(
            "Activations take most of the memory: halve batch_size and set "
            "gradient_accumulation_steps=2 of the optimizer, or call tfdist.recompute(model)."
        )
    else:
        hints.append(
            "Weights and optimizer take most of the memory: more devices with tfdist.Zero(3), "
            "or an optimizer with less state, such as SGD or Adafactor."
        )
    return hints


def _batch(
    load: Workload, hardware: Hardware, best: Candidate, others: list[Candidate]
) -> list[str]:
    """Says which batch makes several workers pay."""
    parallel = [
        c for c in others if c.strategy in ("mirrored", "multi_worker", "horovod") and c.memory
    ]
    parallel = [c for c in parallel if c.obstacle is None and c.workers > 1]
    if load.indivisible is not None or not parallel:
        return []
    quickest = min(parallel, key=lambda c: c.step_s)
    if quickest.efficiency >= _GOOD or quickest.communication_s == 0:
        return []
    # Computing grows with the batch, communication does not.
    alone = next(c for c in others if c.strategy == "single")
    per_row = alone.compute_s / load.batch_size
    needed = quickest.communication_s * quickest.workers * _GOOD / (1 - _GOOD)
    rows = 2 ** math.ceil(math.log2(max(1.0, needed / per_row)))
    if rows <= load.batch_size:
        return []
    return [
        f"A batch of about {rows} instead of {load.batch_size} would bring {quickest.strategy} "
        f"on {quickest.workers} workers to {_GOOD:.0%} efficiency, as communication takes "
        f"{1e3 * quickest.communication_s:.3g} ms whatever the batch. Another batch size "
        "trains differently: see tfdist.LearningRateScaling."
    ]


def _compression(
    load: Workload, hardware: Hardware, best: Candidate, others: list[Candidate]
) -> list[str]:
    """Says at which bandwidth compression pays."""
    sent = next(
        (
            c
            for c in (best, *others)
            if c.strategy in ("mirrored", "multi_worker", "horovod") and c.communication_s
        ),
        None,
    )
    if sent is None or load.indivisible is not None:
        return []
    # Each gradient is read and written twice more, at the rate of an elementwise op.
    cost = 3 * load.gradient_bytes / hardware.rates.bytes_per_s
    limit = pays_below(load.gradient_bytes / 2, cost, sent.workers)
    link = hardware.link(sent.strategy, sent.workers, sent.hosts)
    gain = sent.communication_s - replace(link).all_reduce_s(
        load.gradient_bytes / 2, sent.workers
    )
    if link.bytes_per_s >= limit or gain < 0.1 * sent.step_s:
        return []
    return [
        f'compression="bf16" sends half the bytes, which pays below {8 * limit / 1e9:.3g} '
        f"Gbit/s; this link has {8 * link.bytes_per_s / 1e9:.3g}. tfdist.PowerSGD sends far "
        "fewer. Both round: the result is close, not equal."
    ]


def _device(load: Workload, hardware: Hardware) -> list[str]:
    """Says what the device could do better."""
    hints = []
    if hardware.gpus:
        hints.append(
            'Mixed precision: keras.config.set_dtype_policy("mixed_bfloat16") halves '
            "activations, and uses the tensor cores of recent GPUs. It rounds."
        )
        return hints
    rates, work = hardware.rates, load.work
    elsewhere = work.moved_bytes / rates.bytes_per_s + work.ops * rates.op_s
    if elsewhere > 1.0 * work.flops / rates.flops_per_s and work.ops > 50:
        hints.append(
            "Most of the step is in small and elementwise ops: compile(jit_compile=True) lets "
            "XLA join them. Its gain is not predicted here; try it."
        )
    return hints
