"""The update rule against its formula, for every way in which parameters lie in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_fast.update import update_parameters

SHAPE = (4, 3, 2, 5)
LAYOUTS = {
    "contiguous": lambda: torch.randn(SHAPE),
    "channels last": lambda: torch.randn(SHAPE).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(SHAPE[::-1]).permute(3, 2, 1, 0),
    "part of a larger tensor": lambda: torch.randn(4, 3, 2, 10)[..., ::2],
    "empty": lambda: torch.randn(0, 3),
    "complex": lambda: torch.randn(SHAPE, dtype=torch.complex64),
    "bfloat16": lambda: torch.randn(SHAPE).bfloat16(),
}


def wide(x: Tensor) -> Tensor:
    return x.cdouble() if x.is_complex() else x.double()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", [None, True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [True, False])
def test_is_the_formula(layout: str, gate: bool | None, momentum: float, nesterov: bool) -> None:
    torch.manual_seed(0)
    w = [LAYOUTS[layout](), torch.randn(3)]  # two, of which one always lies in order
    d, b = ([torch.randn(x.shape, dtype=x.dtype if x.is_complex() else None) for x in w] for _ in range(2))
    if gate is False:
        d = [torch.zeros_like(x) for x in d]
    group = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov, "weight_decay": 0.2, "maximize": False}
    directions = [x.clone() for x in d]

    def expected(w: Tensor, d: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        w, d, b = map(wide, (w, d, b))
        if gate is False:
            return w, b
        b = momentum * b + d if momentum else b
        return (1 - 0.1 * 0.2) * w - 0.1 * ((d + momentum * b) if nesterov or not momentum else b), b

    wanted = [expected(*entry) for entry in zip(w, d, b, strict=True)]
    versions = [x._version for x in w]
    update_parameters(group, w, directions, b if momentum else [], None if gate is None else torch.tensor(gate))
    for x, y, (new_w, new_b) in zip(w, b, wanted, strict=True):
        tolerance = 2e-2 if x.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(wide(x), new_w, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(wide(y), new_b, rtol=1e-6, atol=1e-6)
    assert all(x._version > before for x, before in zip(w, versions, strict=True)), "autograd must see the change"
    for given, before in zip(directions, d, strict=True):
        assert torch.equal(given, before), "a direction may be the user's gradient"
