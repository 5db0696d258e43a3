"""Running the model again, on a batch or part of it, so that nobody notices: for statistics and curvature products."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map


@dataclass(frozen=True)
class Surroundings:
    """The state of torch around a call of the model that decides what the model computes.

    Attributes:
        autocast: Device type, whether autocast was on there, and its dtype.
        generators: State of the generator of every device; None: the call need not draw the same numbers again.
    """

    autocast: tuple[tuple[str, bool, torch.dtype], ...] = ()
    generators: dict[torch.device, Tensor] | None = None

    @classmethod
    def now(cls, devices: frozenset[torch.device], *, generators: bool) -> Surroundings:
        """Those of this thread, for a model on these devices."""
        kinds = sorted({device.type for device in devices})
        autocast = tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
        if not generators:
            return cls(autocast)
        states = {device: torch.cuda.get_rng_state(device) for device in devices if device.type == "cuda"}
        return cls(autocast, {torch.device("cpu"): torch.get_rng_state(), **states})

    @property
    def is_autocast(self) -> bool:
        return any(enabled for _, enabled, _ in self.autocast)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, autocast is as it was, and the generators too if they were kept; they are not put back after."""
        for device, state in (self.generators or {}).items():
            if device.type == "cuda":
                torch.cuda.set_rng_state(state, device)
            else:
                torch.set_rng_state(state)
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            yield


@dataclass(frozen=True)
class ModelInputs:
    """What a model was called with.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        size: Number of examples, the first dimension of the outputs.
        surroundings: Of the call.
        versions: Of all tensors at the time of the call, or None: not kept.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    size: int
    surroundings: Surroundings = Surroundings()
    versions: tuple[int, ...] | None = None

    def versioned(self) -> ModelInputs:
        """With `versions` as they are now."""
        return dataclasses.replace(self, versions=self._versions())

    @property
    def changed(self) -> bool:
        """Whether a tensor was changed in place after the call; needs `versions`."""
        return self.versions is not None and self.versions != self._versions()

    def _versions(self) -> tuple[int, ...]:
        leaves = tree_leaves((self.args, self.kwargs))
        return tuple(x._version for x in leaves if isinstance(x, Tensor) and not x.is_inference())

    @property
    def divisible(self) -> bool:
        """Whether the examples can be told apart: some tensor has them as its first dimension."""
        return self.size > 1 and any(self._is_batched(leaf) for leaf in tree_leaves((self.args, self.kwargs)))

    def part(self, fraction: float, offset: int) -> tuple[ModelInputs, slice]:
        """About this fraction of the examples, evenly spread (a batch may be sorted), and which ones.

        Args:
            fraction: In (0, 1].
            offset: Shifts the choice, so that successive steps see different examples.
        """
        stride = max(1, min(round(1 / fraction), self.size))
        chosen = slice(offset % stride, None, stride)

        def take(leaf: Any) -> Any:
            return leaf[chosen] if self._is_batched(leaf) else leaf

        args, kwargs = tree_map(take, (self.args, self.kwargs))
        size = len(range(self.size)[chosen])
        return dataclasses.replace(self, args=args, kwargs=kwargs, size=size, versions=None), chosen

    def run(self, model: nn.Module, leaves: list[Tensor] | None = None) -> Any:
        """Calls the model again, in the same surroundings and cut off from the graph of the arguments.

        Args:
            model: The same model.
            leaves: Where given, all floating-point arguments come from leaves that require gradients, listed here.
        """

        def cut(leaf: Any) -> Any:
            if leaves is not None and isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaves.append(leaf.detach().requires_grad_())
                return leaves[-1].clone()  # which the model may change in place
            return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf

        args, kwargs = tree_map(cut, (self.args, self.kwargs))
        with self.surroundings.again():
            return model(*args, **kwargs)

    def _is_batched(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == self.size


@contextlib.contextmanager
def unnoticed(model: nn.Module) -> Iterator[None]:
    """Inside, the model runs eagerly; on leaving, its buffers and the random generators are as before.

    The generators are those of torch, of Python and, where it is in use, of NumPy.
    """
    # Copies stand in for the buffers. Writing the old values back instead would count as a change of tensors that a
    # backward pass under way has saved.
    originals = [
        (m, name, buffer) for m in model.modules() for name, buffer in m._buffers.items() if buffer is not None
    ]
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    for module, name, buffer in originals:
        module._buffers[name] = buffer.clone()
    try:
        with torch.random.fork_rng(devices=cuda_devices(model)), _eagerly():
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for module, name, buffer in originals:
            module._buffers[name] = buffer


def packing() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """The hooks that pack and unpack what autograd saves, as non-reentrant checkpoints do; None: none, or torch 2.6."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(True)


def saves_are_packed() -> bool | None:
    """Whether someone packs what autograd saves; None where torch can't tell (2.6)."""
    known = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    return packing() is not None if known else None


def is_selective_checkpoint() -> bool:
    """Whether what runs is inside a selective checkpoint (``context_fn``), whose graph allows one backward pass."""
    return any(type(mode).__name__ == "_CachingTorchDispatchMode" for mode in _get_current_dispatch_mode_stack())


def _eagerly() -> contextlib.AbstractContextManager[Any]:
    # A program that has compiled nothing has not imported the compiler, and needs no import of it here.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


@contextlib.contextmanager
def differentiable_kernels() -> Iterator[None]:
    """Inside, torch avoids fused kernels that have no forward-mode or second derivative: attention, MKL-DNN."""
    fast_path, mkldnn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    # Not `torch.backends.mkldnn.flags`, which also sets flags that were not asked for, with a warning.
    torch._C._set_mkldnn_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch._C._set_mkldnn_enabled(mkldnn)


def cuda_devices(model: nn.Module) -> list[int]:
    """The CUDA devices that a model has parameters on."""
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


@contextlib.contextmanager
def shards_as_before(modules: Sequence[Any]) -> Iterator[None]:
    """Modules of FSDP2 that were whole are whole again on leaving.

    FSDP2 gives up the whole parameters of a module when a backward pass has gone through it. Those at the outputs have
    been gathered for the user's pass by then, which still needs them.
    """
    whole = [module for module in modules if any(type(p) is nn.Parameter for p in module.parameters())]
    yield
    for module in whole:
        module.unshard()
