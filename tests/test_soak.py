"""Many steps with faults thrown in at random: the run ends finite, counts what it left out, and grows no memory."""

from __future__ import annotations

import gc
import os
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast import KFAC, KFACWarning

FAULTS = ["none", "nan", "inf", "zero", "duplicated", "huge", "tiny", "missing layer", "ignored", "exploding loss"]


class Net(nn.Module):
    """Convolution, normalisation, a branch that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten())
        self.norm = nn.LayerNorm(48)
        self.branch = nn.Linear(48, 48)
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        x = self.norm(self.stem(x))
        return self.head(x + torch.relu(self.branch(x)) if branch else x)


def batch(generator: torch.Generator, fault: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(12, 16, generator=generator)
    y = x[:, :3].argmax(1)
    where = int(torch.randint(12, (), generator=generator))
    if fault == "nan":
        x[where, 3] = torch.nan
    elif fault == "inf":
        x[where, 3] = torch.inf
    elif fault == "zero":
        x.zero_()
    elif fault == "duplicated":
        x, y = x[:1].repeat(12, 1), y[:1].repeat(12)
    elif fault == "huge":
        x *= 10.0 ** int(torch.randint(3, 38, (), generator=generator))
    elif fault == "tiny":
        x *= 1e-30
    elif fault == "ignored":
        y = torch.full_like(y, -100)
    return x, y


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def soak(steps: int, options: dict) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = Net()
    optimizer = KFAC(model, damping=0.1, **options)
    seen: Counter[str] = Counter()
    bad = 0  # batches whose statistics must be refused
    memory, tensors = [], []
    clean = torch.randn(200, 16, generator=generator)
    targets = clean[:, :3].argmax(1)
    with torch.no_grad():
        first = float(F.cross_entropy(model(clean), targets))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(steps):
            fault = FAULTS[max(0, int(torch.randint(-len(FAULTS), len(FAULTS), (), generator=generator)))]
            seen[fault] += 1
            bad += fault in ("nan", "inf", "exploding loss") and step % options.get("factor_every", 1) == 0
            x, y = batch(generator, fault)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x, fault != "missing layer"), y, reduction="sum") / 12
            (loss * 1e38 * 1e38 if fault == "exploding loss" else loss).backward()
            optimizer.step()
            if step % max(steps // 10, 1) == max(steps // 10, 1) - 1:
                optimizer.zero_grad()  # a missing layer has none
                memory.append(resident_bytes())
                tensors.append(live_tensors())
                assert all(p.isfinite().all() for p in model.parameters()), (step, seen)
    assert set(seen) == set(FAULTS)

    stats = optimizer.stats()
    assert stats["step"] == steps
    assert seen["nan"] + seen["inf"] + seen["exploding loss"] <= stats["skipped_steps"] < steps / 2
    assert bad <= stats["refused_statistics"] < steps / 2
    state = optimizer.state_dict()["state"]
    for entry in state.values():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                assert value.isfinite().all(), key
    pre = optimizer.preconditioner
    for i in range(len(pre.approximation.layers)):
        for side, inverse in enumerate(pre.approximation.inverses(i)):
            running = pre.factors.running[i + side * pre.factors.count]
            assert torch.equal(running, running.T)
            assert torch.linalg.eigvalsh(running.double()).min() > -1e-5 * float(running.trace())
            assert torch.linalg.eigvalsh(inverse.double()).min() > -1e-6 * float(inverse.abs().max())

    kfac = [str(w.message) for w in said if issubclass(w.category, KFACWarning)]
    assert len(kfac) == len(said) > 0, [str(w.message) for w in said]
    assert len(set(kfac)) == len(kfac)  # each said once
    with torch.no_grad():
        assert float(F.cross_entropy(model(clean), targets)) < first
    assert len(set(tensors[2:])) == 1, tensors
    assert max(memory[2:]) - memory[2] < 8 * 2**20, memory


OPTIONS = [
    {},
    {"fisher": "empirical", "factor_every": 2, "inverse_every": 3},
    {"factor_fraction": 0.5, "momentum": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_five_hundred_steps_with_faults(options: dict) -> None:
    soak(500, options)


@pytest.mark.full
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ten_thousand_steps_with_faults(options: dict) -> None:
    soak(10_000, options)
