"""What the autograd graph of a forward pass tells."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.autograd.graph import Node

# What makes another form of the same weight.
_FORMS = {"PermuteBackward0", "TBackward0", "ToCopyBackward0", "TransposeBackward0", "ViewBackward0"}


def _nodes(root: Node) -> Iterator[Node]:
    """All nodes of a graph, from its last one."""
    waiting, seen = [root], {root}
    while waiting:
        node = waiting.pop()
        yield node
        below = {n for n, _ in node.next_functions if n is not None and n not in seen}
        waiting += below
        seen |= below


def is_released(node: Node, recomputes: bool) -> bool:
    """Whether the graph above a node has been freed, so that no other backward pass can come.

    Args:
        node: The last one of the forward pass.
        recomputes: Whether looking at a saved tensor may run parts of the model; then this is not tried.
    """
    if recomputes:
        return True
    for above in _nodes(node):
        for name in dir(above):
            if not name.startswith("_raw_saved_"):
                continue
            try:
                saved = getattr(above, "saved_tensors" if name == "_raw_saved_tensors" else name.removeprefix("_raw"))
            except RuntimeError:
                return True
            if saved is not None:
                return False
    return True


def uses_of(node: Node, leaves: Iterable[Tensor]) -> Counter[int]:
    """How many operations of a forward pass use each of these leaves, transposed or cast or not, by their ``id``.

    Args:
        node: The last one of the forward pass.
        leaves: Tensors that require a gradient.
    """
    known = {id(leaf) for leaf in leaves}
    users: dict[Node, list[Node]] = defaultdict(list)
    for above in _nodes(node):
        for below, _ in above.next_functions:
            if below is not None:
                users[below].append(above)
    counts: Counter[int] = Counter()
    for below in list(users):
        leaf = id(getattr(below, "variable", None))
        waiting = users[below] if leaf in known else []
        while waiting:
            for user in waiting:
                counts[leaf] += user.name() not in _FORMS
            waiting = [above for user in waiting if user.name() in _FORMS for above in users.get(user, [])]
    return counts
