# Two commands for a newcomer, `make demo` and `make test`; both make their own environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
RUN ?= runs/demo
CASE ?= unetr qkv
RESULTS ?= bench/results
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

# Threads that wait sleep instead of spinning: beside one other busy process a training step took 0.6 s, not 3.8 s.
export OMP_WAIT_POLICY := PASSIVE

# Two workers with one thread each; what Triton and Inductor compile stays in build/ for the next run.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --durations 15
export TORCHINDUCTOR_COMPILE_THREADS := 1
export TRITON_CACHE_DIR := $(abspath build/triton)
export TORCHINDUCTOR_CACHE_DIR := $(abspath build/inductor)

.PHONY: demo test test-all lint ctest oldest oldest-triton docs bench gpu gpu-bench profile clean
.DELETE_ON_ERROR:

# Adapts a network to the embedded data and writes $(RUN)/report.html; called again, it goes on where it stopped.
demo: $(INSTALLED)
	$(BIN)/tcurlora finetune --output $(RUN) --resume

test: lint
	$(PYTEST)

# What takes long and changes seldom: PEFT's own suites, the kernels compiled anew and with every option in the
# interpreter, sanitizers, the site, the examples, the C++ library by itself, and the oldest libraries that are allowed.
test-all: ctest oldest oldest-triton
	$(PYTEST) -m slow

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The core of the tests with the oldest transformers and PEFT that pyproject.toml allows; the torch is the same. Without
# the training of quantised Llamas, which fails there: transformers 4.56 refuses torchao's, bitsandbytes' gets no gradient.
OLDEST := build/oldest
oldest: $(BUILT)
	rm -rf $(OLDEST)
	$(BIN)/python -m venv $(OLDEST)
	echo "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  > "$$($(OLDEST)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/newest.pth"
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --ignore-installed \
	  --requirement tests/oldest.txt
	PYTHONPATH=$(CURDIR) $(OLDEST)/bin/python -m pytest -n 2 --dist loadfile tests/integrations/peft \
	  --deselect tests/integrations/peft/test_quantised_llama.py::test_the_trainer_trains_the_cores_and_leaves_the_codes \
	  tests/adapter/test_written_before.py tests/adapter/test_options.py

# Triton's kernels, compiled by the oldest Triton that pyproject.toml allows: those of an H200 in bfloat16, and those of
# float32 without a table, but for c = r = 64, where it spills 104 bytes. It stays in a folder of its own, which Python
# searches before the environment.
TRITON_VERSION := 3.6.0
OLDEST_TRITON := $(CURDIR)/build/triton-$(TRITON_VERSION)
oldest-triton: $(BUILT) $(OLDEST_TRITON)/.installed
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -c "import triton; assert triton.__version__ == '$(TRITON_VERSION)'"
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python -m pytest tests/kernels/test_compiled.py -m slow \
	  -k "(H200 and bfloat16-sm90-descriptors-n3-c8r8) or (fallback and float32-sm90-pointers and not c64) or readings"

$(OLDEST_TRITON)/.installed:
	rm -rf $(@D)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $(@D) triton==$(TRITON_VERSION)
	touch $@

# The C++ sources as a library, in a program without Python.
ctest: $(BUILT)
	$(BIN)/cmake -S . -B build/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DCMAKE_PREFIX_PATH="$$($(BIN)/python -c 'import torch; print(torch.utils.cmake_prefix_path)')"
	$(BIN)/cmake --build build/cmake
	$(BIN)/ctest --test-dir build/cmake --output-on-failure

# The pages of docs/ and the reference made from the docstrings, as a site; tests/test_reference_pages.py.
docs: $(BUILT)
	$(BIN)/python -m sphinx --fail-on-warning --quiet --builder html docs build/docs
	@echo build/docs/index.html

# What the adapter costs on this machine: CSV in $(RESULTS), five minutes on two cores.
bench: $(BUILT)
	$(BIN)/tcurlora bench --output $(RESULTS)

# On a machine with a GPU, by the torch of $(PYTHON), which has to be a CUDA build; need no network and no environment.
# gpu tests, looks for bad accesses, measures and profiles, ten minutes at most; gpu-bench measures every case, eight.
gpu:
	PYTHON=$(PYTHON) bench/gpu.sh $(RESULTS) a b networks

gpu-bench:
	PYTHON=$(PYTHON) bench/gpu.sh $(RESULTS) build set

# Where the time, or on a GPU the memory's bytes, of one step of $(CASE) go; docs/profiling.md.
profile: $(BUILT)
	$(BIN)/python -m tcurlora_ext.bench.profile "$(CASE)" --output $(RESULTS)

# What the demo needs. Removed and made anew when the dependencies change, so that nothing of an older set is left.
$(INSTALLED): pyproject.toml constraints.txt
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools ninja pybind11
	TCURLORA_BUILD=0 $(PIP) --no-build-isolation --editable '.[segmentation]'
	touch $@

# What the tests need, and the C++ operator: minutes that the demo does not wait for. It is built against the torch that
# is installed, hence no build isolation. torchao, which the tests want too, writes four lines of warnings whenever PEFT is imported.
$(BUILT): $(INSTALLED) setup.py $(shell find csrc -type f)
	$(PIP) --no-build-isolation --editable '.[test,quantised]'
	$(BIN)/python -c "import torch, tcurlora_ext._C"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
