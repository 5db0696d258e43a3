"""Lightning: ``configure_optimizers`` is all there is. ``python -m examples.frameworks.with_lightning``."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_fast import KFAC
from kfac_fast.data import digits


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self.model(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> Any:
        # The module that training_step calls, whose outputs the loss is computed from.
        optimizer = KFAC(self.model, lr=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.optimizers(use_pl_optimizer=False).stats())


def loaders() -> tuple[DataLoader, DataLoader]:
    data = digits()
    train = TensorDataset(data.train_images, data.train_labels)
    test = TensorDataset(data.test_images, data.test_labels)
    return DataLoader(train, batch_size=96, shuffle=True), DataLoader(test, batch_size=len(test))


def trainer(epochs: int, **options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "gradient_clip_val": 10.0, **options},
    )


def main(epochs: int = 3) -> float:
    lightning.seed_everything(0, verbose=False)
    train, test = loaders()
    module = Digits()
    run = trainer(epochs)
    run.fit(module, train)
    (result,) = run.test(module, test, verbose=False)
    return result["accuracy"]


if __name__ == "__main__":
    print(f"accuracy {main():.3f}")
