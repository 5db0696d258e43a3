"""The two parts of the demo: what is trained, by whom, with which settings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adagrad, Adam

from kfac_fast import KFAC
from kfac_fast.data import curves, curves_autoencoder, digits

from .training import SETS_ITS_OWN, Contender, Task


def digits_task() -> Task:
    """Classify 8×8 handwritten digits. Small enough that one thread is faster than two."""
    data = digits()

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 100), nn.Tanh(), nn.Linear(100, 50), nn.Tanh(), nn.Linear(50, 10))

    kfac = Contender(
        "K-FAC",
        lambda model, rate: KFAC(model, lr=rate, momentum=0.9, damping=0.01, kl_clip=0.01),
        rates=(0.1,),
        # What the rivals' grids do in the open was done for K-FAC beforehand, with more values: the table must say so.
        settings="momentum 0.9, damping 0.01, KL clip 0.01, chosen beforehand among some 45 settings",
    )
    return Task(
        name="digits",
        title="Handwritten digits, 64-100-50-10 classifier",
        model=model,
        loss=functional.cross_entropy,
        train=(data.train_images, data.train_labels),
        probe=(data.train_images, data.train_labels),
        test=(data.test_images, data.test_labels),
        score=lambda logits, labels: (logits.argmax(1) == labels).float().mean(),
        score_name="test accuracy",
        contenders=(kfac, *rivals((0.03, 0.1, 0.3, 1.0), (0.01, 0.03, 0.1, 0.3), (0.003, 0.01, 0.03, 0.1))),
        batch=500,
        steps=60,
        measure_every=1,
        marks=(10, 20, 40, 60),
        goals=(0.1, 0.01),
        threads=1,
    )


def curves_task() -> Task:
    """Compress 28×28 images of curves to six numbers and back."""
    data = curves()
    probe, test = data.train[:1000], data.test[:1000]
    kfac = Contender(
        "K-FAC",
        # The paper's coefficient and fraction (Martens & Grosse 2015, sec. 8); everything else sets itself.
        lambda model, rate: KFAC(
            model, adaptive=True, likelihood="bernoulli", factor_fraction=1 / 8, weight_decay=1e-5
        ),
        rates=(SETS_ITS_OWN,),
        settings="adaptive: rate, momentum and damping set themselves; statistics from 1/8 of each batch",
    )
    mean_image = data.train.mean(0).expand_as(probe)  # the best that outputs without regard to the input can be
    return Task(
        name="curves",
        title="CURVES autoencoder, 784-400-200-100-50-25-6 and back",
        model=lambda: curves_autoencoder(generator=torch.Generator().manual_seed(0)),
        loss=pixel_loss,
        train=(data.train, data.train),
        probe=(probe, probe),
        test=(test, test),
        score=pixel_loss,
        score_name="test loss",
        contenders=(
            kfac,
            *rivals((0.003, 0.01, 0.03, 0.1), (0.003, 0.01, 0.03, 0.1), (0.0003, 0.001, 0.003, 0.01), longer=3),
        ),
        batch=1000,
        steps=100,
        measure_every=5,
        marks=(20, 50, 100),
        goals=(185.0, 120.0),
        threads=torch.get_num_threads(),
        plateau=("mean image", functional.binary_cross_entropy(mean_image, probe, reduction="sum").item() / len(probe)),
    )


def rivals(
    sgd: tuple[float, ...], adagrad: tuple[float, ...], adam: tuple[float, ...], longer: int = 1
) -> tuple[Contender, ...]:
    """torch's own optimizers, each with its grid of learning rates."""
    return (
        Contender(
            "SGD-Nesterov",
            lambda model, rate: SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True),
            rates=sgd,
            settings="momentum 0.9",
            longer=longer,
        ),
        Contender("AdaGrad", lambda model, rate: Adagrad(model.parameters(), lr=rate), adagrad, "", longer),
        Contender("Adam", lambda model, rate: Adam(model.parameters(), lr=rate), adam, "", longer),
    )


def pixel_loss(logits: Tensor, images: Tensor) -> Tensor:
    """Bernoulli negative log-likelihood of ``[N, 784]`` images: summed over pixels, mean over images."""
    return functional.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)
