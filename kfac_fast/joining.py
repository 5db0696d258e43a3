"""Ranks that run out of batches before others: `torch.distributed.algorithms.join`."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Joinable, JoinHook

from .preconditioner import Preconditioner


class Steps(Protocol):
    """What this file needs of a `KFAC`."""

    preconditioner: Preconditioner
    state: Any

    def damping_by_layer(self) -> list[float]: ...


class JoinableSteps(Joinable):
    """Steps of an optimizer that a rank without batches can serve.

    Args:
        optimizer: Of every rank.
    """

    def __init__(self, optimizer: Steps) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.preconditioner = optimizer.preconditioner

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What a rank without batches does.

        Raises:
            ValueError: Ranks own natural gradients.
        """
        if not self.preconditioner.sharing.joinable:
            raise ValueError("Join needs share='replicate' or 'inverses': a rank without batches has no gradients")
        return _ServeOthers(self)

    @property
    def join_device(self) -> torch.device:
        return self.preconditioner.ranks.device

    @property
    def join_process_group(self) -> Any:
        return self.preconditioner.ranks.group or dist.group.WORLD


class _ServeOthers(JoinHook):
    def __init__(self, steps: JoinableSteps) -> None:
        self._steps = steps

    def main_hook(self) -> None:
        """Takes part in a step of the others with no statistics and the inverses that it owns."""
        pre = self._steps.preconditioner
        with torch.no_grad():
            pre.drop()
            pre.capture.forget()
            pre.update_curvature(self._steps.optimizer.damping_by_layer(), joined=True)

    def post_hook(self, is_last_joiner: bool) -> None:
        """Brings the state of the update rule from a rank that went on longest."""
        ranks = self._steps.preconditioner.ranks
        if ranks.size == 1:
            return
        source = torch.tensor(ranks.rank if is_last_joiner else -1, device=ranks.device)
        dist.all_reduce(source, op=dist.ReduceOp.MAX, group=ranks.group)
        with torch.no_grad():
            for entry in self._steps.optimizer.state.values():
                if "momentum_buffer" in entry:
                    rank = dist.get_global_rank(ranks.group, int(source))
                    dist.broadcast(entry["momentum_buffer"], rank, group=ranks.group)
