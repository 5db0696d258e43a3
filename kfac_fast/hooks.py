"""Module hooks that die with what they belong to, that copies of the module do not carry on, and that compile well."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling


class Hook:
    """Calls ``handler(owner, *first, …)`` as long as its owner lives; afterwards it removes itself.

    A deepcopied or unpickled model (EMA, SWA) has modules that are not the optimizer's; the copy of the hook removes
    itself when it is first called. Inside a compiled graph the hook is traced to nothing: the graph stays whole, and
    the hook sees nothing.
    """

    __slots__ = ("_first", "_handler", "_owner")
    observes_only = True  # it changes nothing, so a pass of our own may leave it out

    def __init__(self, owner: Any = None, handler: Callable[..., None] | None = None, *first: Any) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self._handler = handler
        self._first = first

    def __call__(self, module: nn.Module, *arguments: Any) -> None:
        if is_dynamo_compiling():
            return
        owner = None if self._owner is None else self._owner()
        if owner is None:
            if arguments[-1] is not None:  # else the module raised, and torch goes through the hooks themselves
                self._remove_from(module)
        elif self._handler is not None:
            self._handler(owner, *self._first, *arguments)

    def _remove_from(self, module: nn.Module) -> None:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)

    def __deepcopy__(self, memo: Any) -> Hook:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


class EagerHook(Hook):
    """A hook that is called by a compiled module too: the graph is cut before and after it, if it is not the first."""

    __slots__ = ()

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        if "__call__" not in vars(EagerHook):  # not earlier: it imports the compiler
            setattr(EagerHook, "__call__", torch.compiler.disable(Hook.__call__))  # noqa: B010
