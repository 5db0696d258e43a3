"""The loop of timm's train script: its model, loss scaler, schedule and weight average around KFAC.

``python -m examples.frameworks.with_timm``
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler

from kfac_fast import KFAC
from kfac_fast.data import digits


def main(epochs: int = 4) -> float:
    torch.manual_seed(0)
    data = digits()
    images = data.train_images.view(-1, 1, 8, 8)
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1, channels=(16, 16, 32, 32), stem_width=8)
    optimizer = KFAC(model, lr=0.3, kl_clip=1e-2)
    average = ModelEmaV3(model, decay=0.9)
    scaler = NativeScaler(device="cpu")
    steps = len(images) // 96
    schedule, epochs = create_scheduler_v2(
        optimizer, "cosine", num_epochs=epochs, updates_per_epoch=steps, step_on_epochs=False
    )
    updates = 0
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(images))[: steps * 96].split(96):
            loss = F.cross_entropy(model(images[batch]), data.train_labels[batch])
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=10.0, parameters=model.parameters())
            updates += 1
            average.update(model, step=updates)
            schedule.step_update(num_updates=updates, metric=float(loss.detach()))
    model.eval()
    with torch.no_grad():
        return float((model(data.test_images.view(-1, 1, 8, 8)).argmax(1) == data.test_labels).float().mean())


if __name__ == "__main__":
    print(f"accuracy {main():.3f}")
