"""What is trained: autoencoders on CURVES, on the handwritten digits, and on MNIST where it is on disk."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from kfac_fast.data import curves, curves_autoencoder, digits, sparse_init_

FULL_AT = 500  # the update from which a batch is the whole training set, as in the paper
L2 = 1e-5  # the paper's coefficient; part of every contender's objective, not of the losses shown


@dataclass(frozen=True)
class Problem:
    """An autoencoder and its training images; the loss is the Bernoulli one, summed over pixels."""

    name: str
    title: str
    images: Callable[[], Tensor]  # [N, pixels]
    model: Callable[[int], nn.Module]  # of a seed
    first_batch: int

    @staticmethod
    def loss(logits: Tensor, images: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


@cache
def _curves() -> Tensor:
    return curves(5_000, 0).train


@cache
def _digits() -> Tensor:
    return digits().train_images


@cache
def _mnist() -> Tensor:
    """The first 10,000 training images, as [N, 784] in [0, 1], from the folder that KFAC_FAST_MNIST names."""
    name = "train-images-idx3-ubyte"
    folder = Path(os.environ.get("KFAC_FAST_MNIST", "."))
    found = [path for path in (folder / name, folder / f"{name}.gz") if path.exists()]
    if not found:
        raise FileNotFoundError(f"{folder}, the folder in KFAC_FAST_MNIST, has neither {name} nor {name}.gz")
    content = found[0].read_bytes()
    content = gzip.decompress(content) if found[0].suffix == ".gz" else content
    header = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(4)]
    if header[0] != 2051 or header[2:] != [28, 28] or len(content) != 16 + header[1] * 784:
        raise ValueError(f"{found[0]} is not a file of 28 x 28 images: its header has {header}")
    pixels = torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8)
    return pixels.view(-1, 784)[:10_000].float() / 255


def _autoencoder(sizes: tuple[int, ...], seed: int) -> nn.Module:
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        layers.append(nn.Linear(d_in, d_out))
        if d_out != min(sizes):  # the code is linear
            layers.append(nn.Sigmoid())
    return sparse_init_(nn.Sequential(*layers[:-1]), generator=torch.Generator().manual_seed(seed))


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            "curves",
            "CURVES autoencoder, 5,000 images, batch 1,000 → 5,000",
            _curves,
            lambda seed: curves_autoencoder(generator=torch.Generator().manual_seed(seed)),
            first_batch=1_000,
        ),
        Problem(
            "digits",
            "Digits autoencoder, 1,437 images, batch 200 → 1,437",
            _digits,
            lambda seed: _autoencoder((64, 80, 40, 20, 6, 20, 40, 80, 64), seed),
            first_batch=200,
        ),
        Problem(
            "mnist",
            "MNIST autoencoder, 10,000 images, batch 1,000 → 10,000",
            _mnist,
            lambda seed: _autoencoder((784, 1000, 500, 250, 30, 250, 500, 1000, 784), seed),
            first_batch=1_000,
        ),
    )
}
