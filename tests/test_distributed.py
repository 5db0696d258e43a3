"""Several ranks under DistributedDataParallel against one process with the whole batch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_fast import KFAC, Distributed, Preconditioner

SHARES = ["replicate", "inverses", "gradients"]
DOUBLE = torch.float64


def network() -> nn.Sequential:
    """With a grouped convolution, layers of different sizes, and parameters without a block."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, groups=2), nn.Flatten(), nn.PReLU(), nn.Linear(8, 5), nn.Tanh(),
        nn.Linear(5, 3, bias=False),
    )  # fmt: skip


def batch(examples: int, step: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return (
        torch.randn(examples, 6, generator=generator, dtype=dtype),
        torch.randint(3, (examples,), generator=generator),
    )


def part(tensors: tuple[Tensor, ...], rank: int, size: int) -> tuple[Tensor, ...]:
    return tuple(t.chunk(size)[rank] for t in tensors)


def train(model: nn.Module, optimizer: Any, batches: list[tuple[Tensor, ...]]) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_same_bits(tensor: Tensor, group: Any = None) -> None:
    """Whether all ranks have the same."""
    mine = tensor.detach().flatten().view(torch.uint8)
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(others, mine, group=group)
    assert all(torch.equal(mine, other) for other in others)


@contextlib.contextmanager
def sent(name: str) -> Iterator[list[int]]:
    """Elements given to a collective of torch.distributed by Python code, one entry per call."""
    original, calls = getattr(dist, name), []

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    setattr(dist, name, counted)
    try:
        yield calls
    finally:
        setattr(dist, name, original)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=["float32", "float64"])
@pytest.mark.parametrize("share", SHARES)
@on_ranks(2)
def test_ranks_equal_one_process_with_the_whole_batch(rank: int, size: int, share: str, dtype: torch.dtype) -> None:
    alone = network().to(dtype)
    model = DistributedDataParallel(copy.deepcopy(alone))
    settings = {"fisher": "exact", "inverse_every": 2, "weight_decay": 0.01}
    optimizer = KFAC(model, distributed=Distributed(share=share), **settings)
    batches = [batch(12, step, dtype) for step in range(6)]
    train(model, optimizer, [part(b, rank, size) for b in batches])
    single = KFAC(alone, distributed=False, **settings)
    train(alone, single, batches)
    assert_same_bits(parameters(model))
    assert_same_bits(optimizer.preconditioner.factors.running.data)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    assert torch.allclose(parameters(model), parameters(alone), atol=tolerance, rtol=tolerance)
    own, whole = optimizer.preconditioner.factors, single.preconditioner.factors
    assert torch.allclose(own.running.data, whole.running.data, atol=tolerance)
    assert torch.equal(own.updates, whole.updates)


@on_ranks(3)
def test_three_ranks_divide_the_layers(rank: int, size: int) -> None:
    for share in SHARES:
        alone = network().double()
        model = DistributedDataParallel(copy.deepcopy(alone))
        optimizer = KFAC(model, fisher="exact", distributed=Distributed(share=share))
        single = KFAC(alone, fisher="exact", distributed=False)
        batches = [batch(12, step, DOUBLE) for step in range(2)]
        train(model, optimizer, [part(b, rank, size) for b in batches])
        train(alone, single, batches)
        assert_same_bits(parameters(model))
        assert torch.allclose(parameters(model), parameters(alone), atol=1e-12)
        sharing = optimizer.preconditioner.sharing
        assert sorted(sharing.owner) == [0, 1, 2]
        assert sharing.owner.index(0) == 1  # the largest layer first: LPT
        own = sum(row.bytes for row in optimizer.report())
        whole = sum(row.bytes for row in single.report())
        assert own < whole if share == "gradients" else own == whole


@on_ranks(2)
def test_one_collective_brings_triangles_counts_and_flags(rank: int, size: int) -> None:
    model = DistributedDataParallel(network())
    optimizer = KFAC(model, distributed=Distributed(share="replicate"))
    sides = optimizer.preconditioner.factors.running.sizes
    train(model, optimizer, [part(batch(8), rank, size)])  # its first step compares gradients, too
    optimizer.zero_grad()
    x, y = part(batch(8, 1), rank, size)
    F.cross_entropy(model(x), y).backward()
    with sent("all_reduce") as calls, sent("broadcast") as broadcasts:
        optimizer.step()
    rows, terms_and_flag = len(sides) // 2, 2
    assert calls == [sum(n * (n + 1) // 2 for n in sides) + rows + terms_and_flag]
    assert not broadcasts
    half = KFAC(DistributedDataParallel(network()), distributed=Distributed(share="replicate", dtype=torch.bfloat16))
    with sent("all_reduce") as calls:
        half.preconditioner.update_factors(joined=True)
    assert calls[1:] == [sum(n * (n + 1) // 2 for n in sides), rows + terms_and_flag]


@on_ranks(2)
def test_bfloat16_sums_are_near_the_exact_ones_and_counts_exact(rank: int, size: int) -> None:
    found = []
    for dtype in (None, torch.bfloat16):
        model = DistributedDataParallel(network())
        optimizer = KFAC(model, fisher="exact", distributed=Distributed(dtype=dtype))
        train(model, optimizer, [part(batch(600), rank, size)])  # more rows than bfloat16 counts
        found.append(optimizer.preconditioner.factors)
    exact, narrow = found
    assert_same_bits(narrow.running.data)
    assert torch.equal(exact.updates, narrow.updates)
    for a, b in zip(exact.running, narrow.running, strict=True):
        assert 0 < float((a - b).abs().max() / a.abs().max()) < 2**-7
    assert float(narrow.running[2][-1, -1]) == 1.0  # rows of ones over the number of rows: both are exact


@on_ranks(2)
def test_ranks_draw_their_own_targets_reproducibly(rank: int, size: int) -> None:
    drawn = []
    for _ in range(2):
        optimizer = KFAC(DistributedDataParallel(network()), seed=3)
        draws = []
        for step in range(3):
            optimizer.preconditioner.steps = step
            draws.append(torch.rand(4, generator=optimizer.preconditioner.generator(torch.device("cpu"))))
        drawn.append(torch.stack(draws))
    assert torch.equal(*drawn)
    every = [torch.empty_like(drawn[0]) for _ in range(size)]
    dist.all_gather(every, drawn[0])
    assert len(torch.stack(every).flatten().unique()) == size * 3 * 4


@pytest.mark.parametrize("sizes", [(6, 6), (2, 10), (12, 0)], ids=str)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@on_ranks(2)
def test_factors_are_those_of_all_examples_however_divided(
    rank: int, size: int, fisher: str, sizes: tuple[int, int]
) -> None:
    alone = network().double()
    model = DistributedDataParallel(copy.deepcopy(alone))
    whole = batch(12, dtype=DOUBLE)
    x, y = (t.split(list(sizes))[rank] for t in whole)
    optimizer = KFAC(model, fisher=fisher)
    # The mean over no examples is NaN; the user takes the sum then.
    F.cross_entropy(model(x), y, reduction="mean" if len(x) else "sum").backward()
    optimizer.step()
    single = KFAC(alone, fisher=fisher, distributed=False)
    train(alone, single, [whole])
    assert torch.allclose(
        optimizer.preconditioner.factors.running.data, single.preconditioner.factors.running.data, atol=1e-14
    )
    assert_same_bits(parameters(model))


@on_ranks(2)
def test_a_fraction_of_every_ranks_batch(rank: int, size: int) -> None:
    alone = network().double()
    model = DistributedDataParallel(copy.deepcopy(alone))
    x, y = batch(8, dtype=DOUBLE)
    optimizer = KFAC(model, fisher="exact", factor_fraction=0.5)
    train(model, optimizer, [part((x, y), rank, size)])
    chosen = torch.tensor([0, 2, 4, 6])  # every other one of ranks 0 and 1
    single = KFAC(alone, fisher="exact", distributed=False)
    train(alone, single, [(x[chosen], y[chosen])])
    expected = single.preconditioner.factors.running.data
    assert torch.allclose(optimizer.preconditioner.factors.running.data, expected, atol=1e-14)


@on_ranks(2)
def test_gradient_accumulation_under_no_sync(rank: int, size: int) -> None:
    alone = network().double()
    model = DistributedDataParallel(copy.deepcopy(alone))
    optimizer = KFAC(model, fisher="exact")
    single = KFAC(alone, fisher="exact", distributed=False)
    for step in range(2):
        whole = batch(12, step, DOUBLE)
        micro = list(zip(*(t.chunk(2) for t in part(whole, rank, size)), strict=True))
        optimizer.zero_grad()
        with model.no_sync():
            (F.cross_entropy(model(micro[0][0]), micro[0][1]) / 2).backward()
        (F.cross_entropy(model(micro[1][0]), micro[1][1]) / 2).backward()
        optimizer.step()
        train(alone, single, [whole])
    assert_same_bits(parameters(model))
    assert torch.allclose(parameters(model), parameters(alone), atol=1e-12)


@on_ranks(2)
def test_the_preconditioner_with_another_optimizer(rank: int, size: int) -> None:
    alone = network().double()
    model = DistributedDataParallel(copy.deepcopy(alone))
    for net, data, options in ((model, part, {}), (alone, lambda b, *_: b, {"distributed": False})):
        preconditioner = Preconditioner(net, fisher="exact", **options)
        sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        for step in range(2):
            x, y = data(batch(8, step, DOUBLE), rank, size)
            sgd.zero_grad()
            F.cross_entropy(net(x), y).backward()
            preconditioner.step()
            sgd.step()
    assert torch.allclose(parameters(model), parameters(alone), atol=1e-12)


@on_ranks(2)
def test_a_process_group_for_gradients_that_the_user_averages(rank: int, size: int) -> None:
    alone = network().double()
    model = copy.deepcopy(alone)
    group = dist.new_group([0, 1])
    optimizer = KFAC(model, fisher="exact", distributed=Distributed(process_group=group))
    x, y = part(batch(8, dtype=DOUBLE), rank, size)
    F.cross_entropy(model(x), y).backward()
    for p in model.parameters():
        dist.all_reduce(p.grad, op=dist.ReduceOp.SUM, group=group)
        p.grad /= size
    optimizer.step()
    train(alone, KFAC(alone, fisher="exact", distributed=False), [batch(8, dtype=DOUBLE)])
    assert torch.allclose(parameters(model), parameters(alone), atol=1e-12)
    outside = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="process_group must contain this rank"):
            KFAC(network(), distributed=Distributed(process_group=outside))
