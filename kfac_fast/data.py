"""Data and models of the demo and the benchmarks: CURVES, the handwritten digits, the CURVES autoencoder."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import warnings
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

SIDE = 28  # pixels of a CURVES image, each way
CURVES_LAYERS = (SIDE * SIDE, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, SIDE * SIDE)

_CURVES_VERSION = 1  # raise it whenever a change alters a pixel: caches of other versions are then made anew
_MARGIN = 2.0  # pixels between the frame and the area the points are drawn from: the stroke stays in sight
_STROKE = 2.25  # pixels; covers about 8 % of the image
_SEGMENTS = 16  # straight pieces per curve: most stay within 0.04 pixels of it, all within 0.13
_CHUNK = 128  # images drawn at once: the temporaries then fit a core's cache
_DIGITS_TEST = 360  # of the 1,797 digits: one in five

Model = TypeVar("Model", bound=nn.Module)


class Curves(NamedTuple):
    """Images of CURVES, float32 in [0, 1], flattened row by row."""

    train: Tensor  # [n_train, 784]
    test: Tensor  # [n_test, 784]


class Digits(NamedTuple):
    """Handwritten digits: images float32 in [0, 1], flattened row by row; labels int64 in 0…9."""

    train_images: Tensor  # [1437, 64]
    train_labels: Tensor  # [1437]
    test_images: Tensor  # [360, 64]
    test_labels: Tensor  # [360]


def curves(n_train: int = 20_000, n_test: int = 10_000, seed: int = 0, *, cache: bool = True) -> Curves:
    """28×28 images of a smooth curve through three random points.

    A data set in the manner of CURVES (Hinton & Salakhutdinov 2006), which second-order methods are compared on
    (Martens 2010; Martens & Grosse 2015, sec. 13). It is drawn here, not copied, so losses are comparable between runs
    on this data, and only roughly with those in the papers.

    The three points are uniform over the image less a margin of two pixels. The curve is the parabola that passes
    through them in order, its parameter advancing with the square root of the distance between neighbours, which
    keeps it from swinging far past them. A pixel's ink is the share of it that a 2.25-pixel-wide stroke covers,
    judged by the distance of the pixel's centre from the curve.

    Reproducible: float64 throughout, operations whose rounding IEEE 754 prescribes, then rounding to 256 grey levels.
    Training and test images come from separate random streams, so the first n images are the same whatever the sizes.

    Args:
        n_train: Number of training images, at least 0.
        n_test: Number of test images, at least 0.
        seed: Seed of both streams, 0 or more.
        cache: Keep the images in ``$XDG_CACHE_HOME/kfac_fast`` (by default ``~/.cache/kfac_fast``) and read them from
            there next time. A damaged file or one of another version is replaced.

    Returns:
        ``Curves(train=[n_train, 784], test=[n_test, 784])``.

    Raises:
        TypeError: A number is not an int.
        ValueError: A number is negative.
    """
    for name, value in (("n_train", n_train), ("n_test", n_test), ("seed", seed)):
        _check_int(name, value, minimum=0)
    key = [_CURVES_VERSION, n_train, n_test, seed]
    path = _cache_folder() / f"curves-{n_train}-{n_test}-seed{seed}.pt"
    levels = _load(path, key) if cache else None
    if levels is None:
        levels = [_draw_curves(n_train, 2 * seed), _draw_curves(n_test, 2 * seed + 1)]
        if cache:
            _save(path, key, levels)
    return Curves(*(grey.to(torch.float32).div_(255) for grey in levels))


def digits() -> Digits:
    """scikit-learn's 8×8 handwritten digits: 1,437 to train on and 360 to test on, always the same ones.

    Returns:
        ``Digits(train_images=[1437, 64], train_labels=[1437], test_images=[360, 64], test_labels=[360])``.

    Raises:
        ImportError: scikit-learn, an optional dependency, is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits() reads scikit-learn's data: pip install kfac-fast[demo]") from error
    grey, label = load_digits(return_X_y=True)
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(0))
    images = torch.as_tensor(grey, dtype=torch.float32).div(16)[order]
    labels = torch.as_tensor(label, dtype=torch.int64)[order]
    train, test = slice(_DIGITS_TEST, None), slice(None, _DIGITS_TEST)
    return Digits(images[train], labels[train], images[test], labels[test])


def curves_autoencoder(*, incoming: int = 15, generator: torch.Generator | None = None) -> nn.Sequential:
    """The CURVES autoencoder, 784-400-200-100-50-25-6-25-50-100-200-400-784, sparsely initialised.

    Its units are logistic, except that the 6 of the code layer are linear (Hinton & Salakhutdinov 2006; Martens &
    Grosse 2015, sec. 13). The outputs are logits: train it on ``binary_cross_entropy_with_logits`` summed over the
    784 pixels.

    Args:
        incoming: As in ``sparse_init_``.
        generator: Source of the initial weights; torch's global one by default.

    Returns:
        A model of images ``[N, 784]`` to logits ``[N, 784]``.
    """
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(CURVES_LAYERS):
        layers.append(nn.Linear(d_in, d_out))
        if d_out != min(CURVES_LAYERS):
            layers.append(nn.Sigmoid())
    return sparse_init_(nn.Sequential(*layers[:-1]), incoming=incoming, generator=generator)


@torch.no_grad()
def sparse_init_(model: Model, incoming: int = 15, generator: torch.Generator | None = None) -> Model:
    """Initialises every ``nn.Linear`` of a model so that each unit hears only a few others (Martens 2010, sec. 5).

    Each unit gets ``incoming`` weights, to inputs chosen at random, from the standard normal distribution; its other
    weights and its bias are 0. A unit with fewer inputs than that gets a weight to each. What saturates a unit is then
    independent of the width of the layer below.

    Args:
        model: Its linear layers are written in place, in the order of ``model.modules()``; it must have one.
        incoming: Non-zero weights per unit, at least 1.
        generator: Source of the weights, on the CPU; torch's global one by default.

    Returns:
        ``model``.

    Raises:
        TypeError: ``incoming`` is not an int.
        ValueError: ``incoming`` is below 1, or ``model`` has no linear layer.
    """
    _check_int("incoming", incoming, minimum=1)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise ValueError(f"model must have at least one nn.Linear, got {type(model).__name__} without any")
    for layer in layers:
        d_out, d_in = layer.weight.shape
        n = min(incoming, d_in)
        # The n smallest of d_in random keys are n inputs chosen without replacement.
        chosen = torch.rand(d_out, d_in, generator=generator, dtype=torch.float64).topk(n, largest=False).indices
        values = torch.randn(d_out, n, generator=generator, dtype=torch.float64)
        layer.weight.copy_(torch.zeros(d_out, d_in, dtype=torch.float64).scatter_(1, chosen, values))
        if layer.bias is not None:
            layer.bias.zero_()
    return model


def _draw_curves(n: int, seed: int) -> Tensor:
    """``[n, 784]`` uint8 grey levels of ``n`` random curves."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(n, 3, 2, generator=generator, dtype=torch.float64)
    points = _MARGIN + (SIDE - 2 * _MARGIN) * unit
    images = torch.empty(n, SIDE * SIDE, dtype=torch.uint8)
    for image, chunk in zip(images.split(_CHUNK), points.split(_CHUNK), strict=True):
        distance = _distance_to_polyline(_smooth_curve(chunk))
        ink = ((_STROKE + 1) / 2 - distance).clamp_(0, 1)
        image.copy_(ink.mul_(255).round_().flatten(1))
    return images


def _smooth_curve(points: Tensor) -> Tensor:
    """``[17, N, 2]`` nodes along the parabola through ``[N, 3, 2]`` points."""
    first, middle, last = points.unbind(1)
    # Chords below a pixel count as a pixel, so that points that nearly coincide divide by no small number.
    start, end = (
        chord.square().sum(1, keepdim=True).sqrt().clamp_min(1).sqrt() for chord in (middle - first, last - middle)
    )
    at_middle = start / (start + end)
    slope = (middle - first) / at_middle
    bend = (last - first - slope) / (1 - at_middle)
    t = (torch.arange(_SEGMENTS + 1, dtype=torch.float64) / _SEGMENTS).view(-1, 1, 1)
    return first + t * slope + t * (t - at_middle) * bend


def _distance_to_polyline(nodes: Tensor) -> Tensor:
    """``[N, 28, 28]`` distances of the pixels' centres from the line through ``[K, N, 2]`` nodes (x, y)."""
    centre = torch.arange(SIDE, dtype=torch.float64) + 0.5
    nearest = torch.full((nodes.shape[1], SIDE, SIDE), torch.inf, dtype=torch.float64)
    for a, b in pairwise(nodes):
        along = b - a
        scaled = along / along.square().sum(1, keepdim=True).clamp_min(1e-12)  # two equal nodes: the distance from one
        x, y = (centre - a[:, :1])[:, None, :], (centre - a[:, 1:])[:, :, None]
        foot = (x * scaled[:, 0, None, None] + y * scaled[:, 1, None, None]).clamp_(0, 1)
        dx, dy = x - foot * along[:, 0, None, None], y - foot * along[:, 1, None, None]
        torch.minimum(nearest, dx.square_() + dy.square_(), out=nearest)
    return nearest.sqrt_()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification tells programs to ignore a relative path.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "kfac_fast"


def _load(path: Path, key: list[int]) -> list[Tensor] | None:
    """The images kept at ``path``, or None if there are none, they are damaged, or they belong to another key."""
    try:
        digest, content = path.read_bytes().split(b"\n", 1)
    except (OSError, ValueError):
        return None
    # The digest comes first: what passes it was written by _save, so unpickling meets no surprise.
    if digest != hashlib.sha256(content).hexdigest().encode():
        return None
    stored = torch.load(io.BytesIO(content), weights_only=True)
    return stored["images"] if stored["key"] == key else None


def _save(path: Path, key: list[int], images: list[Tensor]) -> None:
    """Keeps the images at ``path``. Another process sees the whole file or none of it."""
    buffer = io.BytesIO()
    torch.save({"key": key, "images": images}, buffer)
    content = buffer.getvalue()
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        os.replace(temporary, path)
    except OSError as error:
        warnings.warn(f"the images are not kept for next time: {error}", RuntimeWarning, stacklevel=3)
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _check_int(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {name}={value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {name}={value}")
