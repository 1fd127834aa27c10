PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
MINUTES ?= 60
SEED ?= 0
CSRC := $(shell find csrc -type f -not -path '*/__pycache__/*')
FORMATTED := $(filter %.cpp %.h %.cu,$(CSRC) $(wildcard tests/support/cuda_on_host/*))

.PHONY: demo test docs generated aot36 lint bench fuzz ptx sanitize clean

demo: $(VENV)/.installed
	$(BIN)/python -m bench demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS)

# The pages of docs/ as a site in build/site. The package is imported, because some of its functions are made, not written.
docs: $(VENV)/.installed $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# What is made from the losses' declarations: lists of names, flashpair.functional, tables of pages, CITATION.cff.
generated: $(VENV)/.installed
	$(BIN)/python tests/support/generated.py

# What ahead-of-time compilation shows, under the Triton of torch 2.11 beside the environment's own.
aot36: $(VENV)/.installed build/triton36
	PYTHONPATH=build/triton36 $(BIN)/python -m pytest -n $(WORKERS) tests/backends/triton/test_aot.py tests/backends/triton/test_compilations.py tests/bench/test_gpu_cost.py

build/triton36:
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.new triton==3.6.0
	mv $@.new $@

bench: $(VENV)/.installed
	$(BIN)/python -m bench step

fuzz: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(MINUTES) --seed $(SEED)

# An hour of a core; what it finds is for bench/results.
ptx: $(VENV)/.installed
	mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.ptx > build/ptx.jsonl && mv build/ptx.jsonl bench/results/ptx.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.ptx mutants > bench/results/ptx-mutants.jsonl

lint: $(VENV)/.requirements
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

# The runtimes are preloaded because python itself is not instrumented; libstdc++ goes with them, or the
# sanitizer cannot intercept C++ exceptions. pytest's default capture would swallow the report of a crash.
sanitize: $(VENV)/.installed
	FLASHPAIR_SANITIZE=1 FORCE_CUDA=0 $(BIN)/python setup.py --quiet build_ext --build-lib build/sanitize --build-temp build/sanitize/temp
	extension=$$(echo $(CURDIR)/build/sanitize/flashpair/_C.*.so) && \
	runtimes=$$(ldd "$$extension" | awk '/lib(asan|ubsan|stdc)/ { print $$3 }' | xargs) && \
	FLASHPAIR_EXTENSION="$$extension" LD_PRELOAD="$$runtimes" ASAN_OPTIONS=detect_leaks=0 \
	$(BIN)/python -m pytest --capture=sys tests/backends/cpu/test_tiled.py tests/backends/cpu/test_screened.py tests/backends/cpu/test_screen_bound.py tests/engine/test_nearest.py tests/backends/cpu/test_histograms.py tests/engine/test_transforms.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .benchmarks .ruff_cache .mypy_cache
	rm -f python/flashpair/_C.*.so python/flashpair/_onchip.*.so python/flashpair/_build.json $(VENV)/.installed
	find bench csrc kernels python tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.requirements: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.txt
	touch $@

$(VENV)/.docs: $(VENV)/.requirements requirements-docs.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-docs.txt
	touch $@

$(VENV)/.installed: $(VENV)/.requirements pyproject.toml setup.py $(CSRC)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable .
	touch $@
