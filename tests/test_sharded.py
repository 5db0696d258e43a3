"""FSDP2: parameters in shards over the ranks."""

from __future__ import annotations

import copy
import shutil
import tempfile
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from ranks import on_ranks
from test_distributed import DOUBLE, assert_same_bits, batch, network, part, train
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from kfac_fast import KFAC, Distributed, Preconditioner

pytestmark = pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="FSDP2 and tensor parallelism of torch 2.6 do not run on a processor"
)


def sharded(model: nn.Module, size: int) -> nn.Module:
    """Every layer with parameters of its own, then the rest."""
    mesh = init_device_mesh("cpu", (size,))
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model: nn.Module) -> Tensor:
    return torch.cat(
        [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten() for p in model.parameters()]
    )


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@on_ranks(2)
def test_sharded_models_equal_one_process(rank: int, size: int, fisher: str) -> None:
    alone = network().double()
    model = sharded(copy.deepcopy(alone), size)
    settings = {"fisher": fisher, "inverse_every": 2, "weight_decay": 0.01}
    optimizer = KFAC(model, **settings)
    assert [row.covered for row in optimizer.report()] == [True, True, False, True, True, True]
    single = KFAC(alone, distributed=False, **settings)
    for step in range(4):
        data = batch(12, step, DOUBLE)
        train(model, optimizer, [part(data, rank, size)])
        train(alone, single, [data])
        with torch.no_grad():
            model(data[0])  # leaves the root unsharded: parameters are other objects until the next step
    assert torch.allclose(whole(model), whole(alone), atol=1e-12)
    assert_same_bits(whole(model))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@on_ranks(2)
def test_the_gradients_of_a_sharded_model_are_those_without_kfac(rank: int, size: int, fraction: float) -> None:
    plain, watched = (sharded(network(), size) for _ in range(2))
    optimizer = KFAC(watched, factor_fraction=fraction)
    x, y = part(batch(8), rank, size)
    for _ in range(2):
        for net in (plain, watched):
            net.zero_grad()
            F.cross_entropy(net(x), y).backward()
        for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
            assert torch.equal(p.grad.to_local(), q.grad.to_local())
    optimizer.step()
    assert optimizer.preconditioner.factors.updates.min() == 1


@on_ranks(2)
def test_a_sharded_model_keeps_shards_of_momentum_and_owned_inverses(rank: int, size: int) -> None:
    model = sharded(network(), size)
    optimizer = KFAC(model)
    train(model, optimizer, [part(batch(8, step), rank, size) for step in range(3)])
    for p in model.parameters():
        assert optimizer.state[p]["momentum_buffer"].to_local().shape == p.to_local().shape
    state = optimizer.state_dict()
    other = sharded(network(), size)
    again = KFAC(other)
    again.load_state_dict(state)
    with torch.no_grad():
        for p, q in zip(other.parameters(), model.parameters(), strict=True):
            p.to_local().copy_(q.to_local())
    for net, opt in ((model, optimizer), (other, again)):
        train(net, opt, [part(batch(8, 5), rank, size)])
    assert torch.equal(whole(model), whole(other))
    kept = [optimizer.preconditioner.sharing.keeps(i) for i in range(3)]
    assert 0 < sum(kept) < 3


@pytest.mark.parametrize("kind", ["FSDP2", "replicate", "gradients"])
@on_ranks(2)
def test_torchs_checkpoints_of_several_ranks(rank: int, size: int, kind: str) -> None:
    def make() -> tuple[nn.Module, KFAC]:
        if kind == "FSDP2":
            model: nn.Module = sharded(network(), size)
            return model, KFAC(model, inverse_every=3)
        model = DistributedDataParallel(network())
        return model, KFAC(model, inverse_every=3, distributed=Distributed(share=kind))

    warnings.simplefilter("ignore")  # of torch's own, about its storage classes
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder, 0)
    model, optimizer = make()
    batches = [part(batch(8, step), rank, size) for step in range(7)]
    train(model, optimizer, batches[:4])
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=folder[0])
    train(model, optimizer, batches[4:])
    other, again = make()
    state = dict(zip(("model", "optimizer"), get_state_dict(other, again), strict=True))
    dcp.load(state, checkpoint_id=folder[0])
    set_state_dict(other, again, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(other, again, batches[4:])
    assert torch.equal(whole(model), whole(other))
    assert again.stats() == optimizer.stats()
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder[0])


@on_ranks(2)
def test_a_sharded_model_with_a_nan_on_one_rank(rank: int, size: int) -> None:
    model = sharded(network(), size)
    optimizer = KFAC(model, distributed=Distributed())
    x, y = part(batch(8), rank, size)
    train(model, optimizer, [(x, y)])
    before = whole(model)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    if rank == 1:  # in one shard of a parameter without a block
        next(p for p in model.parameters() if p.numel() == 1).grad.to_local().fill_(torch.nan)
        model[4].bias.grad.to_local().fill_(torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
    assert torch.equal(whole(model), before)


@on_ranks(2)
def test_the_preconditioner_of_a_sharded_model_rewrites_the_shards(rank: int, size: int) -> None:
    alone = network().double()
    model = sharded(copy.deepcopy(alone), size)
    data = batch(8, dtype=DOUBLE)
    for net, (x, y) in ((model, part(data, rank, size)), (alone, data)):
        preconditioner = Preconditioner(net, fisher="exact", distributed=None if net is model else False)
        F.cross_entropy(net(x), y).backward()
        preconditioner.step()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(p.grad.full_tensor(), q.grad, atol=1e-12)


class Flattened(FullyShardedDataParallel):
    """As far as it can be made without an accelerator."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


@on_ranks(2)
def test_what_sharded_models_cannot_do_is_refused(rank: int, size: int) -> None:
    model = sharded(network(), size)
    with pytest.raises(ValueError, match=r"share must be 'gradients' or 'auto' for a sharded model"):
        KFAC(model, distributed=Distributed(share="replicate"))
    with pytest.raises(ValueError, match=r"adaptive does not take sharded models; use DistributedDataParallel"):
        KFAC(model, adaptive=True)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards"))
    with pytest.raises(ValueError, match=r"sharded over one dimension of ranks.*use DistributedDataParallel"):
        KFAC(fully_shard(network(), mesh=mesh))
    split = parallelize_module(network(), init_device_mesh("cpu", (size,)), {"4": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"tensor parallelism.*use DistributedDataParallel"):
        KFAC(split, distributed=True)
    with pytest.raises(ValueError, match=r"must not contain a FullyShardedDataParallel.*use DistributedDataParallel"):
        KFAC(nn.Sequential(Flattened(), nn.Linear(2, 2)))
    half = network()
    fully_shard(half[4], mesh=init_device_mesh("cpu", (size,)))
    with pytest.raises(ValueError, match=r"model must be sharded as a whole: call fully_shard\(\) on it too"):
        KFAC(half)


@on_ranks(3)
def test_shards_of_different_sizes_and_empty_ones(rank: int, size: int) -> None:
    alone = network().double()
    model = sharded(copy.deepcopy(alone), size)
    assert model[1].weight.to_local().numel() == (0 if rank == 2 else 4)  # 4 filters over 3 ranks: 2, 2, 0
    optimizer, single = KFAC(model, fisher="exact"), KFAC(alone, fisher="exact", distributed=False)
    for step in range(2):
        data = batch(12, step, DOUBLE)
        train(model, optimizer, [part(data, rank, size)])
        train(alone, single, [data])
    assert torch.allclose(whole(model), whole(alone), atol=1e-12)


@on_ranks(2)
def test_gradient_accumulation_of_a_sharded_model(rank: int, size: int) -> None:
    alone = network().double()
    model = sharded(copy.deepcopy(alone), size)
    optimizer, single = KFAC(model, fisher="exact"), KFAC(alone, fisher="exact", distributed=False)
    for step in range(2):
        data = batch(12, step, DOUBLE)
        micro = list(zip(*(t.chunk(2) for t in part(data, rank, size)), strict=True))
        optimizer.zero_grad()
        for i, (x, y) in enumerate(micro):
            model.set_requires_gradient_sync(i == len(micro) - 1)
            (F.cross_entropy(model(x), y) / len(micro)).backward()
        optimizer.step()
        train(alone, single, [data])
    assert torch.allclose(whole(model), whole(alone), atol=1e-12)
