"""What is public has a docstring and types; what docs/integrations.md promises has a test."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kfac_fast
from kfac_fast.tape import Sink

ROOT = Path(__file__).resolve().parent.parent
PROMISES = (ROOT / "docs" / "integrations.md").read_text()


def members(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A public name and, of a module or a class, what is public in it and written here."""
    yield name, value
    if isinstance(value, ModuleType):
        names = getattr(value, "__all__", [])
    elif inspect.isclass(value):
        names = [n for kind in value.__mro__ if kind.__module__.startswith("kfac_fast") for n in vars(kind)]
    else:
        return
    for n in dict.fromkeys(names):
        inner = inspect.getattr_static(value, n)
        inner = inner.__func__ if isinstance(inner, (classmethod, staticmethod)) else inner
        if not n.startswith("_") and (callable(inner) or isinstance(inner, property)):
            yield f"{name}.{n}", inner


def sink_document(name: str) -> str | None:
    """A `Preconditioner` is a `Sink`, whose methods are documented there."""
    owner, _, method = name.rpartition(".")
    return inspect.getdoc(getattr(Sink, method)) if owner == "Preconditioner" and hasattr(Sink, method) else None


PUBLIC = {
    name: value for top in kfac_fast.__all__ if top != "__version__" for name, value in members(top, getattr(kfac_fast, top))
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented_and_typed(name: str) -> None:
    value = PUBLIC[name]
    document = inspect.getdoc(value) or sink_document(name)
    assert document, f"{name} has no docstring"
    assert len(document.split()) >= 2, f"{name}: {document!r}"
    function = value.fget if isinstance(value, property) else value
    if inspect.isclass(value) or not inspect.isroutine(function):
        return
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty, f"{name} has no return type"
    for parameter in signature.parameters.values():
        assert parameter.name in ("self", "cls") or parameter.annotation is not inspect.Parameter.empty, parameter


def test_types_are_shipped() -> None:
    assert (ROOT / "kfac_fast" / "py.typed").is_file()


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_a_source_folder_without_kernels_says_what_to_do(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kfac_fast", tmp_path / "kfac_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "-S", "-c", "import kfac_fast"]  # -S: an editable install would find the kernels
    found = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert "pip install -e ." in found.stderr, found.stderr


CONTRACT = [
    "test_torch_contract.py", "test_schedulers.py", "test_copies.py", "test_checkpoint.py",
    "test_checkpoint_preconditioner.py", "test_mixed_precision.py", "test_failures.py", "test_soak.py",
    "test_distributed.py", "test_distributed_ddp.py", "test_distributed_example.py", "test_sharded.py",
    "test_frameworks.py",
]  # fmt: skip
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PROMISES)))


@pytest.mark.parametrize(("file", "name"), NAMED, ids="::".join)
def test_a_promised_test_exists(file: str, name: str) -> None:
    assert name in functions(ROOT / "tests" / file)


def test_every_promise_names_a_test() -> None:
    rows = [line for line in PROMISES.splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith(("| promise", "| you"))]
    assert len(promises) > 30
    for row in promises:
        assert re.search(r"`test_\w+\.py::test_\w+`", row), row


def test_every_test_of_the_contract_is_promised() -> None:
    for file in CONTRACT:
        for name in functions(ROOT / "tests" / file):
            assert not name.startswith("test_") or (file, name) in NAMED, (
                f"{file}::{name} is not in docs/integrations.md"
            )
