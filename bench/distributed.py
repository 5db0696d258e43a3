"""``python -m bench.distributed``: what ranks send and keep, counted; and what that would take on 8 to 1024 ranks.

The first table comes from real ranks (gloo, on this machine) whose calls of torch.distributed and whose tensors are
counted; no time is measured. The second is a model: the layers and their division among ranks are the package's own,
the rates are assumptions that can be given on the command line.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_fast import KFAC, Distributed
from kfac_fast.collectives import packed_numel
from kfac_fast.distributed import inversion_cost, owners
from kfac_fast.layers import Blocks, KroneckerBlock, Layer, discover

SHARES = ("replicate", "inverses", "gradients")
WIDTHS = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)  # the CURVES autoencoder
SECONDS = 120


def chain(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Sigmoid()]
    return nn.Sequential(*layers[:-1])


# ---- counted --------------------------------------------------------------------------------------------------------


def measure(rank: int, size: int, store: str) -> list[dict[str, Any]]:
    """In a rank: for every share the bytes given to each collective in a step without and with new inverses."""
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    sent: dict[str, list[int]] = defaultdict(list)
    count_calls(sent)
    measure_share(size, SHARES[0], sent)  # memory that is taken once for all: workspaces
    return [measure_share(size, share, sent) for share in (SHARES if size > 1 else SHARES[:1])]


def measure_share(size: int, share: str, sent: dict[str, list[int]]) -> dict[str, Any]:
    torch.manual_seed(0)
    model: nn.Module = chain(*WIDTHS)
    if size > 1:
        model = nn.parallel.DistributedDataParallel(model)
    before = tensor_bytes()
    optimizer = KFAC(model, likelihood="bernoulli", momentum=0.0, distributed=Distributed(share=share))

    def step() -> dict[str, list[int]]:
        optimizer.zero_grad()
        x = torch.rand(16, WIDTHS[0])
        F.binary_cross_entropy_with_logits(model(x), x).backward()
        sent.clear()
        optimizer.step()
        return {name: list(sizes) for name, sizes in sent.items()}

    for _ in range(3):  # which always renew the inverses
        step()
    optimizer.zero_grad()
    after = tensor_bytes()
    without = step()
    optimizer.preconditioner.steps = 10  # inverses are due every 10 steps
    whole = step()
    found = {"without": without, "whole": whole, "tensors": after - before, "curvature": optimizer.report().bytes}
    optimizer.close()
    return found


def count_calls(sent: dict[str, list[int]]) -> None:
    """Makes the collectives of torch.distributed note the bytes that they are given."""

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            sent[name].append(tensor.numel() * tensor.element_size())
            return call(tensor, *args, **kwargs)

        return noted

    for name in ("all_reduce", "broadcast"):
        setattr(dist, name, noting(name, getattr(dist, name)))


def tensor_bytes() -> int:
    """Memory of all tensors that there are."""
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if is_tensor(t)}
    return sum(storages.values())


def is_tensor(thing: Any) -> bool:
    return issubclass(type(thing), Tensor) and type(thing) in (Tensor, nn.Parameter)


def counted(size: int) -> list[list[dict[str, Any]]]:
    """Starts the ranks and collects what they counted, by rank and share."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "bench.distributed", "--store", f"{folder}/store"]
        ranks = [
            subprocess.Popen(
                [*command, "--rank", str(rank), "--size", str(size)], stdout=subprocess.PIPE, env=environment
            )
            for rank in range(size)
        ]
        try:
            return [json.loads(rank.communicate(timeout=SECONDS)[0]) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()


def counted_table() -> list[dict[str, Any]]:
    rows = []
    for size in (1, 2, 4):
        for share, found in zip(SHARES, zip(*counted(size), strict=True), strict=False):
            one = found[0]
            every = sum(one["without"].get("broadcast", []))
            rows.append(
                {
                    "ranks": size,
                    "share": share if size > 1 else "–",
                    "statistics": sum(one["without"].get("all_reduce", [])),
                    "inverses": sum(one["whole"].get("broadcast", [])) - every,
                    "gradients": every,
                    "calls": {name: len(sizes) for name, sizes in one["whole"].items()},
                    "curvature": max(rank["curvature"] for rank in found),
                    "tensors": max(rank["tensors"] for rank in found),
                }
            )
    return rows


# ---- modelled -------------------------------------------------------------------------------------------------------


def resnet50() -> nn.Module:
    """The convolutions and the head, by shape."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, bias=False)]
    inputs = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            layers += [nn.Conv2d(inputs, width, 1, bias=False), nn.Conv2d(width, width, 3, bias=False)]
            layers += [nn.Conv2d(width, 4 * width, 1, bias=False)]
            if block == 0:
                layers.append(nn.Conv2d(inputs, 4 * width, 1, bias=False))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.Linear(2048, 1000))


def gpt2() -> nn.Module:
    """The linear layers of GPT-2 with 124 million parameters, without its head."""
    block = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]
    return nn.Sequential(*(nn.Linear(a, b) for _ in range(12) for a, b in block))


def factor_sides(layers: Sequence[Layer]) -> list[list[int]]:
    return [
        [n for b in layer.blocks if isinstance(b, KroneckerBlock) for n in (b.a, b.g)]
        for layer in layers
    ]  # fmt: skip


def modelled(name: str, model: nn.Module, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds that K-FAC adds to an average step, by part, and bytes a rank keeps."""
    _, layers = discover(model, None, Blocks())
    sides = factor_sides(layers)
    triangles = [4 * sum(map(packed_numel, own)) for own in sides]
    squares = [4 * sum(n * n for n in own) for own in sides]
    weights = 4 * sum(p.numel() for p in model.parameters())
    work = [inversion_cost(layer) for layer in layers]
    # U = G⁻¹ V A⁻¹: two products, 2 operations for each multiplication.
    apply = [2.0 * sum(g * g * a + g * a * a for a, g in zip(own[::2], own[1::2], strict=True)) for own in sides]
    rows = []
    for size in (1, 8, 64, 256, 1024):
        owner = owners(layers, size)
        holders = len(set(owner))

        def most(costs: Sequence[float], owner: list[int] = owner, size: int = size) -> float:
            return max(sum(c for c, own in zip(costs, owner, strict=True) if own == rank) for rank in range(size))

        hops = math.ceil(math.log2(size)) * options.latency
        share_sent = (size - 1) / size / options.bandwidth
        statistics = (2 * sum(triangles) * share_sent + 2 * hops) / options.factor_every
        for share in SHARES if size > 1 else SHARES[:1]:
            inverting = (sum(work) if share == "replicate" else most(work)) / options.flops / options.inverse_every
            sending = 0.0
            if share == "inverses":
                sending = (sum(triangles) * share_sent + holders * options.latency + hops) / options.inverse_every
            elif share == "gradients":
                sending = weights * share_sent + holders * options.latency + hops
            applying = (most(apply) if share == "gradients" else sum(apply)) / options.flops
            kept = 3 * sum(squares) if share != "gradients" else 2 * sum(squares) + most(squares)
            rows.append(
                {
                    "model": name,
                    "ranks": size,
                    "share": share if size > 1 else "–",
                    "statistics_ms": 1e3 * (statistics if size > 1 else 0.0),
                    "inverting_ms": 1e3 * inverting,
                    "applying_ms": 1e3 * applying,
                    "sending_ms": 1e3 * sending,
                    "total_ms": 1e3 * ((statistics if size > 1 else 0.0) + inverting + applying + sending),
                    "kept": kept,
                }
            )
    return rows


# ---- output ---------------------------------------------------------------------------------------------------------


def mib(count: float) -> str:
    return f"{count / 2**20:.2f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.distributed", description=__doc__)
    parser.add_argument("--bandwidth", type=float, default=25e9, help="bytes/s that a rank sends (default %(default)g)")
    parser.add_argument("--latency", type=float, default=10e-6, help="seconds of a message (default %(default)g)")
    parser.add_argument("--flops", type=float, default=10e12, help="operations/s of a rank (default %(default)g)")
    parser.add_argument("--factor-every", type=int, default=1)
    parser.add_argument("--inverse-every", type=int, default=10)
    parser.add_argument("--json", type=Path, default=Path("build/bench_distributed.json"), help="where the figures go")
    for name, kind in (("rank", int), ("size", int), ("store", str)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)  # of the processes started here
    options = parser.parse_args()
    if options.rank is not None:
        torch.set_num_threads(1)
        print(json.dumps(measure(options.rank, options.size, options.store)))
        return
    real = counted_table()
    print(f"CURVES autoencoder {'-'.join(map(str, WIDTHS))}: MiB given to collectives, and kept on the fullest rank\n")
    print(
        table(
            ["ranks", "share", "statistics", "inverses", "gradients", "calls", "curvature", "all tensors"],
            [
                [
                    str(row["ranks"]),
                    row["share"],
                    *(mib(row[key]) for key in ("statistics", "inverses", "gradients")),
                    ", ".join(f"{count} {name}" for name, count in row["calls"].items()) or "–",
                    *(mib(row[key]) for key in ("curvature", "tensors")),
                ]
                for row in real
            ],
        )
    )
    print(
        f"\nModel: {options.bandwidth / 1e9:g} GB/s, {options.latency * 1e6:g} µs a message, "
        f"{options.flops / 1e12:g} Tflop/s, factors every {options.factor_every}, inverses every "
        f"{options.inverse_every} steps; milliseconds a step\n"
    )
    keys = ("statistics_ms", "inverting_ms", "applying_ms", "sending_ms", "total_ms")
    models: list[dict[str, Any]] = []
    with torch.device("meta"):
        for name, make in (("ResNet-50", resnet50), ("GPT-2 124M", gpt2)):
            models += modelled(name, make(), options)
    print(
        table(
            ["model", "ranks", "share", "statistics", "inverting", "applying", "sending", "total", "kept, MiB"],
            [
                [row["model"], str(row["ranks"]), row["share"], *(f"{row[key]:.2f}" for key in keys), mib(row["kept"])]
                for row in models
            ],
        )
    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"torch": torch.__version__, "counted": real, "modelled": models}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
