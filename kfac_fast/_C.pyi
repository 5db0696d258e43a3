"""Native kernels. See csrc/ops.h for what the tables do; kfac_fast.ops is the checked interface."""

from collections.abc import Callable, Sequence
from typing import overload

__version__: str
cuda_architectures: str  # "" in a build without CUDA

class Plan:
    def __init__(self, sizes: Sequence[int]) -> None: ...
    @property
    def numel(self) -> int: ...
    @property
    def max_size(self) -> int: ...
    @property
    def offsets(self) -> list[int]: ...

class TensorViews:
    @overload
    def __init__(self, tensors: list[object], exchange_api: int, plain_types: tuple[type, ...]) -> None: ...
    @overload
    def __init__(self, descriptions: Sequence[tuple[int, int, int, Sequence[int], Sequence[int]]]) -> None: ...
    def __len__(self) -> int: ...
    @property
    def shapes(self) -> list[tuple[int, ...]]: ...
    @property
    def trailing_dimensions_collapse(self) -> bool: ...
    def uniform(self, device: int, dtypes: Sequence[int]) -> bool: ...
    def fit_rows(self, plan: Plan, bias: Sequence[bool]) -> bool: ...
    def fit_matrices(self, rows: Plan, columns: Plan, bias_of: Sequence[int]) -> bool: ...
    def fit_biases(self, rows: Plan, bias_of: Sequence[int], weights: TensorViews) -> bool: ...

class Call:
    def __init__(
        self, allocate: Callable[[int, int], tuple[int, int]], threads: int, stream: int, device: int
    ) -> None: ...

class OpTable:
    @property
    def name(self) -> str: ...
    @property
    def max_inverse_size(self) -> int: ...
    def factor_update(
        self,
        call: Call,
        plan: Plan,
        dtype: int,
        factors: int,
        views: TensorViews,
        convs: Sequence[tuple[object, ...] | None],
        bias: Sequence[bool],
        weights: Sequence[int],
        decay: int,
        scale: int,
        trace: int,
        nonfinite: int,
    ) -> None: ...
    def commit(
        self,
        call: Call,
        plan: Plan,
        dtype: int,
        factors: int,
        pending: int,
        decay: int,
        scale: int,
        gate: int,
        trace: int,
    ) -> None: ...
    def damped_inverse(
        self,
        call: Call,
        plan: Plan,
        dtype: int,
        blocks: int,
        damping: int,
        inverse: int,
        info: int,
        retry_failed: bool,
        nan_on_failure: bool,
    ) -> None: ...
    def precondition(
        self,
        call: Call,
        g_plan: Plan,
        a_plan: Plan,
        dtype: int,
        g_inverse: int,
        a_inverse: int,
        grads: TensorViews,
        grad_biases: TensorViews,
        results: TensorViews,
        result_biases: TensorViews,
        bias_of: Sequence[int],
        dot: int,
    ) -> None: ...

def cpu_tables() -> list[OpTable]: ...
def cuda_table() -> OpTable: ...
def table_at(address: int) -> OpTable: ...
