"""The ops as torch.compile sees them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_fast import BlockDiagonal, ConvRows, ops
from kfac_fast.ops import schema

SIZES = [4, 20]  # squares divisible by 16: no padding, whose content is undefined, in the buffers compared


def spd_blocks() -> BlockDiagonal:
    return BlockDiagonal.pack([m @ m.T + torch.eye(n) for n, m in ((n, torch.randn(n, n)) for n in SIZES)])


def calls() -> dict[str, tuple]:
    blocks = spd_blocks()
    ones = torch.ones(2)
    tensors, geometry = schema.encode_rows(
        [torch.randn(5, 3), ConvRows(torch.randn(2, 5, 6, 6), 2, padding=((1, 0), (0, 1)))]
    )
    gate = torch.ones(1, dtype=torch.int32)
    info = torch.zeros(2, dtype=torch.int32)
    return {
        "factor_update_": (blocks.data, SIZES, tensors, geometry, ones, ones, [True, False], [torch.rand(5), None]),
        "commit_": (blocks.data, spd_blocks().data, SIZES, ones / 2, ones, gate),
        "damped_inverse": (blocks.data, SIZES, ones),
        "damped_inverse_": (blocks.data, SIZES, ones, torch.zeros_like(blocks.data), info, False),
        "precondition": (
            [torch.randn(4, 19), torch.randn(20, 4)], [torch.randn(4), None],
            blocks.data, SIZES, BlockDiagonal.pack([torch.eye(20), torch.eye(4)]).data, SIZES[::-1],
        ),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["factor_update_", "commit_", "damped_inverse", "damped_inverse_", "precondition"])
def test_opcheck(name: str) -> None:
    arguments = calls()[name]
    torch.library.opcheck(getattr(torch.ops.kfac_fast, name).default, arguments)


@pytest.mark.filterwarnings("ignore")
def test_no_graph_break() -> None:
    blocks = spd_blocks()

    def natural(v: Tensor, w: Tensor) -> Tensor:
        inverse, _ = torch.ops.kfac_fast.damped_inverse(blocks.data, SIZES, torch.ones(2))
        (u, t), _ = torch.ops.kfac_fast.precondition([v * 2, w], [None, None], inverse, SIZES, inverse, SIZES)
        return u.sum() + t.sum()

    v, w = torch.randn(4, 4), torch.randn(20, 20)
    compiled = torch.compile(natural, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(v, w), natural(v, w))


def test_geometry_round_trip() -> None:
    x = torch.randn(2, 4, 6, 7)
    rows = [torch.randn(3, 2), ConvRows(x, (2, 3), (1, 2), ((0, 1), (2, 2)), (2, 1), 2, "circular"), torch.randn(1, 1)]
    decoded = schema.decode_rows(*schema.encode_rows(rows))
    assert decoded[0] is rows[0]
    assert repr(decoded[1]) == repr(rows[1])
    assert len(decoded) == 3


def test_out_of_the_dispatcher_and_in_it_agree() -> None:
    blocks = spd_blocks()
    inverse, info = torch.ops.kfac_fast.damped_inverse(blocks.data, SIZES, torch.ones(2))
    expected = ops.damped_inverse(blocks, 1.0)
    assert all(torch.equal(x, y) for x, y in zip(BlockDiagonal(SIZES, inverse), expected.inverse, strict=True))
    assert torch.equal(info, expected.info)
