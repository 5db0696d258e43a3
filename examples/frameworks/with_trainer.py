"""The Trainer of transformers: ``optimizers=(optimizer, None)``. ``python -m examples.frameworks.with_trainer``.

A small BERT, made from its configuration, learns which of two tokens a sentence has more of.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from kfac_fast import KFAC


class Sentences(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int, seed: int) -> None:
        self.tokens = torch.randint(8, (count, 12), generator=torch.Generator().manual_seed(seed))
        self.labels = ((self.tokens == 1).sum(1) > (self.tokens == 2).sum(1)).long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def make(folder: str, steps: int, **options: Any) -> Trainer:
    set_seed(0)
    config = BertConfig(
        vocab_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=64,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", "logging_strategy": "no", **options},
    )
    # The model returns .logits, which is found without help; the Trainer makes the schedule.
    return Trainer(model, arguments, train_dataset=Sentences(2048, seed=0), optimizers=(KFAC(model, lr=0.1), None))


def accuracy(trainer: Trainer) -> float:
    test = Sentences(256, seed=1)
    trainer.model.eval()
    with torch.no_grad():
        return float((trainer.model(input_ids=test.tokens).logits.argmax(1) == test.labels).float().mean())


def main(steps: int = 60) -> float:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(folder, steps)
        trainer.train()
        return accuracy(trainer)


if __name__ == "__main__":
    print(f"accuracy {main():.3f}")
