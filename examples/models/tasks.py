"""The six models with data that is on every machine: handwritten digits, and Python's own source text."""

from __future__ import annotations

import argparse
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast.data import digits

from .lstm import CharLSTM
from .mixer import Mixer
from .resnet import ResNet20
from .separable import SeparableNet
from .transformer import CharTransformer
from .unet import UNet

CONTEXT = 32


@dataclass(frozen=True)
class Task:
    """A model, its data and its loss.

    Attributes:
        model: Makes it.
        batch: Inputs and targets of a size, from a generator.
        loss: A mean cross entropy.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy


@functools.cache
def source_text() -> tuple[Tensor, int]:
    """The characters of a module of the standard library as numbers, and how many different ones there are."""
    text = inspect.getsource(argparse)
    vocabulary = sorted(set(text))
    number = {character: i for i, character in enumerate(vocabulary)}
    return torch.tensor([number[character] for character in text]), len(vocabulary)


def text_batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pieces ``[N, T]`` of the text, and their next characters."""
    text, _ = source_text()
    starts = torch.randint(len(text) - CONTEXT - 1, (size, 1), generator=generator)
    pieces = text[starts + torch.arange(CONTEXT + 1)]
    return pieces[:, :-1], pieces[:, 1:]


_digits = functools.cache(digits)


def image_batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Digits ``[N, 1, 8, 8]`` and their classes."""
    data = _digits()
    chosen = torch.randint(len(data.train_images), (size,), generator=generator)
    return data.train_images[chosen].view(-1, 1, 8, 8), data.train_labels[chosen]


def pixel_batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Digits under noise, and ``[N, 8, 8]`` which pixels are ink."""
    images, _ = image_batch(size, generator)
    return images + 0.5 * torch.randn(images.shape, generator=generator), (images[:, 0] > 0.5).long()


def per_character(logits: Tensor, targets: Tensor) -> Tensor:
    """Logits ``[N, T, vocabulary]``, targets ``[N, T]``."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


TASKS: dict[str, Task] = {
    "transformer": Task(lambda: CharTransformer(source_text()[1], CONTEXT), text_batch, per_character),
    "lstm": Task(lambda: CharLSTM(source_text()[1]), text_batch, per_character),
    "resnet": Task(lambda: ResNet20(channels=1), image_batch),
    "separable": Task(SeparableNet, image_batch),
    "unet": Task(UNet, pixel_batch),
    "mixer": Task(Mixer, image_batch),
}
