"""`Hook`: a module hook that dies with what it belongs to, and that copies of the module do not carry on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn


class Hook:
    """Calls ``handler(owner, *first, …)`` as long as its owner lives; afterwards it removes itself.

    A deepcopied or unpickled model (EMA, SWA) has modules that are not the optimizer's; the copy of the hook removes
    itself when it is first called.
    """

    __slots__ = ("_first", "_handler", "_owner")
    observes_only = True  # it changes nothing, so a pass of our own may leave it out

    def __init__(self, owner: Any = None, handler: Callable[..., None] | None = None, *first: Any) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self._handler = handler
        self._first = first

    def __call__(self, module: nn.Module, *arguments: Any) -> None:
        owner = None if self._owner is None else self._owner()
        if owner is None:
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
        return Hook()

    def __reduce__(self) -> Any:
        return Hook, ()
