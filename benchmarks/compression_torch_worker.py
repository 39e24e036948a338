"""One rank of PyTorch's DistributedDataParallel with its PowerSGD hook, beside ours.

python benchmarks/compression_torch_worker.py RANK ADDRESS DEVICE
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

WARM, STEPS, BATCH = 4, 40, 32


def bytes_sent(device: str) -> int:
    for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        if name.strip() == device:
            return int(numbers.split()[8])
    return 0


def perceptron() -> torch.nn.Module:
    """The digits' model of compression_worker.py."""
    return torch.nn.Sequential(
        torch.nn.Linear(64, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 10),
    )


def step(rank_of_matrices: int, device: str) -> tuple[float, float]:
    torch.manual_seed(0)
    model = DistributedDataParallel(perceptron())
    if rank_of_matrices:
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=rank_of_matrices, start_powerSGD_iter=2
        )
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    optimizer = torch.optim.Adam(model.parameters())
    begin, before = 0.0, 0
    for number in range(WARM + STEPS):
        if number == WARM:
            begin, before = time.perf_counter(), bytes_sent(device)
        optimizer.zero_grad()
        x, y = torch.randn(BATCH, 64), torch.randint(0, 10, (BATCH,))
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return (time.perf_counter() - begin) / STEPS, (bytes_sent(device) - before) / STEPS


def main(rank: str, address: str, device: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = device
    dist.init_process_group(
        "gloo", init_method=f"tcp://{address}:29512", rank=int(rank), world_size=2
    )
    measured = [
        (f"DDP PowerSGD {r}" if r else "DDP none", *step(r, device)) for r in (0, 1, 2, 4)
    ]
    if rank == "0":
        print("measured", measured, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
