"""Installs a wheel as a stranger would and uses it: ``python check_wheel.py WHEEL TORCH [TORCH…]``.

For every torch requirement a new environment gets that torch and the wheel, nothing else; then, with nothing on PATH
but that environment (no compiler, no nvcc), the self-test and some training steps have to run. The standard library
only, so that any Python can start it.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

MAX_BYTES = 20 * 10**6
# The C++ run time, libc's libraries, and libgomp, which has to be torch's. No CUDA and no torch.
ALLOWED_LIBRARIES = re.compile(r"lib(gomp|stdc\+\+|gcc_s|m|c|pthread|dl|rt)\.so\.\d+|ld-linux-[\w-]+\.so\.\d+")

# Run by the new environment's Python.
TRAIN = """
import shutil, torch, kfac_fast
assert not any(map(shutil.which, ("cc", "c++", "gcc", "g++", "clang++", "nvcc"))), "a compiler is on PATH"
torch.manual_seed(0)
x, y = torch.randn(128, 1, 8, 8), torch.randint(10, (128,))
model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 10))
optimizer = kfac_fast.KFAC(model)
losses = []
for _ in range(20):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 2, losses
print(f"20 steps: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
"""


def needed_libraries(library: bytes) -> list[str]:
    """What a 64-bit little-endian ELF file asks the loader for (DT_NEEDED)."""
    assert library[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
    start, count = struct.unpack_from("<Q", library, 32)[0], struct.unpack_from("<H", library, 56)[0]
    headers = [struct.unpack_from("<IIQQQQQQ", library, start + 56 * i) for i in range(count)]
    dynamic = next(offset for kind, _, offset, *_ in headers if kind == 2)
    entries = []
    for tag, value in struct.iter_unpack("<QQ", library[dynamic : dynamic + (len(library) - dynamic) // 16 * 16]):
        if tag == 0:
            break
        entries.append((tag, value))
    address = dict(entries)[5]  # of the strings
    strings = next(
        address - virtual + offset
        for kind, _, offset, virtual, _, size, *_ in headers
        if kind == 1 and virtual <= address < virtual + size
    )
    return [
        library[strings + value : library.index(b"\0", strings + value)].decode() for tag, value in entries if tag == 1
    ]


def check_contents(wheel: Path) -> None:
    """Raises AssertionError if the wheel is too large or carries libraries or sources that it should not."""
    size = wheel.stat().st_size
    assert size < MAX_BYTES, f"{wheel.name} has {size / 1e6:.1f} MB, at most {MAX_BYTES / 1e6:.0f}"
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    libraries = [n for n in names if ".so" in n]
    assert len(libraries) == 1, f"expected one library, found {libraries}"
    strange = [name for name in needed_libraries(archive.read(libraries[0])) if not ALLOWED_LIBRARIES.fullmatch(name)]
    assert not strange, f"{libraries[0]} needs {strange}"
    assert "kfac_fast/py.typed" in names, "py.typed is missing"
    strays = [n for n in names if not n.startswith(("kfac_fast/", "kfac_fast-"))]
    assert not strays, f"files outside the package: {strays}"
    print(f"{wheel.name}: {size / 1e6:.1f} MB, {len(names)} files")


def check_with(wheel: Path, torch_requirement: str) -> None:
    """Raises CalledProcessError if the wheel does not work with this torch."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        binaries = Path(folder, "bin")
        python = str(binaries / "python")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        # numpy: without it torch warns at import. The wheel's own requirement of torch is checked by pip here.
        subprocess.run([*install, torch_requirement, "numpy", str(wheel)], check=True)
        alone = {"PATH": str(binaries), "HOME": folder, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
        for command in ([python, "-m", "kfac_fast"], [python, "-c", TRAIN]):
            subprocess.run(command, check=True, env=alone, cwd=folder, timeout=300)


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    wheel = Path(sys.argv[1]).resolve()
    check_contents(wheel)
    for requirement in sys.argv[2:]:
        print(f"== {wheel.name} with {requirement}", flush=True)
        check_with(wheel, requirement)


if __name__ == "__main__":
    main()
