"""What DistributedDataParallel's options, failures and unequal ranks do to K-FAC, and K-FAC to them."""

from __future__ import annotations

import copy
import datetime
import io
import math
import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks
from test_distributed import DOUBLE, SHARES, assert_same_bits, batch, network, parameters, part, train
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from kfac_fast import KFAC, Adaptive, Distributed
from kfac_fast.collectives import Ranks, pack, packed_numel, unpack
from kfac_fast.distributed import owners
from kfac_fast.layers import Blocks, discover


class TwoHeads(nn.Module):
    """Uses one of its two branches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.trunk, self.left, self.right = nn.Linear(6, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, use_left: bool = True) -> Tensor:
        return (self.left if use_left else self.right)(self.trunk(x).tanh())


DDP_OPTIONS: list[dict[str, bool]] = [
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"gradient_as_bucket_view": True},
    {"static_graph": True, "gradient_as_bucket_view": True},
]


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@pytest.mark.parametrize("options", DDP_OPTIONS, ids=lambda o: "+".join(o))
@on_ranks(2)
def test_the_gradients_are_those_without_kfac(rank: int, size: int, options: dict[str, bool], fisher: str) -> None:
    nets = [DistributedDataParallel(network(), **options) for _ in range(2)]
    optimizer = KFAC(nets[0], fisher=fisher)
    for step in range(3):
        x, y = part(batch(8, step), rank, size)
        for net in nets:
            net.zero_grad()
            F.cross_entropy(net(x), y).backward()
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        optimizer.step()
        nets[1].load_state_dict(nets[0].state_dict())
    assert_same_bits(parameters(nets[0]))
    assert float(optimizer.preconditioner.factors.updates.min()) == 3


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
@on_ranks(2)
def test_the_gradients_with_unused_parameters_are_those_without_kfac(rank: int, size: int, fisher: str) -> None:
    nets = [DistributedDataParallel(TwoHeads(), find_unused_parameters=True) for _ in range(2)]
    optimizer = KFAC(nets[0], fisher=fisher)
    for step, use_left in enumerate((True, False, rank == 0, rank == 1)):  # a branch that no rank uses has no gradient
        x, y = part(batch(8, step), rank, size)
        for net in nets:
            net.zero_grad()
            F.cross_entropy(net(x, use_left), y).backward()
        assert (nets[0].module.right.weight.grad is None) == (step == 0)
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)
        optimizer.step()
        nets[1].load_state_dict(nets[0].state_dict())
    assert_same_bits(parameters(nets[0]))


@pytest.mark.parametrize("share", SHARES)
@on_ranks(2)
def test_layers_that_some_ranks_do_not_use(rank: int, size: int, share: str) -> None:
    model = DistributedDataParallel(TwoHeads(), find_unused_parameters=True)
    optimizer = KFAC(model, fisher="exact", distributed=Distributed(share=share))
    pre = optimizer.preconditioner
    x, y = part(batch(8), rank, size)
    for step in range(2):  # no warning about a layer with a gradient but no statistics
        with torch.no_grad():
            rows = torch.cat([model.module.trunk(x).tanh(), torch.ones(4, 1)], 1)
        optimizer.zero_grad()
        F.cross_entropy(model(x, use_left=rank == 0), y).backward()
        optimizer.step()
        if step == 0:  # A of the branch that this rank used is that of its own rows
            assert torch.allclose(pre.factors.running[1 + rank], rows.T @ rows / 4, atol=1e-6)
    assert_same_bits(parameters(model))
    assert_same_bits(pre.factors.running.data)
    assert pre.factors.updates.tolist() == [2] * 6


@pytest.mark.parametrize("share", SHARES)
@on_ranks(2)
def test_a_nan_on_one_rank_changes_nothing_on_any(rank: int, size: int, share: str) -> None:
    model = DistributedDataParallel(network())
    optimizer = KFAC(model, distributed=Distributed(share=share))
    train(model, optimizer, [part(batch(8, step), rank, size) for step in range(2)])
    before = parameters(model), optimizer.preconditioner.factors.running.data.clone()
    x, y = part(batch(8, 2), rank, size)
    if rank == 1:
        x = x.index_fill(0, torch.tensor([0]), math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names the parameter
        train(model, optimizer, [(x, y)])
    assert torch.equal(parameters(model), before[0])
    assert torch.equal(optimizer.preconditioner.factors.running.data, before[1])
    assert optimizer.stats()["skipped_steps"] == 1
    train(model, optimizer, [part(batch(8, 3), rank, size)])
    assert not torch.equal(parameters(model), before[0])
    assert_same_bits(parameters(model))


@pytest.mark.parametrize("share", SHARES)
@on_ranks(2)
def test_a_checkpoint_of_rank_0_resumes_all_ranks_bit_for_bit(rank: int, size: int, share: str) -> None:
    def make() -> tuple[DistributedDataParallel, KFAC]:
        net = DistributedDataParallel(network())
        return net, KFAC(net, inverse_every=3, distributed=Distributed(share=share))

    model, optimizer = make()
    batches = [part(batch(8, step), rank, size) for step in range(8)]
    train(model, optimizer, batches[:5])
    file = io.BytesIO()
    if share == "gradients":  # no rank has all inverses: all ranks ask, one saves
        state = optimizer.state_dict()
    if rank == 0:
        torch.save((model.state_dict(), optimizer.state_dict() if share != "gradients" else state), file)
    sent = [file.getvalue()]
    dist.broadcast_object_list(sent, 0)
    resumed, again = make()
    weights, state = torch.load(io.BytesIO(sent[0]), weights_only=True)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    train(model, optimizer, batches[5:])
    train(resumed, again, batches[5:])
    assert torch.equal(parameters(model), parameters(resumed))
    assert_same_bits(parameters(resumed))
    loaded, kept = again.state_dict()["state"], optimizer.state_dict()["state"]
    for entry, other in zip(kept.values(), loaded.values(), strict=True):
        assert entry.keys() == other.keys()
        for key, value in entry.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, other[key]), key
                assert_same_bits(value)


@on_ranks(2)
def test_a_state_that_no_rank_has_alone_is_asked_for_on_all(rank: int, size: int) -> None:
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=2))
    net = network()
    optimizer = KFAC(net, distributed=Distributed(process_group=group, share="gradients"))
    train(net, optimizer, [batch(8)])
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"state_dict\(\) must be called on all 2 ranks.*share='gradients'"):
            optimizer.state_dict()
    dist.barrier()


@pytest.mark.parametrize("share", SHARES)
@on_ranks(2)
def test_the_adaptive_rule_takes_the_step_of_one_process(rank: int, size: int, share: str) -> None:
    alone = network().double()
    model = DistributedDataParallel(copy.deepcopy(alone))
    config = Adaptive(t1=1, t2=2, t3=2, product_fraction=1.0, gamma="search")
    whole = batch(12, dtype=DOUBLE)
    optimizers = (
        (model, KFAC(model, adaptive=config, fisher="exact", distributed=Distributed(share=share))),
        (alone, KFAC(alone, adaptive=config, fisher="exact", distributed=False)),
    )
    for net, optimizer in optimizers:
        x, y = part(whole, rank, size) if net is model else whole

        def closure(net: nn.Module = net, optimizer: KFAC = optimizer, x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        for _ in range(6):
            optimizer.step(closure)
    assert_same_bits(parameters(model))
    assert torch.allclose(parameters(model), parameters(alone), atol=1e-9)
    ours, theirs = (optimizer.stats() for _, optimizer in optimizers)
    for key in ("loss", "damping", "gamma", "alpha", "mu", "ratio"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-7), key


@on_ranks(2)
def test_an_adaptive_rank_with_a_loss_that_is_not_finite_stops_all(rank: int, size: int) -> None:
    model = DistributedDataParallel(network())
    optimizer = KFAC(model, adaptive=True, damping=1.0)
    x, y = part(batch(8), rank, size)
    before = parameters(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss * math.inf if rank == 1 else loss

    optimizer.step(closure)
    assert torch.equal(parameters(model), before)
    assert optimizer.rule is not None
    assert optimizer.rule.rejected == 1
    assert optimizer.rule.damping > 1


@on_ranks(2)
def test_a_model_without_a_block(rank: int, size: int) -> None:
    model = DistributedDataParallel(nn.PReLU(3))
    optimizer = KFAC(model)
    x = torch.randn(4, 3) - rank
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    assert_same_bits(parameters(model))
    assert not torch.equal(parameters(model), torch.full((3,), 0.25))


# ---- mistakes -------------------------------------------------------------------------------------------------------


@on_ranks(2)
def test_a_bare_model_with_several_ranks_needs_a_choice(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"in no DistributedDataParallel although torch.distributed runs 2 ranks"):
        KFAC(network())
    with pytest.raises(ValueError, match=r"distributed=False needs a bare model"):
        KFAC(DistributedDataParallel(network()), distributed=False)
    with pytest.raises(TypeError, match=r"distributed must be a bool, a Distributed or None, got str"):
        KFAC(network(), distributed="yes")  # type: ignore[arg-type]
    # Made first, wrapped later.
    net = network()
    optimizer = KFAC(net, distributed=True)
    train(DistributedDataParallel(net), optimizer, [part(batch(8), rank, size)])
    assert_same_bits(parameters(net))


@on_ranks(2)
def test_gradients_that_nobody_averages_are_noticed_at_the_first_step(rank: int, size: int) -> None:
    net = network()
    before = parameters(net)
    optimizer = KFAC(net, distributed=True)
    with pytest.raises(RuntimeError, match=r"the gradients differ between the 2 ranks at the first step"):
        train(net, optimizer, [part(batch(8), rank, size)])
    assert torch.equal(parameters(net), before)
    wrapped = DistributedDataParallel(network())
    optimizer = KFAC(wrapped)
    with pytest.raises(RuntimeError, match=r"outside no_sync\(\)"), wrapped.no_sync():
        train(wrapped, optimizer, [part(batch(8), rank, size)])


@on_ranks(2)
def test_memory_decides_who_keeps_what(rank: int, size: int) -> None:
    def made(**options: Any) -> KFAC:
        return KFAC(DistributedDataParallel(network()), distributed=Distributed(**options))

    everything = sum(row.bytes for row in made(share="replicate").report())
    assert type(made().preconditioner.sharing).__name__ == "Sharing"  # small layers: sending costs more than it saves
    assert type(made(memory=everything).preconditioner.sharing).__name__ == "Sharing"
    tight = made(memory=everything - 1)
    assert type(tight.preconditioner.sharing).__name__ == "SharedGradients"
    least = torch.tensor(sum(row.bytes for row in tight.report()))
    dist.all_reduce(least, op=dist.ReduceOp.MAX)
    assert int(least) < everything
    made(memory=int(least))
    with pytest.raises(ValueError, match=rf"memory={int(least) - 1:,} bytes is too little: share='gradients' keeps"):
        made(memory=int(least) - 1)
    with pytest.raises(ValueError, match=r"share='gradients' would keep"):
        made(memory=everything - 1, share="replicate")
    large = KFAC(DistributedDataParallel(nn.Linear(400, 300)))
    assert type(large.preconditioner.sharing).__name__ == "SharedInverses"


def test_arguments_of_distributed_are_checked() -> None:
    with pytest.raises(ValueError, match=r"share must be one of 'auto', .*, got share='all'"):
        Distributed(share="all")
    with pytest.raises(ValueError, match=r"memory must be a number of bytes > 0 or None, got memory=0"):
        Distributed(memory=0)
    with pytest.raises(ValueError, match=r"dtype must be torch.bfloat16 or None, got dtype=torch.float16"):
        Distributed(dtype=torch.float16)
    alone = KFAC(network(), distributed=True)  # the same script serves one process
    assert alone.preconditioner.ranks.size == 1


# ---- ranks with different numbers of steps --------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["replicate", "inverses"])
@on_ranks(2)
def test_ranks_that_run_out_of_batches_join(rank: int, size: int, share: str) -> None:
    model = DistributedDataParallel(network())
    optimizer = KFAC(model, inverse_every=2, distributed=Distributed(share=share))
    batches = [part(batch(8, step), rank, size) for step in range(2 if rank == 0 else 5)]
    with Join([model, optimizer.joinable()]):
        train(model, optimizer, batches)
    assert_same_bits(parameters(model))
    assert_same_bits(optimizer.preconditioner.factors.running.data)
    assert optimizer.preconditioner.steps == 5
    for p in model.parameters():
        assert_same_bits(optimizer.state[p]["momentum_buffer"])
    train(model, optimizer, [part(batch(8, 9), rank, size)])  # and training goes on
    assert_same_bits(parameters(model))


@on_ranks(2)
def test_join_is_refused_where_a_rank_without_batches_would_need_gradients(rank: int, size: int) -> None:
    model = DistributedDataParallel(network())
    optimizer = KFAC(model, distributed=Distributed(share="gradients"))
    with pytest.raises(ValueError, match=r"Join needs share='replicate' or 'inverses'"):
        Join([model, optimizer.joinable()])
    with pytest.raises(ValueError, match=r"joinable\(\) does not go with adaptive=True"):
        KFAC(DistributedDataParallel(network()), adaptive=True).joinable()


@on_ranks(2)
def test_without_join_the_others_end_with_an_error(rank: int, size: int) -> None:
    group = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=2))
    net = network()
    optimizer = KFAC(net, distributed=Distributed(process_group=group))
    x, y = batch(8)  # the same on both: gradients agree without being averaged
    train(net, optimizer, [(x, y)])
    if rank == 0:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"(?i)timed? ?out"):
            train(net, optimizer, [(x, y)])
        assert time.monotonic() - start < 15
    dist.barrier()


# ---- pieces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [*range(1, 9), 33, 64])
def test_packed_triangles(n: int) -> None:
    matrix = torch.randn(n, n, dtype=DOUBLE)
    matrix += matrix.T.clone()
    packed = torch.full((packed_numel(n),), math.nan, dtype=DOUBLE)
    pack(matrix, packed)
    i, j = torch.tril_indices(n, n)
    assert torch.equal(packed.sort().values, matrix[i, j].sort().values)
    back = torch.full_like(matrix, math.nan)
    unpack(packed, back)
    assert torch.equal(back, matrix)


def test_owners_balance_the_cubes() -> None:
    model = nn.Sequential(*(nn.Linear(n, n, bias=False) for n in (50, 10, 40, 40, 30, 20, 10)))
    _, layers = discover(model, None, Blocks())
    assert owners(layers, 3) == [0, 2, 1, 2, 1, 2, 2]
    assert owners(layers, 1) == [0] * 7


def test_one_process_sends_nothing() -> None:
    alone = Ranks()
    x = torch.randn(3)
    assert torch.equal(alone.add_up(x.clone()), x)
    assert alone.mean(0.3) == 0.3
    assert alone.swap([x], [3])[0] is x
