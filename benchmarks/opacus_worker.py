"""Steps of Opacus, plain and private, for `python -m benchmarks.privacy --opacus PYTHON`.

python benchmarks/opacus_worker.py MODEL MODE STEPS PAIRS [THREADS]

Needs PyTorch and Opacus, and nothing of tfdist, so it runs in an environment of its own. The
models are those of `benchmarks/privacy.py`, with Adam and batches of 256 examples on average,
drawn by Opacus's own Poisson sampling. It prints "measured" and a list of pairs: the mean
milliseconds of a private step, and of a plain one, taken in turn.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from elsewhere import print_pairs  # beside this script
from opacus import PrivacyEngine
from torch import nn
from torch.nn import functional

BATCH = 256


class MLP(nn.Sequential):
    """784-512-256-10."""

    shape: tuple[int, ...] = (784,)
    words = 0

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
        )


class CNN(nn.Sequential):
    """The CNN of the DP-SGD tutorials for MNIST."""

    shape: tuple[int, ...] = (1, 28, 28)
    words = 0

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 8, 2, padding=3),
            nn.ReLU(),
            nn.MaxPool2d(2, 1),
            nn.Conv2d(16, 32, 4, 2),
            nn.ReLU(),
            nn.MaxPool2d(2, 1),
            nn.Flatten(),
            nn.Linear(512, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )


class Attention(nn.Module):
    """4 heads of 32, of linear layers, which both ways of Opacus can do."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(128, 128), nn.Linear(128, 128)
        self.value, self.out = nn.Linear(128, 128), nn.Linear(128, 128)

    def forward(self, x: Any) -> Any:
        q, k, v = (
            layer(x).view(*x.shape[:2], 4, 32).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        made = functional.scaled_dot_product_attention(q, k, v)
        return self.out(made.transpose(1, 2).reshape(x.shape))


class Encoder(nn.Module):
    """d=128, 2 layers, sequence 64, vocabulary 8k."""

    shape: tuple[int, ...] = (64,)
    words = 8192

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8192, 128)
        self.norms = nn.ModuleList([nn.LayerNorm(128) for _ in range(4)])
        self.attention = nn.ModuleList([Attention() for _ in range(2)])
        self.wide = nn.ModuleList([nn.Linear(128, 512) for _ in range(2)])
        self.narrow = nn.ModuleList([nn.Linear(512, 128) for _ in range(2)])
        self.last = nn.Linear(128, 10)

    def forward(self, words: Any) -> Any:
        hidden = self.embedding(words)
        for i in range(2):
            hidden = hidden + self.attention[i](self.norms[2 * i](hidden))
            wide = functional.gelu(
                self.wide[i](self.norms[2 * i + 1](hidden)), approximate="tanh"
            )
            hidden = hidden + self.narrow[i](wide)
        return self.last(hidden.mean(1))


MODELS = {"MLP": MLP, "CNN": CNN, "encoder": Encoder}


def training(name: str, mode: str | None) -> Any:
    """Makes a function that makes so many steps and gives the milliseconds of one."""
    torch.manual_seed(0)
    kind: Any = MODELS[name]
    model = kind()
    x = torch.randint(kind.words, (20_000, *kind.shape)) if kind.words else None
    x = torch.rand(20_000, *kind.shape) if x is None else x
    data = torch.utils.data.TensorDataset(x, torch.randint(10, (20_000,)))
    loader: Any = torch.utils.data.DataLoader(data, BATCH, shuffle=True)
    optimizer: Any = torch.optim.Adam(model.parameters())
    criterion: Any = nn.CrossEntropyLoss()
    if mode is not None:
        options = {"noise_multiplier": 1.1, "max_grad_norm": 1.0, "grad_sample_mode": mode}
        if mode == "ghost":
            options["criterion"] = criterion
        private = PrivacyEngine().make_private(
            module=model, optimizer=optimizer, data_loader=loader, **options
        )
        if mode == "ghost":
            model, optimizer, criterion, loader = private
        else:
            model, optimizer, loader = private

    def batches() -> Any:
        while True:
            yield from loader

    stream = batches()

    def steps(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            x, y = next(stream)
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        return 1000 * (time.perf_counter() - start) / count

    return steps


def main(name: str, mode: str, steps: str, pairs: str, threads: str = "2") -> None:
    torch.set_num_threads(int(threads))
    private, plain = training(name, mode), training(name, None)
    private(2), plain(2)
    print_pairs(lambda: private(int(steps)), lambda: plain(int(steps)), int(pairs))


if __name__ == "__main__":
    main(*sys.argv[1:])
