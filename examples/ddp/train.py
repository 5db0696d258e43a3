"""Handwritten digits on several ranks.

    torchrun --standalone --nproc-per-node 2 examples/ddp/train.py

Each rank has every second example; rank 0 evaluates and saves. With one process, without torchrun, it runs as well.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from kfac_fast import KFAC


def data() -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1440], order[1440:]
    return TensorDataset(x[train], y[train]), (x[test], y[test])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64, help="over all ranks")
    parser.add_argument("--checkpoint", type=Path, help="saved by rank 0, loaded by all if it is there")
    options = parser.parse_args()

    if "RANK" in os.environ:  # torchrun's
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    several = dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    model = DistributedDataParallel(net) if several else net
    optimizer = KFAC(model)

    if options.checkpoint and options.checkpoint.exists():
        weights, state = torch.load(options.checkpoint, map_location=device, weights_only=True)
        net.load_state_dict(weights)
        optimizer.load_state_dict(state)

    train, (x_test, y_test) = data()
    sampler = DistributedSampler(train, ranks, rank, drop_last=True)
    loader = DataLoader(train, options.batch // ranks, sampler=sampler, drop_last=True)
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(device)), y.to(device)).backward()
            optimizer.step()
        if rank == 0:
            with torch.no_grad():
                right = net(x_test.to(device)).argmax(1).cpu() == y_test
            print(f"epoch {epoch + 1}: {100 * right.float().mean():.1f} % of test digits", flush=True)

    if options.checkpoint and rank == 0:
        torch.save((net.state_dict(), optimizer.state_dict()), options.checkpoint)
    if several:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
