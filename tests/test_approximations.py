"""What holds for every approximation: resuming, cutting the batch, NaN, memory, and what it says about itself."""

from __future__ import annotations

import io
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast import KFAC, Adaptive, Bernoulli, Categorical, Preconditioner
from kfac_fast.approximations import APPROXIMATIONS
from kfac_fast.data import digits

DOUBLE = torch.float64


@pytest.fixture(params=sorted(APPROXIMATIONS))
def approximation(request: pytest.FixtureRequest) -> str:
    return request.param


class Reordered(nn.Module):
    """Registers its layers in another order than it runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(5, 3)
        self.first = nn.Linear(6, 8)
        self.middle = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).tanh()).tanh())


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return Reordered().to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32, n: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(n, 6, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator)


def train(model: nn.Module, optimizer: KFAC, steps: range) -> list[Tensor]:
    for step in steps:
        x, y = batch(step, next(model.parameters()).dtype)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = Categorical().loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return [p.detach().clone() for p in model.parameters()]


OPTIONS: dict[str, dict] = {
    "fixed": {"factor_every": 2, "inverse_every": 3},
    "fraction": {"inverse_every": 2, "factor_fraction": 1 / 2},
    "adaptive": {"adaptive": Adaptive(t1=2, t3=3)},
    "searching": {"adaptive": Adaptive(t1=2, t2=2, t3=2, gamma="search"), "damping": 1.0},
}


@pytest.mark.parametrize("mode", OPTIONS)
@pytest.mark.parametrize("stop", [0, 1, 4, 5])
def test_resume_is_bit_exact(approximation: str, mode: str, stop: int) -> None:
    options = {"approximation": approximation, **OPTIONS[mode]}
    model = network()
    expected = train(model, KFAC(model, **options), range(8))
    model = network()
    optimizer = KFAC(model, **options)
    train(model, optimizer, range(stop))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    model = network()
    optimizer = KFAC(model, **options)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert all(torch.equal(p, q) for p, q in zip(train(model, optimizer, range(stop, 8)), expected, strict=True))


def test_a_checkpoint_of_another_approximation_is_refused(approximation: str) -> None:
    others = [name for name in APPROXIMATIONS if name != approximation]
    state = KFAC(network(), approximation=approximation).state_dict()
    for other in others:
        optimizer = KFAC(network(), approximation=other)
        with pytest.raises(ValueError, match=f"is of approximation='{approximation}', the optimizer has .*'{other}'"):
            optimizer.load_state_dict(state)


def statistics(pre: Preconditioner) -> list[Tensor]:
    return [view for part, i in pre._owner for store in part.stores for vs in store.state(i).values() for view in vs]


def test_micro_batches_and_ranks_equal_one_batch(approximation: str) -> None:
    """Cut in three, and cut over three ranks of which one has nothing: the same statistics after two steps."""
    models = [network(DOUBLE) for _ in range(5)]
    whole, micro, *ranks = [Preconditioner(m, fisher="exact", approximation=approximation) for m in models]
    for step in range(2):
        x, y = batch(step, DOUBLE)
        models[4](x)  # shows the order of the layers
        cuts = [((x, y),), tuple(zip(x.chunk(3), y.chunk(3), strict=True)), ((x[:7], y[:7]),), ((x[7:], y[7:]),), ()]
        for model, parts in zip(models, cuts, strict=True):
            for inputs, targets in parts:
                F.cross_entropy(model(inputs), targets).backward()
        sent: list[list[Tensor]] = []
        for pre in ranks[1:]:
            pre.statistics.commit(lambda tensors, _, sent=sent: sent.append([t.clone() for t in tensors]))

        def reduce(tensors: list[Tensor], _: object, sent: list[list[Tensor]] = sent) -> None:
            for other in sent:
                torch._foreach_add_(tensors, other)

        for pre, hook in ((whole, None), (micro, None), (ranks[0], reduce)):
            pre.statistics.commit(hook)
        for pre in (whole, micro, *ranks):
            pre.capture.forget()
            pre.factors.running.data.copy_(whole.factors.running.data)  # so that all make the same inverses
            pre.factors.trace.copy_(whole.factors.trace)
            pre.factors.updates.copy_(whole.factors.updates)
            pre.update_inverses([0.1] * 3)
    for cut in (micro, ranks[0]):
        for one, other in zip(statistics(whole), statistics(cut), strict=True):
            assert torch.allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_a_batch_with_nan_changes_nothing(approximation: str, fisher: str) -> None:
    model = network()
    pre = Preconditioner(model, approximation=approximation, fisher=fisher)
    for step in range(3):
        F.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
        pre.step()
    before = [t.clone() for t in statistics(pre)]
    x, y = batch(3)
    x[3, 2] = math.nan
    F.cross_entropy(model(x), y).backward()
    pre.step()
    assert all(torch.equal(p, q) for p, q in zip(before, statistics(pre), strict=True))
    model.zero_grad()
    F.cross_entropy(model(batch(4)[0]), batch(4)[1]).backward()
    pre.step()
    assert all(t.isfinite().all() for t in (*statistics(pre), *pre.results))
    assert not torch.equal(before[0], statistics(pre)[0])


def test_before_any_statistics_it_is_the_plain_gradient(approximation: str) -> None:
    model = network()
    pre = Preconditioner(model, approximation=approximation)
    x, y = batch(0)
    x[0, 0] = math.nan
    F.cross_entropy(model(x), y).backward()
    pre.step()
    given = [torch.randn_like(p) for p in pre.covered]
    pre.precondition(given)
    for u, v in zip(pre.results, given, strict=True):
        assert torch.allclose(u, v, atol=1e-5)


def test_memory_is_what_is_kept(approximation: str) -> None:
    model = network()
    pre = Preconditioner(model, approximation=approximation)
    predicted = pre.report().bytes
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    pre.step()
    part = pre.approximation
    kept = {t.data_ptr(): t.nbytes for i in range(3) for views in part.state(i).values() for t in views}
    pending = sum(store.sums.nbytes for store in part.stores)
    # Counters, and padding between factors, are left out.
    assert pre.report().bytes == pytest.approx(sum(kept.values()) + pending, rel=0.15)
    assert predicted == pytest.approx(pre.report().bytes, rel=0.25)  # the order of the layers is a guess before


def test_condition_numbers(approximation: str) -> None:
    model = network(DOUBLE)
    optimizer = KFAC(model, approximation=approximation, fisher="exact", damping=0.01)
    for _ in range(2):
        F.cross_entropy(model(batch(0, DOUBLE)[0]), batch(0)[1]).backward()
        optimizer.step()
    assert not any(key.startswith("condition") for key in optimizer.stats())
    figures = optimizer.stats(conditions=True)
    assert figures["failures"] == 0
    factors = optimizer.preconditioner.factors
    for i, name in enumerate(["last", "first", "middle"]):
        a, g = factors.running[i], factors.running[factors.count + i]
        pi = math.sqrt(float(a.trace() / len(a)) / float(g.trace() / len(g)))
        damped = [c + d * torch.eye(len(c), dtype=DOUBLE) for c, d in ((a, pi * 0.1), (g, 0.1 / pi))]
        exact = math.prod(float(torch.linalg.cond(c)) for c in damped)
        assert exact / 100 <= figures[f"condition/{name}"] <= 100 * exact


def test_inverses_layer_by_layer_are_those_of_all_at_once(approximation: str) -> None:
    models = [network(DOUBLE) for _ in range(2)]
    whole, parts = [Preconditioner(m, approximation=approximation, fisher="exact") for m in models]
    for pre, model in ((whole, models[0]), (parts, models[1])):
        F.cross_entropy(model(batch(0)[0].double()), batch(0)[1]).backward()
        pre.statistics.commit()
    gamma = torch.full((3,), 0.1, dtype=DOUBLE)
    whole.approximation.update(gamma)
    for layer in (2, 0, 1):
        assert not all(torch.equal(x, y) for x, y in zip(whole.copy_inverses(), parts.copy_inverses(), strict=True))
        parts.approximation.update(gamma, [layer])
    for x, y in zip(whole.copy_inverses(), parts.copy_inverses(), strict=True):
        assert torch.equal(x, y)


def loss_after_training(approximation: str, images: Tensor) -> float:
    """Of a deep autoencoder of digits after 60 adaptive steps from λ = 1."""
    torch.manual_seed(0)
    widths = [64, 48, 24, 6, 24, 48, 64]
    modules = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.Tanh())]
    model = nn.Sequential(*modules[:-1])
    optimizer = KFAC(model, likelihood="bernoulli", approximation=approximation, adaptive=True, damping=1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = Bernoulli().loss(model(images), images)
        loss.backward()
        return loss

    return [float(optimizer.step(closure).detach()) for _ in range(60)][-1]


def test_the_others_train_at_least_as_well_as_block_diagonal() -> None:
    images = digits().train_images
    images = (images - images.min()) / (images.max() - images.min())
    mean_image = images.mean(0).clamp(1e-6, 1 - 1e-6).logit().expand_as(images)
    plateau = float(Bernoulli().loss(mean_image, images))
    losses = {name: loss_after_training(name, images) for name in APPROXIMATIONS}
    for name, loss in losses.items():
        assert loss < 0.9 * plateau, name
        assert loss < 1.03 * losses["block_diagonal"], name
