"""Hugging Face Accelerate: ``prepare`` it like any optimizer. ``python -m examples.frameworks.with_accelerate``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_fast import KFAC
from kfac_fast.data import digits


def main(epochs: int = 3, mixed_precision: str = "bf16", micro_batches: int = 2, folder: str | None = None) -> float:
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=micro_batches)
    torch.manual_seed(0)
    data = digits()
    loader = DataLoader(TensorDataset(data.train_images, data.train_labels), batch_size=48, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = KFAC(model, lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader) // micro_batches)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 10.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    if folder is not None:
        accelerator.save_state(folder)
        accelerator.load_state(folder)
    with torch.no_grad():
        return float((model(data.test_images).argmax(1) == data.test_labels).float().mean())


if __name__ == "__main__":
    print(f"accuracy {main():.3f}")
