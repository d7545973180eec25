# Every target sets up what it needs: a virtual environment, the PyTorch named here, the compiled module. A second run
# is quick. ARGS goes to the program that a target runs: make demo ARGS="--seeds 2", make test ARGS="-k state".

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
# of test-triton
VERSION ?= 3.6.0

BIN := .venv/bin
# whoever has nothing left to do takes over from the others: the slow tests differ by minutes
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal
CSRC := $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: help demo bench bench-kernels results instructions test test-all test-exhaustive test-triton test-integrations zoo \
	docs gpu gpu-cache sanitize lint format wheel check-wheel old-cpu clean environments FORCE

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-20s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/built  ## plain backprop beside continual backprop on a stream of tasks; two to three minutes
	$(BIN)/python -m cbp_fast demo $(ARGS)

bench: .venv/built  ## times one step; ARGS="--suite all" the rest
	$(BIN)/python -m cbp_fast bench $(ARGS)

# pytest-benchmark's own statistics of every operation
bench-kernels: .venv/built  ## each operation, by pytest-benchmark
	$(BIN)/pytest benchmarks $(ARGS)

# All that README shows, in minutes; wants a machine with nothing else to do. ccbp-pytorch is one of the peers.
RESULTS := benchmarks/results
results: .venv/built  ## all that README and docs show of times; minutes, on a machine with nothing else to do
	$(BIN)/pip install --quiet --constraint .venv/torch.txt ccbp-pytorch
	$(BIN)/cbp-fast bench --suite all --seconds 8 --json $(RESULTS)/bench.json --csv $(RESULTS)/bench.csv --plot $(RESULTS) \
		| tee $(RESULTS)/bench.txt
	$(BIN)/cbp-fast bench --threads 2 --seconds 8 --no-compile --cases "3 x 4096" "3 x 1024" \
		--json $(RESULTS)/bench_two_threads.json \
		--csv $(RESULTS)/bench_two_threads.csv | tee $(RESULTS)/bench_two_threads.txt
	$(BIN)/cbp-fast bench --threads 2 --seconds 2 --suite kernels --csv $(RESULTS)/bench_kernels_two_threads.csv \
		| tee $(RESULTS)/bench_kernels_two_threads.txt

# under valgrind, which has to be installed; ARGS=--write keeps the counts
instructions: .venv/built  ## instruction counts, by valgrind, which has to be installed
	$(BIN)/python benchmarks/instructions.py $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python benchmarks/host_step.py $(ARGS)

test: .venv/built  ## the quick tests; ARGS="-k state" some of them
	$(PYTEST) -m "not slow and not gpu and not exhaustive" $(ARGS)

# every operation, many random networks, a step stopped at every bytecode: ARGS="--networks 10000"
test-exhaustive: .venv/built  ## every operation, many random networks; ARGS="--networks 10000"
	$(PYTEST) -m exhaustive $(ARGS)

test-all: .venv/built  ## what test leaves out: the slow ones, older Tritons and test-integrations
	$(PYTEST) -m "slow and not gpu" $(ARGS)
	for version in $(OLDER_TRITONS); do $(MAKE) test-triton VERSION=$$version || exit 1; done
	$(MAKE) test-integrations

# The wheel, built with the PyTorch above, in an environment with the frameworks and a newer PyTorch.
INTEGRATIONS := .venv-integrations/bin
SMOKE := backends/test_golden.py step/test_checkpoint.py test_layers*.py
test-integrations: .venv/built .venv-integrations/tools  ## clarena, Lightning and the Hugging Face Trainer, under another PyTorch; 6 GB the first time
	rm -rf build/wheel
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(INTEGRATIONS)/pip install --quiet --no-deps --force-reinstall build/wheel/*.whl
	$(INTEGRATIONS)/pytest --numprocesses auto --maxprocesses 4 -m "not slow and not gpu and not exhaustive" $(SMOKE:%=tests/%)
	$(INTEGRATIONS)/pytest --numprocesses auto --maxprocesses 4 tests/integrations $(ARGS)

# Discovery on models of other libraries, in some hours; it goes on where it was stopped (rm build/zoo.jsonl
# to begin anew). make zoo ARGS="--library timm", ARGS="--total 1800" for an even sample in half an hour
ZOO := .venv-zoo/bin
zoo: .venv/built .venv-zoo/tools  ## discovery over the models of other people's libraries; gigabytes, hours (ARGS="--total 1800": a sample)
	PYTHONPATH="$(CURDIR)" $(ZOO)/python benchmarks/zoo.py --report benchmarks/results/zoo.md $(ARGS)

# Another Triton over the packages of .venv, whose own is the newest: 3.6.0 is that of PyTorch 2.10 and 2.11, 3.7.1 that
# of 2.12 and 2.13, 3.8.0 that of 2.14
OLDER_TRITONS := 3.6.0 3.7.1 3.8.0
# of the slow tests, most under the oldest, which is that of most GPUs there are, and some under those between
UNDER_OTHERS = slow(triton='each')$(if $(filter 3.6.0,$(VERSION)), or slow(triton='oldest'))
test-triton: .venv/built .venv-triton-$(VERSION)/tools  ## the Triton backend under another Triton: VERSION=3.6.0
	PYTHONPATH="$(CURDIR)" .venv-triton-$(VERSION)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal \
		-m "not slow and not gpu and not exhaustive or $(UNDER_OTHERS)" tests/backends/on_triton/test_triton*.py $(ARGS)

# On a machine with a GPU: its own Python, PyTorch and Triton as they are, nothing installed, nothing fetched, at most
# eight minutes: make gpu GPU_PYTHON=/opt/torch/bin/python3. What comes of it is in GPU_OUT. REHEARSE=1 needs no GPU.
GPU_PYTHON ?= python3
GPU_OUT ?= $(if $(REHEARSE),build/gpu-rehearsal,benchmarks/results/gpu)
GPU_ENVIRONMENT := PYTHONPATH="$(CURDIR)" PYTHONUNBUFFERED=1 TRITON_CACHE_DIR="$(CURDIR)/build/triton"
gpu:  ## on a machine with a GPU, at most eight minutes; REHEARSE=1 without one
	TRITON_INTERPRET=$(if $(REHEARSE),1,0) $(GPU_ENVIRONMENT) \
		$(GPU_PYTHON) benchmarks/gpu_run.py "$(GPU_OUT)" $(if $(REHEARSE),--rehearse) $(ARGS)

# What that would compile there is compiled here, by the same Triton, and no GPU is needed; build/triton goes along. For
# another GPU than an H100: make gpu-cache ARGS="--capability 80"
gpu-cache:  ## compiles ahead what gpu would compile
	TRITON_INTERPRET=0 $(GPU_ENVIRONMENT) $(GPU_PYTHON) benchmarks/gpu_ahead.py $(ARGS)

# A second build of the package, in build/sanitize, run under AddressSanitizer and UBSan; for GCC. Python is linked to
# neither the sanitizer nor the C++ library whose exceptions it watches, so both are loaded ahead of it. What Python
# leaks at exit is not ours. Python's own flags have -fwrapv, which would hide a signed overflow.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: .venv/built  ## the kernels under AddressSanitizer and UBSan
	CXX="$(CXX)" CFLAGS="$(SANITIZE) -fno-wrapv" LDFLAGS="$(SANITIZE)" \
		$(BIN)/python setup.py --quiet build --debug --build-base build/sanitize --build-lib build/sanitize/lib
	LD_PRELOAD="$(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize/lib \
		$(BIN)/python tests/sanitize_run.py

# Warnings are errors, and a name that leads nowhere is one; what is in the pages then runs: the examples while they are
# built, every other block of code by doctest
docs: .venv/built .venv/docs  ## the documentation, in build/docs; runs every block of code in it
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --nitpicky --doctree-dir build/doctrees docs build/docs
	$(BIN)/sphinx-build --quiet --builder doctest --fail-on-warning --keep-going --doctree-dir build/doctrees docs build/doctest
	@tail -n 5 build/doctest/output.txt

lint: .venv/tools  ## ruff, mypy, import-linter, clang-format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: .venv/tools  ## mends what lint would say of layout
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CSRC)

# dist/ gets the source distribution, and the wheel made of it; PyTorch's libraries stay PyTorch's
wheel: .venv/built  ## the wheel and the source distribution, in dist/, tried in a clean environment
	$(BIN)/pip install --quiet --group wheel
	rm -rf build/wheel dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --strip --exclude "libtorch*" --exclude "libc10*" \
		--wheel-dir dist build/wheel/*.whl
	mv build/wheel/*.tar.gz dist
	$(MAKE) check-wheel

# the wheel in dist/ with TORCH and nothing else of ours, from another directory: make check-wheel TORCH=torch==2.14.1
check-wheel:  ## the wheel in dist/ under another PyTorch: TORCH=torch==2.14.1
	$(PYTHON) -m venv --clear build/clean
	build/clean/bin/pip install --quiet "$(TORCH)" dist/*.whl
	cd / && "$(CURDIR)/build/clean/bin/python" -W "ignore:Failed to initialize NumPy" "$(CURDIR)/tests/wheel_run.py"

# the oldest CPU that PyTorch itself runs on, emulated by qemu-user, must give the results of this one
old-cpu: .venv/built  ## an emulated CPU of 2008 must give the same bits; needs qemu-user
	mkdir -p build
	$(BIN)/python tests/wheel_run.py | tee build/this-cpu.txt
	qemu-x86_64 -cpu Nehalem $(BIN)/python tests/wheel_run.py | tee build/old-cpu.txt
	grep -q "baseline of baseline; $$(sed 's/.*; //' build/this-cpu.txt)$$" build/old-cpu.txt

clean:  ## removes what was built, but for .venv
	rm -rf .venv/built .venv-triton-* build dist docs/examples docs/api/command *.egg-info cbp_fast/_C.*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv .venv

# The PyTorch in use. The file changes only when TORCH does, and constrains every install: left to itself, pip fetches
# the newest PyTorch, with gigabytes of CUDA.
.venv/torch.txt: FORCE | $(BIN)/python
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" > $@

# Python compiles what is imported; all of it ahead takes longer than the rest of the installation
.venv/tools: pyproject.toml .venv/torch.txt
	$(BIN)/pip install --quiet "pip>=25.1"
	$(BIN)/pip install --no-compile "$(TORCH)"
	$(BIN)/pip install --quiet --no-compile --constraint .venv/torch.txt --group dev
	@touch $@

.venv/docs: pyproject.toml .venv/torch.txt | .venv/built
	$(BIN)/pip install --quiet --no-compile --constraint .venv/torch.txt --group docs
	@touch $@

.venv-integrations/tools: pyproject.toml
	$(PYTHON) -m venv .venv-integrations
	$(INTEGRATIONS)/pip install --quiet "pip>=25.1"
	$(INTEGRATIONS)/pip install --quiet --no-compile --group integrations
	@touch $@

.venv-zoo/tools: pyproject.toml
	$(PYTHON) -m venv .venv-zoo
	$(ZOO)/pip install --quiet "pip>=25.1"
	$(ZOO)/pip install --quiet --group zoo
	@touch $@

# all that test-all needs beside .venv
environments: .venv-integrations/tools $(OLDER_TRITONS:%=.venv-triton-%/tools)

.venv-triton-%/tools: | .venv/tools
	$(PYTHON) -m venv $(@D)
	echo "$(CURDIR)/$$(echo .venv/lib/python3*/site-packages)" > $$(echo $(@D)/lib/python3*/site-packages)/base.pth
	$(@D)/bin/pip install --quiet --no-deps triton==$*
	@touch $@

.venv/built: .venv/tools setup.py $(CSRC)
	$(BIN)/pip install --quiet --no-compile --constraint .venv/torch.txt --no-build-isolation --editable ".[bench,demo,models]"
	@touch $@
