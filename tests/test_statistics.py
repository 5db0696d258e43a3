"""The seam between capture, the stores of statistics, and the approximation."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast import Preconditioner

DOUBLE = torch.float64


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, groups=2), nn.Flatten(), nn.Tanh(), nn.Linear(8, 3)
    ).double()


def gathered(model: nn.Module, x: Tensor) -> Preconditioner:
    pre = Preconditioner(model, fisher="exact")
    if len(x):
        F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)).backward()
    pre.close()
    return pre


def test_sums_and_counts_of_ranks_add_up_to_those_of_one_process() -> None:
    model, x = network(), torch.randn(9, 6, dtype=DOUBLE)
    whole = gathered(model, x)
    whole.statistics.commit()
    ranks = [gathered(copy.deepcopy(model), part) for part in (x[:2], x[2:], x[:0])]  # the last has an empty batch
    sent: list[list[Tensor]] = []
    for pre in ranks[1:]:
        pre.statistics.commit(lambda tensors, _: sent.append([t.clone() for t in tensors]))

    def reduce(tensors: list[Tensor], symmetric: list[list[Tensor]]) -> None:
        for other in sent:
            torch._foreach_add_(tensors, other)

    gate = ranks[0].statistics.commit(reduce)
    assert gate is not None
    assert gate.tolist() == [1]
    assert torch.allclose(ranks[0].factors.running.data, whole.factors.running.data, atol=1e-14)
    assert torch.equal(ranks[0].factors.updates, whole.factors.updates)


def test_a_value_that_is_not_finite_on_one_rank_commits_nothing_on_the_other() -> None:
    model, x = network(), torch.randn(4, 6, dtype=DOUBLE)
    good, bad = gathered(model, x), gathered(copy.deepcopy(model), torch.full_like(x, torch.nan))
    sent: list[Tensor] = []
    bad.statistics.commit(lambda tensors, _: sent.extend(t.clone() for t in tensors))
    gate = good.statistics.commit(lambda tensors, _: torch._foreach_add_(tensors, sent))
    assert gate is not None
    assert gate.tolist() == [0]
    assert not good.factors.running.data.any()
    assert not good.factors.updates.any()


def test_inverses_of_some_layers_leave_the_others_alone() -> None:
    pre = gathered(network(), torch.randn(9, 6, dtype=DOUBLE))
    pre.statistics.commit()
    gamma = torch.full((3,), 0.1, dtype=DOUBLE)
    before = pre.copy_inverses()
    pre.approximation.update(gamma, [1])
    some = pre.copy_inverses()
    pre.approximation.update(gamma)
    every = pre.copy_inverses()
    of_convolution = len(pre.approximation.inverses(0))
    for i, (old, now, new) in enumerate(zip(before, some, every, strict=True)):
        assert torch.equal(now, old if i < of_convolution else new)
        assert not torch.equal(old, new)
    pre.restore_inverses(before)
    assert all(torch.equal(p, q) for p, q in zip(before, pre.copy_inverses(), strict=True))
