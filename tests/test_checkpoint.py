"""Saving and resuming: bit for bit, atomically, into other models, and through torch's own checkpoint tools."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from kfac_fast import KFAC, Adaptive


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, groups=2), nn.Flatten(), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)
    ).to(dtype)


def model_and_optimizer(dtype: torch.dtype = torch.float32, **options) -> tuple[nn.Module, KFAC]:
    model = small_model(dtype)
    return model, KFAC(model, **{"factor_every": 2, "inverse_every": 3, **options})


def train(model: nn.Module, optimizer: KFAC, steps: range) -> list[Tensor]:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 6, generator=generator).to(next(model.parameters()).dtype)
        y = torch.randint(3, (16,), generator=generator)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return [p.detach().clone() for p in model.parameters()]


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def flat(value: object, path: str = "") -> dict[str, object]:
    """Every leaf of nested dicts and lists, by its path."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in flat(part, f"{path}/{key}").items()}
    return {path: value}


def same(one: dict, two: dict) -> bool:
    a, b = flat(one), flat(two)
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, Tensor) else v == b[k] for k, v in a.items()
    )


KINDS = {
    "fixed": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "fraction": {"factor_fraction": 0.25},
    "no momentum": {"momentum": 0.0},
    "adaptive": {"adaptive": Adaptive(averaging=0.9, t1=2), "damping": 0.1, "factor_every": 1},
}


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_exact_at_any_step(stop: int, kind: str) -> None:
    """Between updates of factors and of inverses too; the sampler goes on where it was."""
    model, optimizer = model_and_optimizer(**KINDS[kind])
    expected = train(model, optimizer, range(10))
    last = optimizer.state_dict()
    model, optimizer = model_and_optimizer(**KINDS[kind])
    train(model, optimizer, range(stop))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    model, optimizer = model_and_optimizer(**KINDS[kind])
    model.load_state_dict(saved["model"])
    assert optimizer.load_state_dict(saved["optimizer"]) == ([], [])
    assert same(optimizer.state_dict(), saved["optimizer"])
    assert all(torch.equal(p, q) for p, q in zip(train(model, optimizer, range(stop, 10)), expected, strict=True))
    assert same(optimizer.state_dict(), last)


def test_statistics_of_a_step_that_was_not_made_are_not_saved() -> None:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(2))
    before = optimizer.state_dict()
    F.cross_entropy(model(torch.randn(16, 6)), torch.randint(3, (16,))).backward()
    assert same(before, optimizer.state_dict())


def test_state_is_plain_per_parameter_and_in_float32() -> None:
    model, optimizer = model_and_optimizer(torch.bfloat16)
    train(model, optimizer, range(3))
    state = optimizer.state_dict()
    names = [name for name, _ in model.named_parameters()]
    assert state["param_groups"][0]["param_names"] == names
    assert list(state["state"]) == list(range(len(names)))
    for leaf in flat(state).values():
        assert type(leaf) in (Tensor, int, float, bool, str, type(None))
    assert state["state"][4]["a_factor"].dtype == torch.float32
    assert state["state"][4]["momentum_buffer"].dtype == torch.float32
    assert state["state"][2]["momentum_buffer"].dtype == torch.float32
    optimizer.load_state_dict(state)
    assert optimizer.state[model[5].weight]["momentum_buffer"].dtype == torch.float32
    assert all(entry["step"] == 3 for entry in optimizer.state.values())


def test_state_is_a_copy() -> None:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    train(model, optimizer, range(2, 5))
    old = flat(before)
    for key, value in flat(state).items():
        if isinstance(value, Tensor) and not key.endswith("momentum_buffer"):
            assert torch.equal(value, old[key]), key


def test_state_is_complete_before_the_first_step() -> None:
    """Sharded checkpoints are loaded into the tensors of a fresh optimizer; nothing may be missing there."""
    for options in (KINDS["fixed"], KINDS["no momentum"], KINDS["adaptive"]):
        model, optimizer = model_and_optimizer(**options)
        fresh = flat(optimizer.state_dict())
        train(model, optimizer, range(3))
        assert fresh.keys() == flat(optimizer.state_dict()).keys()


# ---- what does not fit ----------------------------------------------------------------------------------------------


def spoiled(state: dict, how: str) -> tuple[dict, str]:
    """A checkpoint that can't be loaded, and what is said about it."""
    layer = state["state"][4]
    if how == "truncated layer":
        del layer["g_inverse"]
        return state, "state_dict has no 'g_inverse' for layer 5"
    if how == "shape":
        layer["a_factor"] = torch.zeros(1, 4, 4)
        return state, r"'a_factor' of shape \(1, 4, 4\) for layer 5, expected \(1, 9, 9\)"
    if how == "no data":
        layer["a_factor"] = layer["a_factor"].to("meta")
        return state, r"'a_factor' without data \(device meta\) for layer 5"
    if how == "parameter too many":
        state["state"][9] = {"momentum_buffer": torch.zeros(3)}
        return state, r"state for parameters \['9'\], which are not here"
    if how == "parameter too few":
        del state["state"][2]
        return state, "state_dict has no state for 3.weight"
    if how == "momentum shape":
        state["state"][2]["momentum_buffer"] = torch.zeros(3)
        return state, "'momentum_buffer' of shape .* for 3.weight"
    if how == "momentum of one missing":
        del state["state"][2]["momentum_buffer"]
        return state, "no 'momentum_buffer' for 3.weight"
    if how == "no counters":
        state["state"][0] = {key: value for key, value in state["state"][0].items() if not key.startswith("run/")}
        return state, "state_dict has no .*'sampler'.*not of a KFAC"
    if how == "counter missing":
        del state["state"][0]["run/inversions"]
        return state, "state_dict has no 'inversions'"
    if how == "other approximation":
        del state["state"][0]["run/approximation/block_diagonal"]
        state["state"][0]["run/approximation/tridiagonal"] = True
        return state, "state_dict is of approximation='tridiagonal', the optimizer has approximation='block_diagonal'"
    if how == "option missing":
        del state["param_groups"][0]["kl_clip"]
        return state, "state_dict has no 'kl_clip' in group 0"
    if how == "option out of range":
        state["param_groups"][0]["damping"] = -1.0
        return state, "damping must be a number > 0, got damping=-1.0"
    if how == "counter that is none":
        state["state"][0]["run/step"] = "three"
        return state, "must have a number as 'step', got 'three'"
    if how == "groups":
        state["param_groups"].append(state["param_groups"][0])
        return state, "state_dict has 2 parameter groups, the optimizer has 1"
    if how == "group size":
        state["param_groups"][0]["params"].pop()
        return state, "state_dict has 5 parameters in group 0, the optimizer has 6"
    return {"lr": 0.1}, r"must have 'state' and 'param_groups' with a group at least, got \['lr'\]"


SPOILS = [
    "truncated layer", "shape", "no data", "parameter too many", "parameter too few", "momentum shape",
    "momentum of one missing", "no counters", "counter missing", "other approximation", "option missing", "option out of range",
    "counter that is none", "groups",
    "group size", "something else",
]  # fmt: skip


@pytest.mark.parametrize("how", SPOILS)
def test_a_bad_checkpoint_is_refused_before_anything_changes(how: str) -> None:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(3))
    state, message = spoiled(copy.deepcopy(optimizer.state_dict()), how)
    train(model, optimizer, range(3, 5))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert same(before, optimizer.state_dict())


def test_states_of_other_optimizers_are_refused() -> None:
    model, optimizer = model_and_optimizer()
    with pytest.raises(TypeError, match="state_dict must be a dict, got list"):
        optimizer.load_state_dict([1])
    with pytest.raises(ValueError, match="not of a KFAC"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())
    adaptive = KFAC(small_model(), adaptive=True)
    with pytest.raises(ValueError, match="both be adaptive, or neither"):
        adaptive.load_state_dict(optimizer.state_dict())
    state = adaptive.state_dict()
    del state["state"][0]["run/adaptive/gamma"]
    with pytest.raises(ValueError, match="no 'gamma' of the adaptive rule"):
        adaptive.load_state_dict(state)


def test_a_file_cut_short_is_refused_by_torch_and_changes_nothing(tmp_path: Path) -> None:
    """Nothing of this package writes files; what `torch.save` did not finish, `torch.load` does not read."""
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(3))
    path = tmp_path / "checkpoint.pt"
    torch.save(optimizer.state_dict(), path)
    whole = path.read_bytes()
    before = copy.deepcopy(optimizer.state_dict())
    for end in (10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises((RuntimeError, OSError)):
            optimizer.load_state_dict(torch.load(path, weights_only=True))
    assert same(before, optimizer.state_dict())


# ---- other models, devices and precisions ---------------------------------------------------------------------------


def test_a_model_with_other_layers_takes_what_fits_by_name_and_reports_the_rest() -> None:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(4))
    state = through_a_file(optimizer.state_dict())
    larger = small_model()
    larger.insert(5, nn.Linear(8, 8))  # what was "5" is "6" now; a new "5" has other shapes
    larger.add_module("extra", nn.Linear(3, 3))
    other = KFAC(larger, factor_every=2, inverse_every=3)
    fresh = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="state_dict has 6 parameters in group 0, the optimizer has 10"):
        other.load_state_dict(state)
    assert same(fresh, other.state_dict())
    report = other.load_state_dict(state, strict=False)
    assert report.missing_keys == ["5.weight", "5.bias", "6.weight", "6.bias", "extra.weight", "extra.bias"]
    assert report.unexpected_keys == []
    loaded = other.state_dict()
    for position in (0, 1, 2, 3):
        assert same(state["state"][position], loaded["state"][position])
    assert same(fresh["state"][4], loaded["state"][4] | {"step": fresh["state"][4]["step"]})
    assert other.preconditioner.steps == 4

    smaller = nn.Sequential(*list(small_model())[:2])
    other = KFAC(smaller, factor_every=2, inverse_every=3)
    report = other.load_state_dict(state, strict=False)
    assert report == ([], ["3.bias", "3.weight", "5.bias", "5.weight"])
    assert torch.equal(other.state_dict()["state"][0]["a_factor"], state["state"][0]["a_factor"])


def test_what_fits_is_matched_by_name_whatever_the_groups() -> None:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(3))
    state = optimizer.state_dict()
    groups = [
        {"params": model[5].parameters(), "lr": 0.5},
        {"params": [*model[3].parameters(), *model[1].parameters()]},
    ]
    other = KFAC(model, groups, factor_every=2, inverse_every=3)
    assert other.load_state_dict(state, strict=False) == ([], [])
    assert other.param_groups[0]["lr"] == 0.5
    assert same(other.state_dict()["state"][0], state["state"][4])
    assert train(model, other, range(3, 4))[0].isfinite().all()


@pytest.mark.parametrize(("of", "into"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_another_precision(of: torch.dtype, into: torch.dtype) -> None:
    model, optimizer = model_and_optimizer(of)
    train(model, optimizer, range(3))
    _, other = model_and_optimizer(into)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for key, value in flat(other.state_dict()).items():
        expected = flat(optimizer.state_dict())[key]
        if isinstance(value, Tensor) and value.is_floating_point():
            assert value.dtype in (into, torch.float32)
            assert torch.allclose(value.double(), expected.double(), rtol=1e-6)


def test_the_targets_drawn_depend_on_the_seed_and_the_step_alone() -> None:
    """A checkpoint brings its seed, whatever the new optimizer's, and serves any kind of device."""
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(3))
    _, other = model_and_optimizer(seed=7)
    other.load_state_dict(optimizer.state_dict())
    draws = [torch.rand(5, generator=o.preconditioner.generator(torch.device("cpu"))) for o in (optimizer, other)]
    assert torch.equal(*draws)
    other.preconditioner.steps += 1
    assert not torch.equal(draws[0], torch.rand(5, generator=other.preconditioner.generator(torch.device("cpu"))))


# ---- torch's tools --------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # of torch's own, about its storage classes
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("kind", ["fixed", "no momentum", "adaptive"])
def test_distributed_checkpoint_round_trip(tmp_path: Path, flatten: bool, kind: str) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = model_and_optimizer(**KINDS[kind])
    expected = train(model, optimizer, range(6))
    model, optimizer = model_and_optimizer(**KINDS[kind])
    weights = train(model, optimizer, range(4))
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(saved, checkpoint_id=str(tmp_path / "checkpoint"))
    before = copy.deepcopy(optimizer.state_dict())

    model, optimizer = model_and_optimizer(**KINDS[kind])
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)
    target = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.load(target, checkpoint_id=str(tmp_path / "checkpoint"))
    set_optimizer_state_dict(model, optimizer, target["optimizer"], options=options)
    assert same(before, optimizer.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(train(model, optimizer, range(4, 6)), expected, strict=True))


def test_looking_at_the_state_changes_nothing() -> None:
    """torch's tools make a step with zero gradients where an optimizer has no state yet; here it has."""
    model, optimizer = model_and_optimizer(momentum=0.0)
    before = copy.deepcopy(optimizer.state_dict())
    get_optimizer_state_dict(model, optimizer)
    assert same(before, optimizer.state_dict())
