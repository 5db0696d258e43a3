"""The rules of docs/architecture.md, read from the sources."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kfac_fast"

# A stage imports only what stands before it.
ORDER = [
    "_C", "ops", "arguments", "layers", "report", "likelihoods", "models", "passes", "sequence", "products", "chain", "hooks", "graph", "kept", "tape", "recorder", "sender", "own_pass", "capture", "collectives", "distributed", "statistics", "factors", "inverses", "notices", "approximations", "sampler", "sharing", "checkpoint", "preconditioner", "vectors", "quadratic", "loss_check", "adaptive_constants", "adaptive", "joining", "update", "optimizer_state", "optimizer",
    "diagnostics", "plot",
]  # fmt: skip
FREE = {"__init__", "__main__", "batches", "data"}


def package_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, by their first name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {alias.name for alias in node.names} if node.module is None else {node.module.split(".")[0]}
    return found


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.stem)
def test_stages_import_only_what_stands_before_them(path: Path) -> None:
    if path.stem in FREE:
        return
    assert path.stem in ORDER, f"{path.name} is not in the order of stages"
    allowed = set(ORDER[: ORDER.index(path.stem)])
    assert package_imports(path) <= allowed


def test_approximations_import_only_what_stands_before_them() -> None:
    inside = {p.stem for p in (PACKAGE / "approximations").glob("*.py")}
    allowed = inside | set(ORDER[: ORDER.index("approximations")])
    for path in (PACKAGE / "approximations").glob("*.py"):
        assert package_imports(path) <= allowed, path


def test_ops_import_no_stage() -> None:
    inside = {p.stem for p in (PACKAGE / "ops").glob("*.py")}
    for path in (PACKAGE / "ops").glob("*.py"):
        assert package_imports(path) <= inside | {"_C"}, path


def uses(pattern: str, files: list[Path]) -> set[str]:
    return {p.relative_to(ROOT).as_posix() for p in files if re.search(pattern, p.read_text())}


def test_only_capture_and_recorder_register_hooks() -> None:
    assert uses(r"register_(forward|full_backward|hook)", python_files()) == {
        "kfac_fast/capture.py",
        "kfac_fast/recorder.py",
    }


def test_only_native_reads_addresses() -> None:
    assert uses(r"\.data_ptr\(\)", python_files()) == {"kfac_fast/ops/native.py"}


def test_only_the_bindings_include_pybind11_and_nothing_includes_torch() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert uses(r"#include <pybind11", sources) == {"csrc/bindings.cpp", "csrc/tensor_views.h"}
    assert not uses(r"#include <(torch|ATen|c10)/", sources)


def test_kernels_allocate_nothing_on_the_device_and_never_wait() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cu", ".cuh"}]
    assert not uses(r"cudaMalloc|cudaDeviceSynchronize|cudaStreamSynchronize|cudaEventSynchronize", sources)


@pytest.mark.parametrize("path", python_files(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 420
