"""`Sampler`: the random numbers behind Monte-Carlo targets."""

from __future__ import annotations

import torch


class Sampler:
    """Generators whose numbers depend on the seed, the step and the rank alone: one rank's checkpoint serves all.

    Args:
        seed: Any integer.
        rank: Of this process; every rank draws numbers of its own.
    """

    def __init__(self, seed: int, rank: int) -> None:
        self.seed = seed
        self._rank = rank
        self._generators: dict[torch.device, torch.Generator] = {}
        self._seeded: dict[torch.device, tuple[int, int]] = {}  # for which seed and step

    def generator(self, device: torch.device, step: int) -> torch.Generator:
        """The generator of a device; within a step it runs on, unless `restart` is called."""
        generator = self._generators.setdefault(device, torch.Generator(device))
        if self._seeded.get(device) != (self.seed, step):
            self._seeded[device] = (self.seed, step)
            # Odd constants spread the three numbers over the 32 bits that the CPU generator looks at.
            generator.manual_seed((self.seed + 0x9E3779B1 * step + 0x85EBCA77 * self._rank) % 2**32)
        return generator

    def restart(self) -> None:
        """What was drawn in this step has been dropped, and will be drawn again."""
        self._seeded.clear()
