"""Which ranks train one model together, and who of them makes which inverse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .collectives import Ranks
from .layers import KroneckerBlock, Layer
from .models import is_compiled_wrapper

SHARES = ("auto", "replicate", "inverses", "gradients")

# Inverting takes n³ operations, sending the result n²/2 numbers of 4 bytes. Ranks share the inverses where a byte sent
# saves more than this many operations: about what a processor does while its network moves a byte (10 Tflop/s beside
# 100 GB/s, 50 Gflop/s beside 0.5 GB/s). With equal blocks that is n = 200.
OPERATIONS_PER_BYTE = 100


@dataclass(frozen=True)
class Distributed:
    """How several ranks share the curvature work (docs/distributed.md).

    Attributes:
        process_group: The ranks over which the gradients are averaged. None is the group of the
            ``DistributedDataParallel`` wrapper or of FSDP2's mesh, else the default group, else one process alone.
        share: Who does what. "replicate": every rank makes all inverses; nothing is sent but statistics. "inverses":
            each inverse is made by one rank and sent to all. "gradients": the owner of a layer's inverses also
            preconditions its gradient and sends the result; no other rank keeps them. "auto" is "gradients" where
            `memory` demands it and for sharded models, "inverses" where the work saved outweighs the bytes sent, else
            "replicate".
        memory: Bytes of curvature a rank may keep, > 0; None is no limit.
        dtype: ``torch.bfloat16`` sends the sums of statistics at half size, with 8 bits of precision; None sends them
            as they are. Counts are always exact.
    """

    process_group: Any = None
    share: str = "auto"
    memory: int | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.share not in SHARES:
            raise ValueError(f"share must be one of {', '.join(map(repr, SHARES))}, got share={self.share!r}")
        if self.memory is not None and not (isinstance(self.memory, int) and self.memory > 0):
            raise ValueError(f"memory must be a number of bytes > 0 or None, got memory={self.memory!r}")
        if self.dtype not in (None, torch.bfloat16):
            raise ValueError(f"dtype must be torch.bfloat16 or None, got dtype={self.dtype}")

    def __deepcopy__(self, memo: Any) -> Distributed:
        return self  # a process group is a connection, not data


def ranks_of(model: nn.Module, distributed: Distributed | bool | None) -> tuple[Ranks, Distributed]:
    """The ranks whose gradients are averaged, and how they share the work.

    Args:
        model: As given by the user, wrapper included.
        distributed: None finds the ranks from the wrapper; True is ``Distributed()``; False is this process alone.

    Raises:
        TypeError: ``distributed`` is something else.
        ValueError: The wrapper is of a kind that hides the gradients, or there is none and several ranks.
    """
    if distributed is not None and not isinstance(distributed, (bool, Distributed)):
        raise TypeError(f"distributed must be a bool, a Distributed or None, got {type(distributed).__name__}")
    config = distributed if isinstance(distributed, Distributed) else Distributed()
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks(), config
    group = _wrapper_group(model)
    if distributed is False:
        if group is not None and dist.get_world_size(group) > 1:
            raise ValueError("distributed=False needs a bare model: the wrapper averages gradients over several ranks")
        return Ranks(), config
    if config.process_group is not None:
        group = config.process_group
    elif group is None:
        group = dist.group.WORLD
        if distributed is None and dist.get_world_size() > 1:
            raise ValueError(
                f"the model is in no DistributedDataParallel although torch.distributed runs {dist.get_world_size()} "
                "ranks. Make the optimizer from the wrapped model; or pass distributed=True if gradients are averaged "
                "over all ranks (by a wrapper made later, or by you), distributed=False if this rank trains by itself"
            )
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("distributed.process_group must contain this rank")
    return Ranks(group if dist.get_world_size(group) > 1 else None), config


def _wrapper_group(model: nn.Module) -> Any:
    """The group over which a wrapper of this model averages gradients, or None."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    while is_compiled_wrapper(model):
        model = model.get_submodule("_orig_mod")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.process_group
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            "model must not contain a FullyShardedDataParallel, which flattens the parameters; "
            "use DistributedDataParallel or torch.distributed.fsdp.fully_shard"
        )
    meshes = {p.device_mesh for p in sharded_parameters(model)}
    if not meshes:
        return None
    (mesh, *others) = meshes
    if others or mesh.ndim != 1 or not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise ValueError(
            "model must be sharded over one dimension of ranks, by fully_shard, got meshes of shapes "
            f"{[tuple(m.shape) for m in meshes]}; for hybrid sharding or tensor parallelism use DistributedDataParallel"
        )
    return mesh.get_group()


def sharded_parameters(model: nn.Module) -> list[Any]:
    """Parameters that are kept in shards, by FSDP2 or otherwise."""
    from torch.distributed.tensor import DTensor

    return [p for p in model.parameters() if isinstance(p, DTensor)]


def shards_of_rows(model: nn.Module) -> set[int]:
    """Identities of the parameters that FSDP2 shards along their first dimension, as it does by default."""
    if not (dist.is_available() and dist.is_initialized()):
        return set()
    from torch.distributed.tensor import Shard

    return {id(p) for p in sharded_parameters(model) if tuple(p.placements) == (Shard(0),)}


def owners(layers: Sequence[Layer], ranks: int) -> list[int]:
    """The owner of every layer: the costliest first, each to the rank with least so far (LPT; Graham 1969).

    Layers that share a parameter have one owner.
    """
    together: dict[int, int] = {}  # first layer with the same parameter, by identity of the parameter
    head = [min(together.setdefault(id(p), i) for p in layer.parameters.values()) for i, layer in enumerate(layers)]
    costs: dict[int, float] = {}
    for i, layer in enumerate(layers):
        costs[head[i]] = costs.get(head[i], 0.0) + inversion_cost(layer)
    load = [0.0] * ranks
    owner: dict[int, int] = {}
    for i in sorted(costs, key=lambda i: (-costs[i], i)):
        owner[i] = load.index(min(load))
        load[owner[i]] += costs[i]
    return [owner[i] for i in head]


def inversion_cost(layer: Layer) -> float:
    """n³ summed over the layer's factors; n for a diagonal one."""
    total = 0
    for block in layer.blocks:
        if isinstance(block, KroneckerBlock):
            total += block.a if block.a_diagonal else block.a**3
            total += block.g if block.g_diagonal else block.g**3
        else:
            total += sum(layer.parameters[name].numel() for name in block.parameters)
    return float(total)


def choose(
    config: Distributed, layers: Sequence[Layer], *, sharded: bool, divisible: bool, everything: int, least: int,
    sent: int,
) -> str:  # fmt: skip
    """The choice of `Distributed.share` that is not "auto".

    Args:
        config: What the user wants.
        layers: Preconditioned layers.
        sharded: Whether FSDP2 keeps the parameters in shards.
        divisible: Whether the approximation makes the inverses of a layer without those of others.
        everything: Bytes of curvature where a rank keeps all inverses.
        least: The same where each rank keeps its own only, on the rank that has most.
        sent: Bytes of all inverses when sent.

    Raises:
        ValueError: The memory does not suffice, or what was asked for is not possible.
    """
    share = config.share
    if sharded:
        if share not in ("auto", "gradients"):
            raise ValueError(f"share must be 'gradients' or 'auto' for a sharded model, got share={share!r}")
        share = "gradients"
    if not divisible and share not in ("auto", "replicate"):
        raise ValueError(f"share={share!r} (sharded models need 'gradients') needs approximation='block_diagonal'")
    if share == "auto":
        work = sum(map(inversion_cost, layers))
        if not divisible:
            share = "replicate"
        elif config.memory is not None and everything > config.memory:
            share = "gradients"
        else:
            share = "inverses" if work > OPERATIONS_PER_BYTE * sent else "replicate"
    needed = least if share == "gradients" else everything
    if config.memory is not None and needed > config.memory:
        raise ValueError(
            f"memory={config.memory:,} bytes is too little: share={share!r} keeps {needed:,} bytes on a rank"
            + (f"; share='gradients' would keep {least:,}" if share != "gradients" and divisible else "")
        )
    return share
