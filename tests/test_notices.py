"""Layers whose curvature can't be whole are named, once; what hides it from the statistics is refused."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from recompute import exact, half_square
from torch import Tensor, nn

from kfac_fast import KFAC, KFACWarning
from kfac_fast.layers.linear import LinearLayer


@pytest.fixture(params=["shared", "own pass"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same test with statistics from the user's passes and from a pass of their own."""
    if request.param == "own pass":
        monkeypatch.setattr(LinearLayer, "needs_own_pass", True)
    return request.param


def warnings_of(model: nn.Module, step: Callable[[], Tensor], **options) -> list[str]:
    """What three steps of training say about the model."""
    optimizer = KFAC(model, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", KFACWarning)
        for _ in range(3):
            optimizer.zero_grad()
            step().backward()
            optimizer.step()
    return [str(w.message) for w in caught if issubclass(w.category, KFACWarning)]


class Heads(nn.Module):
    """An autoencoder with a classifier on its code."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 3)
        self.decoder = nn.Linear(3, 6)
        self.classifier = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        code = torch.tanh(self.encoder(x))
        return {"image": self.decoder(code), "logits": self.classifier(code)}

    def loss(self) -> Tensor:
        x = torch.randn(8, 6)
        result = self(x)
        return F.cross_entropy(result["logits"], torch.randint(4, (8,))) + F.mse_loss(result["image"], x)


def test_a_head_that_the_outputs_do_not_depend_on_is_named(kind: str) -> None:
    model = Heads()
    (message,) = warnings_of(model, model.loss)
    assert "have a gradient: decoder. They take the plain gradient" in message
    assert "the outputs do not depend on them" in message


def test_the_empirical_fisher_serves_every_head() -> None:
    model = Heads()
    pre = exact(model, likelihood="categorical", fisher="empirical")
    model.loss().backward()
    pre.step()
    assert bool(pre.factors.updates.all())
    assert pre.capture.own_pass.count == 0


def test_no_passes_are_made_again_and_again_for_what_none_can_show() -> None:
    model = Heads()
    pre = exact(model, likelihood="categorical")
    for step in range(3):
        model.zero_grad()
        model.loss().backward()
        with pytest.warns(KFACWarning, match="decoder") if step == 0 else contextlib.nullcontext():
            pre.step()
    assert pre.capture.own_pass.count == 1


class Language(nn.Module):
    """A head that uses the embedding's weight: as a module, or where no module shows it."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 5)
        self.body = nn.Linear(5, 5)
        self.norm = nn.RMSNorm(5)
        self.head = nn.Linear(5, 7, bias=False) if head == "module" else None
        if self.head is not None:
            self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.body(self.body(self.tokens(x)))))
        return hidden @ self.tokens.weight.T if self.head is None else self.head(hidden)

    def loss(self) -> Tensor:
        x = torch.randint(7, (6, 4))
        return F.cross_entropy(self(x).flatten(0, 1), x.flatten())


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_weight_that_is_used_outside_of_its_module_too_is_named(fisher: str, kind: str) -> None:
    model = Language("none")
    (message,) = warnings_of(model, model.loss, fisher=fisher)
    assert "leaves out: tokens. A head that shares" in message
    model = Language("module")
    assert not warnings_of(model, model.loss, fisher=fisher)


def test_gradients_that_the_model_takes_itself_are_noticed() -> None:
    class Forces(nn.Module):
        """Of a learned energy."""

        def __init__(self) -> None:
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    model = Forces()
    messages = warnings_of(model, lambda: half_square(model(torch.randn(5, 3))), likelihood="gaussian")
    assert any("leaves out: energy.0" in message for message in messages)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        warnings_of(model, lambda: half_square(model(torch.randn(5, 3))), likelihood="gaussian", fisher="empirical")


@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_outputs_that_a_function_computes_are_refused(fisher: str) -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(a), self.net(b)

    model = Siamese()
    pre = exact(model, fisher=fisher, outputs=lambda pair: torch.cat(pair))
    with pytest.raises(ValueError, match=r"outputs= computed a new tensor.*let the model return them as one"):
        model(torch.randn(4, 3), torch.randn(4, 3))
    pre.close()
    pre = exact(model)
    with pytest.raises(TypeError, match=r"outputs=.* let the model return them as one"):
        model(torch.randn(4, 3), torch.randn(4, 3))
    pre.close()


def test_a_model_whose_examples_depend_on_each_other_needs_the_whole_batch() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return adjacency @ self.layer(x)

    model = Graph()
    pre = exact(model, factor_fraction=0.5)
    for adjacency in (torch.eye(8), torch.eye(8).to_sparse()):
        with pytest.raises(
            RuntimeError, match=r"did not take the part .*factor_fraction=0\.5.* pass factor_fraction=1\."
        ):
            half_square(model(torch.randn(8, 3), adjacency)).backward()
    pre.close()
    pre = exact(model)
    half_square(model(torch.randn(8, 3), torch.eye(8))).backward()
    pre.step()
    assert bool(pre.factors.updates.all())


def test_examples_that_are_not_entries_of_a_tensor_need_the_whole_batch() -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, sequences: list[Tensor]) -> Tensor:
            return torch.stack([self.layer(x).mean(0) for x in sequences])

    model, batch = Ragged(), [torch.randn(length, 3) for length in range(1, 9)]
    pre = exact(model, factor_fraction=0.5)
    with pytest.raises(RuntimeError, match=r"pass factor_fraction=1\..* there are 8 outputs for 4 examples"):
        half_square(model(batch)).backward()
    pre.close()
    pre = exact(model)
    half_square(model(batch)).backward()
    pre.step()
    assert bool(pre.factors.updates.all())


def test_sparse_inputs_have_the_factors_of_dense_ones() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double(), torch.eye(6, 4).double()
    found = []
    for inputs in (x, x.to_sparse()):
        pre = exact(model)
        half_square(model(inputs)).backward()
        pre.step()
        pre.close()
        found.append(pre.factors.running.data)
    assert torch.equal(*found)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_one_number_per_example_has_to_be_a_vector(likelihood: str) -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    pre = exact(model, likelihood=likelihood)
    with pytest.raises(ValueError, match=r"got \(5,\); .* as \[N, 1\] and squeeze it in the loss"):
        model(torch.randn(5, 3))
    pre.close()


def test_lazy_modules_have_to_be_called_first() -> None:
    model = nn.Sequential(nn.LazyConv1d(4, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"lazy modules .* call it once"):
        KFAC(model)
    model(torch.randn(2, 3, 6))
    assert {row.kind for row in KFAC(model).report()} == {"ConvLayer", "LinearLayer"}
