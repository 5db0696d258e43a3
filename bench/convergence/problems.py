"""What is trained: autoencoders on CURVES and on the handwritten digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

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


def _digits_autoencoder(seed: int) -> nn.Module:
    sizes = (64, 80, 40, 20, 6, 20, 40, 80, 64)
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
            _digits_autoencoder,
            first_batch=200,
        ),
    )
}
