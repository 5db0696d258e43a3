"""Calls of the four ops, as the reports on the kernels make them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from launches import BF16, F16, F32, F64, TF32, Launch, Recorder

from kfac_fast import _C

_NAMES = {F32: "f32", F64: "f64", F16: "f16", BF16: "bf16", TF32: "tf32"}
_NUMPY: dict[int, Any] = {F32: np.float32, F64: np.float64, F16: np.float16, BF16: np.uint16, TF32: np.float32}
_CPU = 1 << 32  # any device will do


@dataclass
class Case:
    """A call, and the bytes that it cannot do without: inputs read once, outputs written once."""

    op: str
    name: str
    run: Callable[[Recorder], list[Launch]]
    minimum: int


def _kind_of(dtype: int) -> tuple[int, int, Any]:
    """The factors' type for rows of this type, its width, and its numpy type."""
    return (F64, 8, np.float64) if dtype == F64 else (TF32 if dtype == TF32 else F32, 4, np.float32)


def _random(count: int, dtype: int) -> Callable[[], np.ndarray]:
    def values() -> np.ndarray:
        x = np.random.default_rng(0).standard_normal(count).astype(np.float32)
        return (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == BF16 else x.astype(_NUMPY[dtype])

    return values


def factor_update(m: int, n: int, dtype: int) -> Case:
    """Rows with a bias column."""
    return _factor_update(f"{m} rows, {n}²", dtype, (m, n - 1), (n - 1, 1), None, n, True)


def convolution(batch: int, channels: int, side: int, kernel: int, dtype: int) -> Case:
    pad = kernel // 2
    geometry = (kernel, kernel), (1, 1), (pad, pad), (1, 1), (side, side), 1, 0
    shape, strides = (batch, channels, side, side), (channels * side * side, side * side, side, 1)
    name = f"conv {kernel}×{kernel}, {'×'.join(map(str, shape))}"
    return _factor_update(name, dtype, shape, strides, geometry, channels * kernel * kernel, False)


def _factor_update(
    name: str, dtype: int, shape: tuple[int, ...], strides: tuple[int, ...], conv: Any, n: int, bias: bool
) -> Case:
    code, width, kind = _kind_of(dtype)
    count = int(np.prod(shape))

    def run(device: Recorder) -> list[Launch]:
        plan = _C.Plan([n])
        x = device.array(count, _NUMPY[dtype], "X", _random(count, dtype))
        views = _C.TensorViews([(x, F32 if dtype == TF32 else dtype, _CPU, shape, strides)])
        decay, scale, trace = (device.array(1, kind, key) for key in ("decay", "scale", "trace"))
        nonfinite, factors = device.array(1, np.int32, "nonfinite"), device.array(plan.numel, kind, "C")
        return device.run(
            "factor_update",
            lambda table, call: table.factor_update(
                call, plan, code, factors, views, [conv], [bias], [], decay, scale, trace, nonfinite
            ),
        )

    minimum = count * np.dtype(_NUMPY[dtype]).itemsize + width * (n * (n + 1) // 2 + n * n)
    return Case("factor_update", f"{name}, {_NAMES[dtype]}", run, minimum)


def damped_inverse(sizes: list[int], dtype: int = F32) -> Case:
    code, width, kind = _kind_of(dtype)
    plan = _C.Plan(sizes)

    def identities() -> np.ndarray:
        blocks = np.zeros(plan.numel, kind)
        for n, at in zip(sizes, plan.offsets, strict=True):
            blocks[at : at + n * n] = np.eye(n, dtype=kind).ravel()
        return blocks

    def run(device: Recorder) -> list[Launch]:
        blocks, inverse = device.array(plan.numel, kind, "C", identities), device.array(plan.numel, kind, "inverse")
        damping, info = device.array(len(sizes), kind, "damping"), device.array(len(sizes), np.int32, "info")
        return device.run(
            "damped_inverse",
            lambda table, call: table.damped_inverse(call, plan, code, blocks, damping, inverse, info, False, True),
        )

    minimum = sum(width * (n * (n + 1) // 2 + n * n) for n in sizes)
    return Case("damped_inverse", f"{len(sizes)} × {sizes[0]}², {_NAMES[dtype]}", run, minimum)


def precondition(shapes: list[tuple[int, int]], dtype: int = F32) -> Case:
    """Gradients with their biases apart."""
    code, width, kind = _kind_of(dtype)
    rows, columns = [r for r, _ in shapes], [c for _, c in shapes]

    def views(device: Recorder, name: str) -> tuple[_C.TensorViews, _C.TensorViews]:
        weights = [(device.array(r * (c - 1), kind, name), dtype, _CPU, (r, c - 1), (c - 1, 1)) for r, c in shapes]
        biases = [(device.array(r, kind, f"bias of {name}"), dtype, _CPU, (r,), (1,)) for r in rows]
        return _C.TensorViews(weights), _C.TensorViews(biases)

    def run(device: Recorder) -> list[Launch]:
        plans = _C.Plan(rows), _C.Plan(columns)
        inverses = [device.array(plan.numel, kind, key) for plan, key in zip(plans, "GA", strict=True)]
        dot = device.array(len(shapes), kind, "dot")
        gradients, results = views(device, "V"), views(device, "U")
        index = list(range(len(shapes)))
        return device.run(
            "precondition",
            lambda table, call: table.precondition(call, *plans, code, *inverses, *gradients, *results, index, dot),
        )

    name = f"{len(shapes)} × ({rows[0]} × {columns[0]}), {_NAMES[dtype]}"
    return Case("precondition", name, run, sum(width * (2 * r * c + r * r + c * c) for r, c in shapes))


def commit(sizes: list[int], dtype: int = F32) -> Case:
    code, width, kind = _kind_of(dtype)

    def run(device: Recorder) -> list[Launch]:
        plan = _C.Plan(sizes)
        buffers = [device.array(plan.numel, kind, key) for key in ("C", "S")]
        numbers = [device.array(len(sizes), kind, key) for key in ("decay", "scale")]
        gate = device.array(1, np.int32, "gate", lambda: np.ones(1, np.int32))
        trace = device.array(len(sizes), kind, "trace")
        return device.run("commit", lambda table, call: table.commit(call, plan, code, *buffers, *numbers, gate, trace))

    name = f"{len(sizes)} × {sizes[0]}², {_NAMES[dtype]}"
    return Case("commit", name, run, sum(4 * width * n * n for n in sizes))
