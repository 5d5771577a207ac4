# Every target first makes .venv, with torch and polarfast in it, unless it is there and up to date.
#   make demo   make demo-quick   make test   make test-fast   make test-faults   make test-abi
#   make test-zoo   make sanitize   make lint   make bench   make bench-guard
# Another interpreter: make PYTHON=python3.12.  Another torch: make TORCH='torch==2.13.0'.

PYTHON ?= python3
TORCH ?= torch>=2.10
OTHER_TORCH ?= torch==2.13.0
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

SANITIZE ?= address,undefined
CALLS ?= 20000

.PHONY: install demo demo-quick test test-fast test-faults test-abi test-zoo sanitize lint bench bench-guard clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install '$(TORCH)' torchvision 'setuptools>=77' wheel ninja pybind11
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[train,dev]'
	touch $@

demo: $(STAMP)
	@$(BIN)/polarfast demo $(ARGS)

demo-quick: $(STAMP)
	@$(BIN)/polarfast demo --quick --out runs/demo-quick $(ARGS)

# One worker for each core, one thread for each worker.
test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# Of every room what takes less than about a second.
test-fast: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" $(ARGS)

# Damaged files, bombs and foreign folders, 500 and more of each kind; prints what came of them.
test-faults: $(STAMP)
	$(BIN)/python -m pytest -q tests/faults --faults 500 $(ARGS)

# The extension as it was built above, under another torch, which it was not built against.
test-abi: $(STAMP)
	test -x .venv-abi/bin/python || $(PYTHON) -m venv .venv-abi
	.venv-abi/bin/python -m pip install --quiet '$(OTHER_TORCH)' pytest hypothesis
	PYTHONPATH=$(CURDIR) .venv-abi/bin/python -m pytest -q tests/kernels/test_polarize*.py \
		$(patsubst %,tests/kernels/test_%.py,valley gather put_back table) \
		tests/stepping/test_step.py tests/slimming/test_slim.py

# The networks of other packages, which are installed into an environment of their own.
ZOO := tests/conformance/requirements-zoo.txt
test-zoo: .venv-zoo/.packages
	YOLO_CONFIG_DIR=$(CURDIR)/.venv-zoo YOLO_OFFLINE=true HF_HUB_OFFLINE=1 \
	.venv-zoo/bin/python -m pytest tests/conformance/test_networks.py --models zoo $(ARGS)

.venv-zoo/.packages: $(ZOO) pyproject.toml setup.py $(wildcard csrc/*)
	$(MAKE) VENV=.venv-zoo install
	.venv-zoo/bin/python -m pip install --quiet --no-deps -r $(ZOO)
	touch $@

# The extension with every access checked: the tests of the ops, then calls that nobody should make (all of this ends at
# the first finding). Python is not built with a sanitizer, so the runtimes come first into the process; torch is not, so
# that what it keeps for good counts as no leak.  make sanitize SANITIZE=thread: what threads do at once, instead.
ifeq ($(SANITIZE),thread)
RUNTIMES = tsan stdc++
SANITIZED_TESTS = tests/kernels/test_together.py tests/stepping/test_threads.py
else
RUNTIMES = asan ubsan stdc++
SANITIZED_TESTS = tests/kernels tests/stepping/test_threads.py
endif
# At addresses that are not drawn at random, which the runtime for threads needs.
SANITIZED = setarch -R env LD_PRELOAD="$(foreach name,$(RUNTIMES),$(shell g++ -print-file-name=lib$(name).so))" \
	PYTHONPATH=$(CURDIR)/build/$(SANITIZE)/lib:$(CURDIR)/tests PYTHONMALLOC=malloc OMP_NUM_THREADS=1 \
	ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1:allocator_may_return_null=1 $(CURDIR)/$(BIN)/python

sanitize: $(STAMP)
	POLARFAST_SANITIZE=$(SANITIZE) $(BIN)/python setup.py -q build --build-base build/$(SANITIZE) \
		--build-lib build/$(SANITIZE)/lib
	cd build/$(SANITIZE)/lib && $(SANITIZED) -m pytest -q -p no:xdist -p no:cacheprovider -c $(CURDIR)/pyproject.toml \
		--rootdir $(CURDIR) $(addprefix $(CURDIR)/,$(SANITIZED_TESTS)) \
		-k "not triton and not compile and not export and not instruction"
	cd build/$(SANITIZE)/lib && $(SANITIZED) -m support.hostile $(CALLS) 2> stderr.txt || \
		{ grep -v '^frame #' stderr.txt | tail -40; exit 1; }

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# What takes time and what saves it: docs/benchmarks.md, in ten minutes on a machine that does nothing else.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps torch-pruning
	$(BIN)/python benchmarks/speed_page.py --write docs/benchmarks.md

# What can be counted of it, with exact bounds; `make test` has these, too.
bench-guard: $(STAMP)
	$(BIN)/python -m pytest -q -m guard $(ARGS)

clean:
	rm -rf $(VENV) .venv-abi .venv-zoo build dist *.egg-info polarfast/_C*.so
