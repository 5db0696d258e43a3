"""How ranks share the making of inverses and natural gradients: the three choices of KAISA (Pauloski et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .approximations import Approximation
from .collectives import Parcel, Ranks, local
from .distributed import Distributed, choose, owners
from .layers import Layer
from .ops import Gradient


class Sharing:
    """Share "replicate": every rank makes all inverses and natural gradients. Also one process by itself.

    Args:
        ranks: Who there is.
        parts: Approximations, each over a run of consecutive layers.
        like: A tensor of the dtype and device of the statistics.

    Attributes:
        owner: Rank that owns each layer.
        inverts: Layers whose inverses this rank makes.
        preconditions: Layers whose natural gradients this rank makes; their inverses are kept here.
        covered: All parameters of the layers.
        sharded: Whether gradients and results are this rank's shards.
        joinable: Whether a rank can serve a step without knowing its gradients.
        results: Natural gradient of every covered parameter, or this rank's shard of it; views of `results_flat`.
    """

    sharded = False
    joinable = True

    def __init__(self, ranks: Ranks, parts: Sequence[Approximation], like: Tensor) -> None:
        self.ranks = ranks
        self.parts = parts
        self.layers: list[Layer] = [layer for part in parts for layer in part.layers]
        self._located = [(part, i) for part in parts for i in range(len(part.layers))]
        self.owner = owners(self.layers, ranks.size)
        self.inverts, self.preconditions = self._duties()
        unique = {id(p): p for layer in self.layers for p in layer.parameters.values()}
        self.covered: list[nn.Parameter] = list(unique.values())
        place = {key: k for k, key in enumerate(unique)}
        # For every layer the names of its parameters and where they stand in `covered`.
        self._places = [{name: place[id(p)] for name, p in layer.parameters.items()} for layer in self.layers]
        self._wanted = self._parameters(self.preconditions)
        self.results_flat, self.results, outputs = self._buffers(like)
        # Where the natural gradients of this rank's layers go, as matrices of every block, by part.
        self._outputs = self.matrices(outputs)

    def _duties(self) -> tuple[list[int], list[int]]:
        every = list(range(len(self.layers)))
        return every, every

    def _owned_by(self, rank: int) -> list[int]:
        return [i for i, owner in enumerate(self.owner) if owner == rank]

    def _buffers(self, like: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """`results_flat`, `results`, and where natural gradients of the `preconditions` are written, per parameter."""
        flat = like.new_zeros(sum(p.numel() for p in self.covered))
        pieces = flat.split([p.numel() for p in self.covered])
        results = [piece.view(p.shape) for piece, p in zip(pieces, self.covered, strict=True)]
        return flat, results, [results[k] for k in self._wanted]

    def _parameters(self, layers: Sequence[int]) -> list[int]:
        """Numbers among `covered` of the parameters of these layers."""
        return list(dict.fromkeys(k for i in layers for k in self._places[i].values()))

    def matrices(self, tensors: Sequence[Tensor]) -> list[list[Gradient]]:
        """Tensors like the parameters of the `preconditions`, as one matrix per block, for each part."""
        given = dict(zip(self._wanted, tensors, strict=True))
        found: dict[int, list[Gradient]] = {id(part): [] for part in self.parts}
        for i in self.preconditions:
            own = {name: given[k] for name, k in self._places[i].items()}
            dtype = next(iter(own.values())).dtype
            matrices = self.layers[i].matrices({name: x.to(dtype) for name, x in own.items()})
            found[id(self._located[i][0])] += matrices
        return [found[id(part)] for part in self.parts]

    def check_that_gradients_are_averaged(self, joined: bool) -> None:
        """Compares the gradients of all ranks, but those of a rank that has joined and has none.

        Raises:
            RuntimeError: On all ranks, if they differ.
        """
        if self.ranks.size == 1 or self.sharded:
            return
        norms = [p.grad.double().norm() for p in self.covered if p.grad is not None]
        if self.ranks.differs(torch.stack(norms).sum() if norms and not joined else None):
            raise RuntimeError(
                f"the gradients differ between the {self.ranks.size} ranks at the first step. Is the model that the "
                "loss was computed with in DistributedDataParallel, and was the last backward pass outside no_sync()? "
                "Pass distributed=False if the ranks train models of their own"
            )

    # ---- work -------------------------------------------------------------------------------------------------------

    def update(self, gamma: Tensor) -> None:
        """Makes new inverses where they are due to be, with γ of every block, ``[b]``."""
        ends = [sum(len(layer.blocks) for layer in part.layers) for part in self.parts]
        whole = len(self.inverts) == len(self.layers)
        for part, own in zip(self.parts, gamma.split(ends), strict=True):
            part.update(
                own, None if whole else [k for p, k in map(self._located.__getitem__, self.inverts) if p is part]
            )

    def apply(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Natural gradients of these gradients of `covered`, into `results`; ⟨V, U⟩ of every block."""
        matrices = self.matrices(self._full(gradients))
        dots = [part.apply(own, out) for part, own, out in zip(self.parts, matrices, self._outputs, strict=True)]
        return self._spread(dots[0] if len(dots) == 1 else torch.cat(dots))

    def _full(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Whole gradients of the parameters of the `preconditions`."""
        zero = self.results_flat.new_zeros(())
        # A layer that took no part has no gradient: zeros without memory.
        return [
            zero.expand(self.covered[k].shape) if (gradient := gradients[k]) is None else gradient for k in self._wanted
        ]

    def _spread(self, dot: Tensor) -> Tensor:
        """Brings the natural gradients to all ranks; ⟨V, U⟩ of every block from those of the `preconditions`."""
        return dot

    def keeps(self, layer: int) -> bool:
        """Whether this rank has the inverses of a layer."""
        return len(self.preconditions) == len(self.layers) or layer in self.preconditions

    def missing_state(self) -> dict[int, dict[str, Tensor]]:
        """State of layers that only other ranks have, by layer; every rank must ask."""
        return {}

    def _made_state(self, layer: int) -> dict[str, list[Tensor]]:
        """Of a layer's state what comes from `update`, not from the statistics, which all ranks have."""
        part, own = self._located[layer]
        statistics = {key for store in part.stores for key in store.state(own)}
        return {key: views for key, views in part.state(own).items() if key not in statistics}


class SharedInverses(Sharing):
    """Share "inverses": the owner of a layer makes its inverses and sends them, packed, to all ranks."""

    def _duties(self) -> tuple[list[int], list[int]]:
        return self._owned_by(self.ranks.rank), list(range(len(self.layers)))

    def update(self, gamma: Tensor) -> None:
        super().update(gamma)
        parcels = [self._parcel(self._owned_by(rank)) for rank in range(self.ranks.size)]
        parcels[self.ranks.rank].write()
        self.ranks.from_owners([parcel.flat for parcel in parcels])
        for rank, parcel in enumerate(parcels):
            if rank != self.ranks.rank:
                parcel.read()

    def _parcel(self, layers: Sequence[int]) -> Parcel:
        tensors = [
            (view, self._located[i][0].symmetric and view.ndim == 2)
            for i in layers
            for views in self._made_state(i).values()
            for view in views
        ]
        return Parcel(tensors, self.results_flat.dtype, self.results_flat.device)


class SharedGradients(Sharing):
    """Share "gradients": only a layer's owner has its inverses; it sends the natural gradient to all ranks."""

    joinable = False

    def __init__(self, ranks: Ranks, parts: Sequence[Approximation], like: Tensor) -> None:
        super().__init__(ranks, parts, like)
        for part in parts:
            part.keep([k for p, k in map(self._located.__getitem__, self.inverts) if p is part])
        # ⟨V, U⟩ travels behind the natural gradients.
        self._dots = [[b for i in self._owned_by(rank) for b in self._blocks(i)] for rank in range(ranks.size)]

    def _duties(self) -> tuple[list[int], list[int]]:
        own = self._owned_by(self.ranks.rank)
        return own, own

    def _blocks(self, layer: int) -> range:
        first = sum(len(other.blocks) for other in self.layers[:layer])
        return range(first, first + len(self.layers[layer].blocks))

    def _spread(self, dot: Tensor) -> Tensor:
        owned = [[self.results[k] for k in self._parameters(self._owned_by(r))] for r in range(self.ranks.size)]
        sizes = [[*(u.numel() for u in own), len(dots)] for own, dots in zip(owned, self._dots, strict=True)]
        pieces = [dot.new_empty(sum(own)) for own in sizes]
        mine = self.ranks.rank
        pieces[mine] = torch.cat([*(u.flatten() for u in owned[mine]), dot])
        self.ranks.from_owners(pieces)
        every = dot.new_empty(sum(map(len, self._dots)))
        for rank, (own, piece, dots) in enumerate(zip(owned, pieces, self._dots, strict=True)):
            *values, last = piece.split(sizes[rank])
            every[dots] = last
            if rank != mine and own:
                torch._foreach_copy_(own, [v.view(u.shape) for u, v in zip(own, values, strict=True)])
        return every

    def missing_state(self) -> dict[int, dict[str, Tensor]]:
        own = {i: {k: torch.stack(v).cpu() for k, v in self._made_state(i).items()} for i in self.inverts}
        device = self.results_flat.device
        try:
            every = self.ranks.gather(own)
        except RuntimeError as error:
            raise RuntimeError(
                f"state_dict() must be called on all {self.ranks.size} ranks with share='gradients' and with sharded "
                "models, where no rank has all inverses; so must whatever copies or saves the optimizer"
            ) from error
        return {
            i: {key: value.to(device) for key, value in state.items()}
            for states in every
            for i, state in states.items()
        }


class ShardedGradients(SharedGradients):
    """Share "gradients" for FSDP2: the owner gathers a layer's gradient, and each rank gets its shard of the result.

    Parameters are sharded along their first dimension as ``torch.chunk`` cuts it.
    """

    sharded = True

    def _buffers(self, like: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        shapes = [local(p).shape for p in self.covered]
        flat = like.new_zeros(sum(map(torch.Size.numel, shapes)))
        pieces = flat.split([shape.numel() for shape in shapes])
        results = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        self._whole = [like.new_zeros(self.covered[k].shape) for k in self._wanted]
        return flat, results, self._whole

    def _rows(self, tensor: Tensor, rank: int) -> Tensor:
        """A rank's rows of a whole tensor."""
        chunk = -(-len(tensor) // self.ranks.size)
        return tensor[rank * chunk : (rank + 1) * chunk]

    def _full(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        ranks = range(self.ranks.size)
        empty = self.results_flat.new_empty(0)
        shards = [
            torch.zeros_like(own) if g is None else local(g).to(own.dtype)
            for g, own in zip(gradients, self.results, strict=True)
        ]
        sent = [torch.cat([empty, *(shards[k].flatten() for k in self._parameters(self._owned_by(r)))]) for r in ranks]
        whole = [torch.empty_like(out) for out in self._whole]
        views = [[self._rows(full, r) for full in whole] for r in ranks]
        received = self.ranks.swap(sent, [sum(v.numel() for v in own) for own in views])
        for own, piece in zip(views, received, strict=True):
            _scatter(own, piece)
        return whole

    def _spread(self, dot: Tensor) -> Tensor:
        ranks = range(self.ranks.size)
        sent = [torch.cat([*(self._rows(u, r).flatten() for u in self._whole), dot]) for r in ranks]
        own = [[self.results[k] for k in self._parameters(self._owned_by(r))] for r in ranks]
        sizes = [sum(v.numel() for v in views) + len(dots) for views, dots in zip(own, self._dots, strict=True)]
        every = dot.new_empty(sum(map(len, self._dots)))
        for views, dots, piece in zip(own, self._dots, self.ranks.swap(sent, sizes), strict=True):
            _scatter(views, piece[: len(piece) - len(dots)])
            every[dots] = piece[len(piece) - len(dots) :]
        return every


def sharing_for(config: Distributed, ranks: Ranks, parts: Sequence[Approximation], like: Tensor) -> Sharing:
    """The sharing that was asked for, or that suits; see `distributed.choose` for what it raises."""
    located = [(part, i) for part in parts for i in range(len(part.layers))]
    layers = [part.layers[i] for part, i in located]
    in_shards = [type(p) is not nn.Parameter for layer in layers for p in layer.parameters.values()]
    sharded = any(in_shards)
    if sharded and not all(in_shards):
        raise ValueError("model must be sharded as a whole: call fully_shard() on it too, after its parts")
    if ranks.size == 1 and not sharded:
        return Sharing(ranks, parts, like)
    owner = owners(layers, ranks.size)
    inverse = [part.inverse_bytes(i) for part, i in located]
    everything = sum(part.memory(i) for part, i in located)
    kept = [sum(size for size, own in zip(inverse, owner, strict=True) if own == rank) for rank in range(ranks.size)]
    share = choose(
        config,
        layers,
        sharded=sharded,
        divisible=all(part.divisible for part in parts),
        everything=everything,
        least=everything - sum(inverse) + max(kept),
        sent=round(sum(size / (1 + part.symmetric) for size, (part, _) in zip(inverse, located, strict=True))),
    )
    if sharded:
        return ShardedGradients(ranks, parts, like)
    return {"replicate": Sharing, "inverses": SharedInverses, "gradients": SharedGradients}[share](ranks, parts, like)


def _scatter(views: Sequence[Tensor], flat: Tensor) -> None:
    """Copies a flat tensor to views, one after the other."""
    for view, piece in zip(views, flat.split([v.numel() for v in views]), strict=True):
        view.copy_(piece.view(view.shape))
