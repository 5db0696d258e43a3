"""Supported modules: what makes up their part of the approximate Fisher matrix.

To support another kind of module, subclass `WeightLayer` or another class of ``base``, list the module types in
`kinds` and decorate it with `register`; docs/layers.md has an example. Notation: docs/algorithm.md.
"""

from __future__ import annotations

from . import attention, conv, embedding, linear, norm, recurrent
from .base import (
    Block,
    Inputs,
    KroneckerBlock,
    KroneckerLayer,
    Layer,
    Note,
    SquareSums,
    UnitBlock,
    UnitLayer,
    WeightLayer,
    register,
)  # fmt: skip
from .discovery import Blocks, Found, discover
from .linear import PooledLinearLayer

__all__ = [
    "Block",
    "Blocks",
    "Found",
    "Inputs",
    "KroneckerBlock",
    "KroneckerLayer",
    "Layer",
    "Note",
    "PooledLinearLayer",
    "SquareSums",
    "UnitBlock",
    "UnitLayer",
    "WeightLayer",
    "attention",
    "conv",
    "discover",
    "embedding",
    "linear",
    "norm",
    "recurrent",
    "register",
]
