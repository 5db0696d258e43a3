"""What the user calls a model: wrappers taken off, outputs found, later changes noticed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from .layers import Layer


def unwrap(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Takes ``torch.compile`` and ``DistributedDataParallel`` off.

    Returns:
        The module itself, and the one whose calls are to be looked at: what ``torch.compile`` made of it, since hooks
        inside a compiled graph cut it, or the module itself.

    Raises:
        TypeError: Not a module.
        ValueError: A module that hooks see nothing of.
    """
    called: nn.Module | None = None
    while True:
        if not isinstance(model, nn.Module):
            hint = "" if type(model).__name__ != "ExportedProgram" else "; use the module that was exported"
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{hint}")
        if isinstance(model, torch.jit.ScriptModule):
            raise ValueError("model must not be a TorchScript module: nothing inside it can be seen; use the original")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            # Hooks go on the inner module: an extra backward pass started from the wrapper corrupts static graphs.
            model = model.module
        elif is_compiled_wrapper(model):
            called = model if called is None else called
            model = model.get_submodule("_orig_mod")
        else:
            break
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise ValueError("model has lazy modules whose parameters are not there yet: call it once, on a few examples")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("model must have parameters with data, got some on the device meta; make the optimizer later")
    for module in model.modules():
        if isinstance(module, nn.DataParallel) and (module is model or len(module.device_ids) > 1):
            raise ValueError("model must not be a DataParallel: its replicas carry no hooks; use one device")
    if isinstance(model, torch.fx.GraphModule) and not _calls_modules(model):
        raise ValueError("model must not be an exported graph: no module in it is called; use the original")
    return model, model if called is None else called


def _calls_modules(model: torch.fx.GraphModule) -> bool:
    called = [model.get_submodule(str(node.target)) for node in model.graph.nodes if node.op == "call_module"]
    return any(True for module in called for _ in module.parameters())


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether this is what ``torch.compile`` returns for a module."""
    return hasattr(module, "_torchdynamo_orig_callable")


def has_compiled_parts(model: nn.Module) -> bool:
    """Whether part of the model, or all of it, is compiled."""
    return any(module._compiled_call_impl is not None or is_compiled_wrapper(module) for module in model.modules())


class Original:
    """A model as it was, to notice what was replaced or unfrozen since.

    Args:
        model: The model.
        layers: Its layers.
        parameters: Parameters that are known whether they require a gradient or not.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], parameters: Iterable[nn.Parameter]) -> None:
        self.model = model
        # Not those in the shards of FSDP2, which puts other parameters in their place for the time of a pass.
        plain = [layer for layer in layers if all(type(p) is nn.Parameter for p in layer.parameters.values())]
        self._layers = [(layer.name, layer.module, layer.parameters) for layer in plain]
        self._known = {id(p) for p in parameters} | {id(p) for p in model.parameters() if p.requires_grad}
        # Where the parameters of the layers stand in their modules.
        self._places: list[tuple[dict[str, nn.Parameter | None], str]] = []
        self._parameters: list[nn.Parameter] = []
        for _, module, own in self._layers:
            for name, p in own.items():
                path, _, last = name.rpartition(".")
                holder = module.get_submodule(path)._parameters
                if holder.get(last) is p:
                    self._places.append((holder, last))
                    self._parameters.append(p)

    def in_place(self) -> bool:
        """Whether all parameters of the layers are where they were: a matter of 0.1 µs for each."""
        return all(map(is_, [holder.get(name) for holder, name in self._places], self._parameters))

    def changes(self) -> dict[str, str]:
        """What changed, by the name of the module or parameter."""
        told: dict[str, str] = {}
        modules = dict(self.model.named_modules())
        for name, module, own in self._layers:
            if modules.get(name) is not module:
                told[name] = "it was another one"
            elif any(attrgetter(key)(module) is not p for key, p in own.items()):
                told[name] = "a parameter of it was another one"
        for name, p in self.model.named_parameters():
            if p.requires_grad and p.grad is not None and id(p) not in self._known:
                told.setdefault(name.rpartition(".")[0], f"the parameter {name} was frozen or not there")
        return told


def refuse_moved_model(layers: Sequence[Layer], kept: Tensor) -> None:
    """Looks whether the layers are still where and what their curvature is.

    Raises:
        ValueError: The model was moved to another device or precision.
    """
    weight = layers[0].weight if layers else kept
    if weight.device != kept.device or (weight.dtype == torch.float64) != (kept.dtype == torch.float64):
        raise ValueError(
            f"the model is {weight.dtype} on {weight.device}, its curvature {kept.dtype} on {kept.device}: make the "
            "optimizer after model.to()"
        )


def outputs_in(result: Any) -> Tensor:
    """The output tensor in what a model returned.

    Raises:
        TypeError: None, or more than one.
    """
    if isinstance(result, Tensor):
        return result
    logits = result.get("logits") if isinstance(result, dict) else getattr(result, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(result, (tuple, list)):
        tensors = [r for r in result if isinstance(r, Tensor) and r.is_floating_point()]
        if len(tensors) == 1:
            return tensors[0]
    raise TypeError(
        f"found no output tensor in the {type(result).__name__} that the model returned; pass outputs=, a function "
        "from what the model returns to the tensor that the loss is computed from. Where it is computed from several, "
        "let the model return them as one (torch.cat, torch.stack)"
    )
