"""Ways in which backward passes come: in several parts, more than once, from other threads, or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from recompute import DOUBLE, Net, by_hand, exact, half_square, plain_factors, same
from torch import Tensor, nn

from kfac_fast import Categorical, Preconditioner
from kfac_fast.layers.linear import LinearLayer

needs_second_pass = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="torch 2.6 can't tell whether a graph may be used again; statistics come from the first backward pass",
)


@pytest.fixture(params=["shared", "own pass"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same test with statistics from the user's passes and from a pass of their own."""
    if request.param == "own pass":
        monkeypatch.setattr(LinearLayer, "needs_own_pass", True)
    return request.param


def samples(*sizes: int) -> list[Tensor]:
    return [torch.randn(n, 3, dtype=DOUBLE) for n in sizes]


def test_forward_without_backward_does_not_count() -> None:
    model = Net(nn.Tanh()).double()
    x = torch.randn(5, 3, dtype=DOUBLE)
    expected = plain_factors(model, x)
    pre = exact(model)
    with torch.no_grad():
        model(torch.randn(9, 3, dtype=DOUBLE))
    model(torch.randn(9, 3, dtype=DOUBLE))
    half_square(model(x)).backward()
    model(torch.randn(9, 3, dtype=DOUBLE))
    pre.step()
    assert torch.equal(pre.factors.running.data, expected)


def test_exceptions_leave_nothing_half_recorded() -> None:
    class Broken(Net):
        broken = False

        def forward(self, x: Tensor) -> Tensor:
            h = self.activation(self.first(x))
            if self.broken:
                raise KeyError("as asked")
            return self.last(h)

    model = Broken(nn.Tanh()).double()
    x = torch.randn(5, 3, dtype=DOUBLE)
    expected = plain_factors(model, x)
    pre = exact(model)
    model.broken = True
    with pytest.raises(KeyError):
        model(x)
    model.broken = False
    half_square(model(x)).backward()
    pre.step()
    assert torch.equal(pre.factors.running.data, expected)


def test_the_users_gradients_are_untouched() -> None:
    model = Net(nn.Tanh())
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    F.cross_entropy(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    for fisher in ("mc", "exact", "empirical"):
        pre = Preconditioner(model, fisher=fisher)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        pre.close()
        assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_accumulation_is_one_large_batch(kind: str) -> None:
    model, batches = Net(nn.Tanh()).double(), samples(5, 3, 8)
    pre = exact(model)
    for x, scale in zip(batches, (1 / 3, 7.0, 1e-6), strict=True):
        (scale * half_square(model(x))).backward()
    pre.step()
    assert same(pre, by_hand(model, batches))


def test_forward_passes_that_share_a_backward_pass(kind: str) -> None:
    model, (left, right) = Net(nn.Tanh()).double(), samples(5, 5)
    pre = exact(model)
    half_square(model(left) - model(right)).backward()
    pre.step()
    assert same(pre, by_hand(model, [left, right]))


def test_empirical_accumulation(kind: str) -> None:
    model, batches = Net(nn.Tanh()).double(), samples(6, 2)
    pre = exact(model, fisher="empirical")
    for x in batches:
        (half_square(model(x)) * len(x) / 8).backward()
    pre.step()
    assert same(pre, by_hand(model, batches, root=lambda y: [y]))


def test_empirical_own_pass_draws_the_same_dropout_mask(kind: str) -> None:
    dropout = nn.Dropout(0.5)
    model, (x,) = Net(dropout).double(), samples(50)
    pre = exact(model, fisher="empirical")
    torch.manual_seed(3)
    half_square(model(x)).backward()
    state = torch.get_rng_state()
    pre.step()
    torch.manual_seed(3)
    expected = by_hand(model, [x], root=lambda y: [y])
    assert torch.equal(state, torch.get_rng_state())
    assert same(pre, expected)


@needs_second_pass
def test_losses_on_different_terms_of_one_forward_pass(kind: str) -> None:
    model, (x,) = Net(nn.Tanh()).double(), samples(6)
    targets = torch.tensor([0, 1, 1, 0, 1, 0])
    pre = exact(model, likelihood="categorical")
    y = model(x)
    F.cross_entropy(y[:2], targets[:2]).backward(retain_graph=True)
    F.cross_entropy(y[:4], targets[:4]).backward(retain_graph=True)  # two of them a second time
    F.cross_entropy(y[4:], targets[4:]).backward()
    pre.step()
    assert same(pre, by_hand(model, [x], root=lambda y: list(Categorical().fisher_root(y))))


def test_two_losses_on_the_same_terms_count_once(kind: str) -> None:
    model, (x,) = Net(nn.Tanh()).double(), samples(6)
    pre = exact(model)
    y = model(x)
    half_square(y).backward(retain_graph=True)
    y.sum().backward()
    pre.step()
    assert same(pre, by_hand(model, [x]))


@needs_second_pass
def test_empirical_takes_one_backward_pass_per_forward_pass() -> None:
    model, (x,) = Net(nn.Tanh()).double(), samples(6)
    pre = exact(model, fisher="empirical")
    y = model(x)
    half_square(y).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="add up the losses first"):
        y.sum().backward()
    model.zero_grad()
    half_square(model(x)).backward()
    pre.step()
    assert same(pre, by_hand(model, [x], root=lambda y: [y]))


def test_a_backward_pass_to_some_parameters_only(kind: str) -> None:
    model, (x,) = Net(nn.Tanh()).double(), samples(6)
    pre = exact(model)
    torch.autograd.grad(half_square(model(x)), [model.last.weight])
    pre.step()
    assert same(pre, by_hand(model, [x]))


def test_examples_that_the_loss_leaves_out_are_not_loss_terms(kind: str) -> None:
    model, (x,) = Net(nn.Tanh()).double(), samples(6)
    pre = exact(model, likelihood="categorical")
    F.cross_entropy(model(x)[:4], torch.tensor([0, 1, 1, 0])).backward()
    pre.step()
    some = by_hand(model, [x[:4]], root=lambda y: list(Categorical().fisher_root(y)))
    assert same(pre, by_hand(model, [x])[:2] + some[2:])  # A is a mean over all rows


def test_a_loss_that_depends_on_no_output_is_no_statistics(kind: str) -> None:
    model, (x,) = Net(nn.Tanh()).double(), samples(6)
    pre = exact(model, likelihood="categorical")
    F.cross_entropy(model(x), torch.tensor([0, 1, 1, 0, 1, 0])).backward()
    pre.step()
    before = pre.factors.running.data.clone()
    (0 * model(x)).sum().backward()
    pre.step()
    assert torch.equal(pre.factors.running.data, before)
    assert int(pre.factors.updates[0]) == 1


def test_an_empty_batch(kind: str) -> None:
    model, (x,) = Net(nn.Tanh()).double(), samples(6)
    pre = exact(model)
    half_square(model(x)).backward()
    model(x[:0]).sum().backward()
    pre.step()
    assert same(pre, by_hand(model, [x]))
    model(x[:0]).sum().backward()
    pre.step()
    assert same(pre, by_hand(model, [x]))


class Trap(torch.autograd.Function):
    """The identity, with a backward pass that raises as long as it is set."""

    is_set = False

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        if Trap.is_set:
            raise KeyError("as asked")
        return gradient


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("place", ["below the outputs", "above the outputs", "between the layers"])
def test_a_backward_pass_that_raises_counts_for_nothing(kind: str, fisher: str, place: str) -> None:
    class Trapped(Net):
        def body(self, x: Tensor) -> Tensor:
            hidden = self.activation(self.first(Trap.apply(x) if place == "below the outputs" else x))
            return self.last(Trap.apply(hidden) if place == "between the layers" else hidden)

    model, (bad, good) = Trapped(nn.Tanh()).double(), samples(4, 6)
    bad.requires_grad_()
    pre = exact(model, fisher=fisher)
    Trap.is_set = True
    y = model(bad)
    loss = half_square(Trap.apply(y) if place == "above the outputs" else y)
    with pytest.raises(KeyError):
        loss.backward()
    Trap.is_set = False
    model.zero_grad()
    half_square(model(good)).backward()
    pre.step()
    assert same(pre, by_hand(model, [good], root=(lambda y: [y]) if fisher == "empirical" else None))


def test_an_error_at_the_last_micro_batch_drops_the_step(kind: str) -> None:
    class Trapped(Net):
        def body(self, x: Tensor) -> Tensor:
            return self.last(Trap.apply(self.activation(self.first(x))))

    model, (first, second) = Trapped(nn.Tanh()).double(), samples(4, 6)
    pre = exact(model)
    half_square(model(first)).backward()
    Trap.is_set = True
    with pytest.raises(KeyError):
        half_square(model(second)).backward()
    Trap.is_set = False
    pre.step()
    assert not pre.factors.updates.any()
    half_square(model(second)).backward()
    pre.step()
    assert same(pre, by_hand(model, [second]))


def test_create_graph_is_refused(kind: str) -> None:
    model, (x,) = Net(nn.Tanh()).double(), samples(5)
    pre = exact(model)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(half_square(model(x)), list(model.parameters()), create_graph=True)
    half_square(model(x)).backward()
    pre.step()
    assert same(pre, by_hand(model, [x]))


def test_functorch_transforms_are_not_looked_at(kind: str) -> None:
    model, (x,) = Net(nn.Tanh()).double(), samples(5)
    pre = exact(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return half_square(torch.func.functional_call(model, parameters, (x,)))

    torch.func.grad(loss)(parameters, x)
    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x.unsqueeze(1))
    torch.func.jvp(model, (x,), (x,))
    torch.func.jacrev(model)(x)
    other = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    loss(other, x).backward()  # other parameters, no transform
    assert not pre.factors.has_pending
    half_square(model(x)).backward()
    pre.step()
    assert same(pre, by_hand(model, [x]))


def in_thread(function: Callable[[], object]) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures, failures


def test_backward_from_another_thread(kind: str) -> None:
    model, batches = Net(nn.Tanh()).double(), samples(5, 4)
    pre = exact(model)
    in_thread(half_square(model(batches[0])).backward)
    in_thread(lambda: half_square(model(batches[1])).backward())
    pre.step()
    assert same(pre, by_hand(model, batches))


def test_forward_passes_of_two_threads_do_not_mix(kind: str) -> None:
    class Meeting(Net):
        """Both threads are inside at the same time."""

        def body(self, x: Tensor) -> Tensor:
            barrier.wait(10)
            hidden = self.activation(self.first(x))
            barrier.wait(10)
            return self.last(hidden)

    model, batches = Meeting(nn.Tanh()).double(), samples(5, 4)
    pre = exact(model)
    barrier = threading.Barrier(2)
    outputs: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda i=i, x=x: outputs.__setitem__(i, model(x))) for i, x in enumerate(batches)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    barrier = threading.Barrier(1)
    for y in outputs.values():
        half_square(y).backward()
    pre.step()
    assert same(pre, by_hand(model, batches))


def test_batches_from_worker_processes() -> None:
    model, (x,) = Net(nn.Tanh()).double(), samples(6)
    pre = exact(model)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2, num_workers=1)
    for (batch,) in loader:
        half_square(model(batch)).backward()
    pre.step()
    assert same(pre, by_hand(model, list(x.split(2))))
