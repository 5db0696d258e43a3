"""The growing batches of the paper's section 13."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kfac_fast import GrowingBatches


def test_sizes_grow_by_a_constant_factor_and_end_at_the_whole_set() -> None:
    batches = GrowingBatches(20_000, 1_000, full_at=500)
    assert [batches.size(k) for k in (1, 500, 9_999)] == [1_000, 20_000, 20_000]
    assert 19_000 < batches.size(499) < 20_000
    b = 499 / torch.tensor(20.0, dtype=torch.float64).log2().item()
    assert all(batches.size(k) == int(1_000 * 2 ** ((k - 1) / b)) for k in range(2, 499, 7))
    assert [GrowingBatches(8, 8).size(k) for k in (1, 2)] == [8, 8]
    assert [GrowingBatches(8, 2, full_at=1).size(k) for k in (1, 2)] == [8, 8]


def test_batches_are_sets_and_depend_on_seed_and_update_alone() -> None:
    batches = GrowingBatches(50, 10, full_at=6, updates=7)
    drawn = list(batches)
    assert len(batches) == len(drawn) == 7
    assert [len(b) for b in drawn] == [batches.size(k) for k in range(1, 8)]
    assert all(len(set(b)) == len(b) and set(b) <= set(range(50)) for b in drawn)
    assert drawn[0] != drawn[1][:10]
    assert drawn[5] == drawn[6] == list(range(50))
    assert list(GrowingBatches(50, 10, full_at=6, updates=7, start=4)) == drawn[3:]
    assert next(iter(GrowingBatches(50, 10, full_at=6, updates=7, seed=1))) != drawn[0]


def test_it_is_a_batch_sampler() -> None:
    data = TensorDataset(torch.arange(20.0))
    batches = GrowingBatches(20, 5, full_at=3, updates=3)
    loaded = [x for (x,) in DataLoader(data, batch_sampler=batches)]
    assert [x.tolist() for x in loaded] == [[float(i) for i in b] for b in batches]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"examples": 0, "first": 1}, "examples must be an integer >= 1, got examples=0"),
        ({"examples": 5, "first": 6}, "first must be at most examples=5, got first=6"),
        ({"examples": 5, "first": 1, "full_at": 0.5}, "full_at must be an integer >= 1, got full_at=0.5"),
        ({"examples": 5, "first": 1, "updates": True}, "updates must be an integer >= 1, got updates=True"),
        ({"examples": 5, "first": 1, "seed": -1}, "seed must be an integer >= 0, got seed=-1"),
    ],
)
def test_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrowingBatches(**arguments)
    with pytest.raises(TypeError, match="these batches never end: pass updates="):
        len(GrowingBatches(5, 1))
