# SPDX-License-Identifier: Apache-2.0
# A fresh machine needs Python 3.11 to 3.13 and make; every target sets up what it needs.
# The environments of the reference (make oracle, make golden) need Python 3.11: ORACLE_PYTHON.

PYTHON ?= python3
ORACLE_PYTHON ?= $(PYTHON)
GPU_PYTHON ?= $(PYTHON)
GPU_RESULTS ?= benchmarks/results/gpu
VENV ?= .venv
ENVIRONMENTS ?= .cache/oracle

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
PEERS := hf437 hf457 hf5 ct2
DECODERS := hf457 hf5 ct2 kh
TRAINERS := hf457 hf5
PEERS_READY := $(PEERS:%=$(ENVIRONMENTS)/%/.ready)

.DEFAULT_GOAL := help
.PHONY: help demo test test-flash test-slow oracle gpu gpu-full golden lint format typecheck docs train-sums accuracy memory bench-decode bench-train generation-memory fuzz conversion wheel clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | awk -F '\t' '{printf "  %-18s %s\n", $$1, $$2}'

demo: $(INSTALLED)  ## the main job: one checkpoint, three frameworks, one answer
	$(BIN)/opt-zoo demo

test: $(READY)  ## lint, types and all tests, each backend in a process of its own
	$(BIN)/python tests/run.py

test-slow: $(READY)  ## the tests that take more than a minute each, and those that compile much
	$(BIN)/python tests/run.py --slow

test-flash: $(ENVIRONMENTS)/flash/.ready  ## the flash_attn package itself on a CPU, in Triton's interpreter (about five minutes)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE \
		$(ENVIRONMENTS)/flash/bin/python -m pytest -m flash tests/flash

oracle: $(READY) $(PEERS_READY)  ## compare live with transformers 4.37.2, 4.57.1, 5.23 and CTranslate2
	OPT_ZOO_PEERS=$(ENVIRONMENTS) $(BIN)/python -m pytest -m oracle tests/oracle
	$(BIN)/python docs/make_numerics.py

gpu:  ## on a CUDA GPU, in GPU_PYTHON as it is: the most telling tests and measurements, in eight minutes
	$(GPU_PYTHON) benchmarks/gpu.py --budget 460 --results $(GPU_RESULTS) $(GPU_OPTIONS); failed=$$?; \
	$(GPU_PYTHON) docs/make_performance.py && exit $$failed

gpu-full:  ## all tests and benchmarks of a GPU, in GPU_PYTHON as it is
	$(GPU_PYTHON) benchmarks/gpu.py --full --results $(GPU_RESULTS) $(GPU_OPTIONS); failed=$$?; \
	$(GPU_PYTHON) docs/make_performance.py && exit $$failed

golden: $(ENVIRONMENTS)/hf437/.ready  ## remake the golden files with transformers 4.37.2
	for script in tests/golden/make_*.py; do $(ENVIRONMENTS)/hf437/bin/python $$script || exit 1; done

lint: $(READY)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## let ruff format the code and put imports in order
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

typecheck: $(READY)  ## mypy
	$(BIN)/mypy

docs: $(READY)  ## write docs/weights.md from the parameter table, and the pairs of formats
	$(BIN)/python docs/make_weights.py
	$(BIN)/python docs/make_conversion.py

train-sums: $(READY)  ## train the small model from nothing in each framework (about four minutes each)
	for backend in torch tf flax; do $(BIN)/python examples/from_scratch_$$backend.py --output .cache/sums-$$backend || exit 1; cp .cache/sums-$$backend/log.jsonl benchmarks/results/from_scratch_$$backend.jsonl; done
	$(BIN)/python docs/make_training.py

fuzz: $(READY)  ## 200,000 damaged files through every reader (about four minutes)
	$(BIN)/python -m tests.fuzz.run --inputs 200000 --jobs 2

accuracy: $(INSTALLED)  ## the embedded model on every held-out problem, in the three frameworks
	$(BIN)/opt-zoo accuracy

memory: $(READY)  ## peak memory and seconds of from_pretrained in the three frameworks
	$(BIN)/python benchmarks/loading_memory.py

bench-decode: $(READY) $(DECODERS:%=$(ENVIRONMENTS)/%/.ready)  ## decoding beside the peers (about half an hour, idle machine)
	OPT_ZOO_PEERS=$(ENVIRONMENTS) $(BIN)/python benchmarks/decode.py --json benchmarks/results/decode.json --plot docs/decoding.png
	$(BIN)/python docs/make_performance.py

bench-train: $(READY) $(TRAINERS:%=$(ENVIRONMENTS)/%/.ready)  ## training beside transformers (about a quarter of an hour, idle machine)
	OPT_ZOO_PEERS=$(ENVIRONMENTS) $(BIN)/python benchmarks/train.py --json benchmarks/results/train.json
	$(BIN)/python docs/make_performance.py

generation-memory: $(READY)  ## peak memory of generate in the three frameworks
	$(BIN)/python benchmarks/generation_memory.py --json benchmarks/results/generation_memory.json
	$(BIN)/python docs/make_performance.py

conversion: $(READY)  ## memory and seconds of converting opt-1.3b between every two formats (10 GB of disk)
	$(BIN)/python benchmarks/conversion.py

wheel: $(READY)  ## build dist/*.whl and the source archive
	$(BIN)/python -m build

clean:  ## remove environments, caches and what was built
	rm -rf $(VENV) .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "opt-zoo needs Python 3.11 to 3.13, found %d.%d. Try: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[all-cpu]'
	@touch $@

$(READY): $(INSTALLED)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[all-cpu,dev]'
	@touch $@

# Another Triton than PyTorch asks for: newer ones refuse the package's kernels. Of the package only Python is
# built; its Triton kernels are said to be for AMD.
$(ENVIRONMENTS)/flash/.ready: tests/flash/requirements.txt tests/flash/requirements-kernels.txt
	@test ! -e $(@D) -o -e $(@D)/pyvenv.cfg || { echo "$(@D) is no environment: move it away, or set ENVIRONMENTS"; exit 1; }
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -r tests/flash/requirements.txt
	FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE \
		$(@D)/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -r tests/flash/requirements-kernels.txt
	@touch $@

$(ENVIRONMENTS)/%/.ready: tests/oracle/requirements-%.txt
	@$(ORACLE_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "The reference needs Python 3.11, found %d.%d. Try: make ORACLE_PYTHON=python3.11 ..." % sys.version_info[:2])'
	@test ! -e $(@D) -o -e $(@D)/pyvenv.cfg || { echo "$(@D) is no environment: move it away, or set ENVIRONMENTS"; exit 1; }
	rm -rf $(@D)
	$(ORACLE_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install -q --disable-pip-version-check -r $<
	@touch $@
