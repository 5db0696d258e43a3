"""The adaptive rule against closed forms: a quadratic, its minimiser, and each of its parts alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kfac_fast import KFAC, Adaptive, Gaussian
from kfac_fast.adaptive import AdaptiveRule
from kfac_fast.adaptive_constants import CALIBRATION
from kfac_fast.quadratic import Minimum, minimise_in_span

DOUBLE = torch.float64


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Quadratic:
    """A linear network with squared error, whose loss is h(θ) = ½ θᵀFθ + …, F the exact Fisher, for one example each."""

    def __init__(self, damping: float, weight_decay: float = 0.0, **constants: object) -> None:
        self.model = nn.Linear(4, 3).double()
        self.x = torch.randn(8, 4, dtype=DOUBLE)
        self.y = torch.randn(8, 3, dtype=DOUBLE)
        self.damping, self.eta = damping, weight_decay
        config = Adaptive(**{"product_fraction": 1.0, "t1": 1, **constants})  # type: ignore[arg-type]
        self.optimizer = KFAC(
            self.model,
            likelihood="gaussian",
            fisher="exact",
            damping=damping,
            weight_decay=weight_decay,
            adaptive=config,
        )
        rows = torch.cat([self.x, torch.ones(8, 1, dtype=DOUBLE)], 1)
        order = [*(o * 5 + i for o in range(3) for i in range(4)), *(o * 5 + 4 for o in range(3))]
        self.fisher = torch.kron(torch.eye(3, dtype=DOUBLE), rows.T @ rows / 8)[order][:, order]

    def loss(self) -> Tensor:
        return Gaussian().loss(self.model(self.x), self.y)

    def closure(self) -> Tensor:
        self.model.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def value(self) -> float:
        return float(self.loss().detach()) + 0.5 * self.eta * float(flat(self.model).square().sum())


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_on_a_quadratic_the_step_is_the_minimiser_in_the_span(weight_decay: float) -> None:
    problem = Quadratic(0.3, weight_decay)
    last = torch.zeros(15, dtype=DOUBLE)
    for step in range(4):
        theta, before = flat(problem.model), problem.value()
        damping = problem.optimizer.rule.damping
        problem.closure()
        gradient = torch.cat([p.grad.flatten() for p in problem.model.parameters()]) + weight_decay * theta
        problem.optimizer.step(problem.closure, problem.loss)
        delta = flat(problem.model) - theta
        direction = -torch.cat([u.flatten() for u in problem.optimizer.preconditioner.results])
        span = torch.stack([direction] if step == 0 else [direction, last], 1)
        b = problem.fisher + (damping + weight_decay) * torch.eye(15, dtype=DOUBLE)
        best = span @ torch.linalg.solve(span.T @ b @ span, -span.T @ gradient)
        assert torch.allclose(delta, best, atol=1e-10)
        # ρ = 1 + λ|δ|²/|∇ᵀδ|: M carries ½λ|δ|² that h does not have.
        expected = 1 + damping * float(delta @ delta) / abs(float(gradient @ delta))
        assert problem.optimizer.stats()["ratio"] == pytest.approx(expected, rel=1e-8)
        change = 0.5 * float(delta @ b @ delta) + float(gradient @ delta)
        assert problem.optimizer.stats()["model_change"] == pytest.approx(change, rel=1e-8)
        assert problem.value() < before
        last = delta


def test_minimiser_falls_back_to_one_direction() -> None:
    one = minimise_in_span(torch.tensor([[2.0]], dtype=DOUBLE), torch.tensor([-4.0], dtype=DOUBLE))
    assert (one.natural, one.mu, one.change) == (2.0, 0.0, -4.0)
    assert one.alpha == -2.0
    parallel = torch.tensor([[2.0, 4.0], [4.0, 8.0]], dtype=DOUBLE)
    assert minimise_in_span(parallel, torch.tensor([-4.0, -8.0], dtype=DOUBLE)) == one
    both = minimise_in_span(
        torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=DOUBLE), torch.tensor([-2.0, 4.0], dtype=DOUBLE)
    )
    assert (both.natural, both.mu, both.change) == (1.0, -1.0, -3.0)
    nothing = minimise_in_span(torch.tensor([[0.0]], dtype=DOUBLE), torch.tensor([0.0], dtype=DOUBLE))
    assert (nothing.alpha, nothing.change) == (0.0, 0.0)
    broken = minimise_in_span(torch.tensor([[math.nan]], dtype=DOUBLE), torch.tensor([1.0], dtype=DOUBLE))
    assert broken.alpha == 0.0


@pytest.mark.parametrize(
    ("after", "factor"),
    [(lambda m: 0.9 * m, 0.95**5), (lambda m: 0.5 * m, 1.0), (lambda m: 0.1 * m, 0.95**-5), (lambda m: -m, 0.95**-5)],
)
def test_levenberg_marquardt(after: Callable[[float], float], factor: float) -> None:
    """λ falls where M is right (ρ > ¾), grows where it is wrong (ρ < ¼)."""
    problem = Quadratic(0.3, t1=5)
    rule = problem.optimizer.rule
    for _ in range(4):
        problem.optimizer.step(problem.closure)
    assert rule.damping == 0.3
    values = []

    def evaluate() -> Tensor:
        values.append(None)
        return torch.tensor(start + after(rule.stats["model_change"]), dtype=DOUBLE)

    start = problem.value()
    problem.optimizer.step(problem.closure, evaluate)
    assert len(values) == 1
    assert rule.damping == pytest.approx(0.3 * factor)


def test_gamma_search_takes_the_lowest_model(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Quadratic(0.3, gamma="search", t2=2, t3=2)
    rule = problem.optimizer.rule
    tried: list[tuple[float, float]] = []
    propose = AdaptiveRule._propose

    def spy(self, batches):
        result = propose(self, batches)
        pre = self.preconditioner
        a = pre.factors.running[0]
        damped = torch.linalg.inv(pre.approximation.damped.inverse[0]) - a  # πγ on the diagonal
        pi = math.sqrt(float(a.trace() / 5) / float(pre.factors.running[1].trace() / 3))
        tried.append((float(damped[0, 0]) / pi, result.change))
        return result

    for _ in range(4):
        problem.optimizer.step(problem.closure, problem.loss)
    gamma = rule.gamma
    monkeypatch.setattr(AdaptiveRule, "_propose", spy)
    problem.optimizer.step(problem.closure, problem.loss)
    omega = math.sqrt(19 / 20) ** 2
    assert [g for g, _ in tried] == pytest.approx([gamma, omega * gamma, gamma / omega])
    assert rule.gamma == pytest.approx(min(tried, key=lambda t: t[1])[0])
    inverse = torch.linalg.inv(problem.optimizer.preconditioner.approximation.damped.inverse[0])
    pi_gamma = float((inverse - problem.optimizer.preconditioner.factors.running[0])[0, 0])
    assert pi_gamma == pytest.approx(rule.gamma * pi_gamma / min(tried, key=lambda t: t[1])[0])


def network_and_optimizer(gamma: str = "sqrt", **options: object) -> tuple[nn.Module, KFAC]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
    config = Adaptive(t1=2, t2=4, t3=2, gamma=gamma, averaging=0.9)
    return model, KFAC(model, adaptive=config, **options)  # type: ignore[arg-type]


def train(model: nn.Module, optimizer: KFAC, steps: range) -> list[float]:
    losses = []
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in steps:
        losses.append(float(optimizer.step(closure).detach()))
    return losses


def test_it_trains_and_tells() -> None:
    model, optimizer = network_and_optimizer()
    losses = train(model, optimizer, range(40))
    assert losses[-1] < 0.1 * losses[0]
    assert {"loss", "damping", "gamma", "alpha", "mu", "model_change", "ratio"} <= set(optimizer.stats())
    own = flat(model)
    with optimizer.averaged():
        assert not torch.equal(flat(model), own)
    assert torch.equal(flat(model), own)


def test_auto_damping_is_found_on_the_first_batch() -> None:
    model, optimizer = network_and_optimizer()
    train(model, optimizer, range(1))
    assert optimizer.rule.calibrated
    assert optimizer.stats()["damping"] in CALIBRATION
    assert optimizer.stats()["damping"] < CALIBRATION[0]


@pytest.mark.parametrize("best", [10.0, 1.0, 0.1, CALIBRATION[-1], CALIBRATION[0]])
def test_calibration_climbs_from_the_middle(best: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the λ with the lowest loss, and not a step further than it must."""
    model, optimizer = network_and_optimizer()
    rule = optimizer.rule
    tried: list[float] = []

    def loss_now(self: AdaptiveRule, closure: object, evaluate: object) -> float:
        if not self.calibrated:
            tried.append(self.damping)
            return abs(math.log10(self.damping / best)) if self.damping >= 0.01 or best < 0.01 else math.nan
        return 1.0

    before = flat(model)
    monkeypatch.setattr(AdaptiveRule, "_loss_now", loss_now)
    monkeypatch.setattr(AdaptiveRule, "_propose", lambda self, batches: Minimum(0.0, 0.0, -1.0))
    train(model, optimizer, range(1))
    assert rule.damping == pytest.approx(best)
    assert len(tried) == len(set(tried))
    assert tried[0] == 1.0
    assert all(min(best, 1.0) / 10.1 <= x <= max(best, 1.0) * 10.1 for x in tried)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("auto", [True, False])
def test_lambda_settles_after_calibration(auto: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By 0.7 a step up to ``settle``, with γ = √λ, and by 19/20 after that; a λ of the user's by 19/20 at once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    config = Adaptive(t1=5, t2=100, settle=10)
    optimizer = KFAC(model, adaptive=config, damping="auto" if auto else 0.5)
    rule = optimizer.rule

    def calibrate(self: AdaptiveRule, *_: object) -> None:
        self.damping, self.calibrated = 0.5, True

    def loss_now(self: AdaptiveRule, closure: object, evaluate: object) -> float:
        return self.stats["loss"] + self.stats["model_change"]  # ρ = 1

    monkeypatch.setattr(AdaptiveRule, "_calibrate", calibrate)
    monkeypatch.setattr(AdaptiveRule, "_loss_now", loss_now)
    train(model, optimizer, range(4))
    assert rule.damping == 0.5
    fast, slow = 0.7**5, 0.95**5
    expected = [0.5 * fast, 0.5 * fast**2, 0.5 * fast**2 * slow] if auto else [0.5 * slow**i for i in (1, 2, 3)]
    for i, damping in enumerate(expected):
        train(model, optimizer, range(4 + 5 * i, 9 + 5 * i))
        assert rule.damping == pytest.approx(damping)
        if auto:  # γ came with the inverses of the steps after 5 and 10
            assert rule.gamma == pytest.approx(math.sqrt(expected[min(i, 1)]))
        resumed = KFAC(copy.deepcopy(model), adaptive=config, damping=1.0)
        resumed.load_state_dict(optimizer.state_dict())
        assert resumed.rule.settles is auto


def test_measuring_a_step_goes_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers and generators know of one pass a step; both losses of a step have the same dropout mask."""
    states, counts = [], []
    for t1 in (1, 100):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        optimizer = KFAC(model, adaptive=Adaptive(t1=t1))
        train(model, optimizer, range(3))
        states.append(torch.get_rng_state())
        counts.append(int(model[1].num_batches_tracked))
    assert torch.equal(*states)
    assert counts == [3, 3]
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    optimizer = KFAC(model, adaptive=Adaptive(t1=1), damping=1.0)
    monkeypatch.setattr(AdaptiveRule, "_propose", lambda self, batches: Minimum(0.0, 0.0, -1.0))
    train(model, optimizer, range(1))
    assert optimizer.stats()["loss_after"] == optimizer.stats()["loss"]


def test_the_average_of_the_iterates() -> None:
    """θ̄ ← κ θ̄ + (1−κ) θ, κ = min(1 − 1/k, 0.9); swapped in and out."""
    model, optimizer = network_and_optimizer()
    expected = torch.zeros(1)
    for k in range(1, 16):
        train(model, optimizer, range(1))
        keep = min(1 - 1 / k, 0.9)
        expected = keep * expected + (1 - keep) * flat(model)
    with optimizer.averaged():
        assert torch.allclose(flat(model), expected, atol=1e-6)


def test_gamma_is_searched_every_t2_steps_whatever_t3_is(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Quadratic(0.3, t2=4, t3=3)
    searched = []
    search = AdaptiveRule._search_gamma
    monkeypatch.setattr(
        AdaptiveRule, "_search_gamma", lambda self, b: (searched.append(self.preconditioner.steps), search(self, b))[1]
    )
    for _ in range(10):
        problem.optimizer.step(problem.closure, problem.loss)
    assert searched == [4, 8]
    assert problem.optimizer.stats()["inversions"] == 3 + 3 * 2 + 3  # at 0, 1, 2; at 4 and 8; at 3, 6, 9


@pytest.mark.parametrize("gamma", ["sqrt", "search"])
@pytest.mark.parametrize("stop", [1, 4, 5, 8])
def test_resume_is_bit_exact(stop: int, gamma: str) -> None:
    """Also right before a search for γ (4, 8) and between two."""
    model, optimizer = network_and_optimizer(gamma)
    train(model, optimizer, range(12))
    expected, figures = flat(model), optimizer.stats()
    model, optimizer = network_and_optimizer(gamma)
    train(model, optimizer, range(stop))
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    model, optimizer = network_and_optimizer(gamma)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    train(model, optimizer, range(stop, 12))
    assert torch.equal(flat(model), expected)
    assert optimizer.stats() == figures
    if gamma == "search":
        assert optimizer.rule.gamma != math.sqrt(optimizer.rule.damping)


def test_a_step_into_nan_is_taken_back_bit_for_bit() -> None:
    model, optimizer = network_and_optimizer(damping=1.0)
    train(model, optimizer, range(1))
    before = flat(model)
    x, y = torch.randn(8, 6), torch.randint(3, (8,))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    damping = optimizer.rule.damping
    optimizer.step(closure, lambda: torch.tensor(math.nan))
    assert torch.equal(flat(model), before)
    assert optimizer.rule.damping > damping
    assert optimizer.rule.rejected == 1


def test_a_nan_batch_changes_nothing_but_the_damping() -> None:
    model, optimizer = network_and_optimizer(damping=1.0)
    train(model, optimizer, range(3))
    before, factors = flat(model), optimizer.preconditioner.factors.running.data.clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.full((8, 6), math.nan)), torch.zeros(8, dtype=torch.long))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(flat(model), before)
    assert torch.equal(optimizer.preconditioner.factors.running.data, factors)
    assert all(math.isfinite(v) for v in train(model, optimizer, range(3)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: KFAC(m, adaptive=True).step(), ValueError, r"step\(\) needs a closure with adaptive=True"),
        (lambda m: KFAC(m, damping="auto"), ValueError, "damping='auto' needs adaptive=True"),
        (lambda m: KFAC(m, adaptive=3), TypeError, "adaptive must be a bool or an Adaptive, got int"),
        (lambda m: KFAC(m, adaptive=True, maximize=True), ValueError, "maximize=False"),
        (lambda m: KFAC(m, adaptive=True).step(lambda: torch.ones(())), RuntimeError, "the closure must run the model's forward"),
        (lambda m: Adaptive(t1=0), ValueError, "t1 must be an integer >= 1, got t1=0"),
        (lambda m: Adaptive(settle=-1), ValueError, "settle must be an integer >= 0, got settle=-1"),
        (lambda m: Adaptive(gamma="fixed"), ValueError, "gamma must be one of 'search', 'sqrt'"),
        (lambda m: KFAC(m.to(torch.bfloat16), adaptive=True), ValueError, "adaptive needs all parameters in torch.float32, got one in torch.bfloat16"),
        (lambda m: KFAC(m).averaged(), RuntimeError, "no average is kept"),
    ],
)  # fmt: skip
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(nn.Linear(3, 2))
