"""The examples inside the training loops of others, and resuming there: the extras "frameworks" and "timm"."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

# Their own warnings at import and at work; what this package warns about is tested elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore")


def declare_operators_of_torchvision() -> None:
    """An index serves torchvision for CUDA. Beside a torch without, its operators do not load, and its import fails on
    the two that it describes for the compiler, also where others import it for timm or of themselves. None uses them.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def example(framework: str, *packages: str) -> Any:
    declare_operators_of_torchvision()
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            pytest.skip(f"{package} can't be imported: {error} (pip install kfac-fast[frameworks,timm])")
    return importlib.import_module(f"examples.frameworks.with_{framework}")


def test_lightning() -> None:
    assert example("lightning", "pytorch_lightning").main() > 0.93


def test_lightning_resumes_bit_for_bit(tmp_path: Path) -> None:
    module = example("lightning", "pytorch_lightning")
    lightning = module.lightning

    def fit(epochs: int, checkpoint: str | None = None) -> Any:
        lightning.seed_everything(1, verbose=False)
        data = torch.utils.data.DataLoader(module.loaders()[0].dataset, batch_size=256)
        digits = module.Digits()
        digits.configure_optimizers = lambda: module.KFAC(digits.model, lr=0.1)  # a schedule would be another one
        run = module.trainer(epochs, default_root_dir=tmp_path, enable_checkpointing=True)
        run.fit(digits, data, ckpt_path=checkpoint)
        run.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return digits

    whole = fit(3)
    fit(1)
    resumed = fit(3, str(tmp_path / "1.ckpt"))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_accelerate(tmp_path: Path) -> None:
    """With bfloat16 autocast, accumulation over two micro-batches, clipping, and saving and loading."""
    assert example("accelerate", "accelerate").main(folder=str(tmp_path)) > 0.93


def test_trainer_of_transformers() -> None:
    assert example("trainer", "transformers", "accelerate").main() > 0.9


def test_trainer_of_transformers_resumes_bit_for_bit(tmp_path: Path) -> None:
    module = example("trainer", "transformers", "accelerate")

    def train(folder: str, resume: str | None = None) -> Any:
        trainer = module.make(
            str(tmp_path / folder), 6, save_strategy="steps", save_steps=3, lr_scheduler_type="constant"
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole = train("whole")
    resumed = train("resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_timm() -> None:
    assert example("timm", "torchvision", "timm").main() > 0.9
