"""The pictures show the figures they are given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")
import matplotlib

from kfac_fast import KFAC, plot

matplotlib.use("Agg")


@pytest.fixture
def trained() -> KFAC:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = KFAC(model)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(40, 6)), torch.randint(3, (40,))).backward()
        optimizer.step()
    return optimizer


def test_history_bridges_steps_without_the_figure() -> None:
    axes = plot.history([{"loss": 4.0}, {"loss": 2.0, "ratio": -0.5}, {"loss": 1.0}], ["loss"])
    assert axes.lines[0].get_xydata().tolist() == [[1, 4], [2, 2], [3, 1]]
    assert axes.get_yscale() == "log"
    axes = plot.history([{"loss": 4.0}, {"loss": 2.0, "ratio": -0.5}], ["ratio"])
    assert axes.lines[0].get_xydata().tolist() == [[2, -0.5]]
    assert axes.get_yscale() == "linear"


def test_history_names_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"names has 'lost'.*\['loss'\]"):
        plot.history([{"loss": 1.0}], ["lost"])


@pytest.mark.parametrize(("side", "sizes"), [("A", [7, 6]), ("G", [5, 3])])
def test_spectra_are_those_of_the_factors(trained: KFAC, side: str, sizes: list[int]) -> None:
    lines = plot.spectra(trained, side).lines
    assert [len(line.get_ydata()) for line in lines] == sizes
    factors = trained.preconditioner.factors
    first = factors.running[0 if side == "A" else factors.count].double()
    largest = torch.linalg.matrix_norm(first, 2) / (first.trace() / len(first))  # singular values, another routine
    assert lines[0].get_ydata()[0] == pytest.approx(float(largest), rel=1e-6)


def test_condition_has_a_bar_for_every_factor(trained: KFAC) -> None:
    axes = plot.condition(trained)
    heights = [bar.get_height() for bar in axes.patches]
    assert len(heights) == 4
    a = trained.preconditioner.factors.running[0].double()
    assert heights[0] == pytest.approx(float(torch.linalg.cond(a)), rel=1e-5)


def test_wrong_use_is_refused(trained: KFAC) -> None:
    with pytest.raises(ValueError, match="side must be 'A' or 'G', got 'B'"):
        plot.spectra(trained, "B")
    with pytest.raises(ValueError, match="make a step first"):
        plot.condition(KFAC(nn.Linear(2, 2)))
