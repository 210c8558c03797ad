# make            what there is to do
# make demo       on a fresh machine: sets up .venv first, with the CPU build of torch
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The release that the figures in the documentation were measured with; TORCH=2.14.1 tries another.
TORCH ?= 2.13.0
# The Triton that this torch pins; its kernels are compiled and interpreted without a card.
TRITON ?= 3.7.1
# Which build of it: PyPI's with CUDA for test-gpu and bench-gpu beside a driver of NVIDIA's, and from
# then on; else the small one without.
TORCH_BUILD ?= $(if $(or $(wildcard $(VENV)/.torch-$(TORCH)-cuda),$(and $(filter %-gpu,$(MAKECMDGOALS)),\
  $(shell command -v nvidia-smi))),cuda,cpu)
PYTHON ?= python3
PYTEST_ARGS ?=
BACKEND ?= cpu
WORKERS ?= 1

VENV := .venv
BIN := $(VENV)/bin
NIXL := $(VENV)-nixl
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet --quiet
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: help demo test test-processes test-ray test-nixl fuzz faults lint types wheel-test conformance bench \
  setup clean cuda-gate cuda-interpreted test-gpu bench-gpu test-ascend ascend-stand-in ascend-t2 ascend-t3 test-npu

help: ## this list
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/make \1|\2/p' Makefile | awk -F'|' '{printf "%-22s %s\n", $$1, $$2}'

demo: $(VENV)/.run ## a tiny Step-3 reads digits, its attention on one backend and its FFN on another
	@$(BIN)/python examples/digits_demo.py

test: $(VENV)/.dev ## the test suite, a worker for each core; PYTEST_ARGS="-k config" for a part
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup \
	  -m "not processes and not ray and not wheel" $(PYTEST_ARGS)

test-processes: $(VENV)/.dev ## roles in many processes: sets, spares, launchers, faults; some minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m processes $(PYTEST_ARGS)

fuzz: $(VENV)/.dev ## 100,000 hostile peers against shm and against tcp, some two minutes
	@STEP3_HETERO_FUZZ_ROUNDS=100000 $(BIN)/python -m pytest tests/transport/test_fuzz.py

test-ray: $(VENV)/.dev ## the roles as actors over a local Ray cluster of three nodes; installs ray
	@$(PIP) install --editable '.[cpu,distributed]'
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray tests/afd

test-nixl: $(VENV)/.dev $(NIXL)/.installed ## the transport nixl in host memory over UCX; a folder of 240 MB
	@PYTHONPATH=$(NIXL) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -k nixl tests/transport \
	  tests/afd/test_pieces.py tests/afd/test_pieces_roles.py $(PYTEST_ARGS)

lint: $(VENV)/.dev ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.dev ## mypy --strict over the package and bench/
	@$(BIN)/mypy -p step3_hetero -p bench

wheel-test: $(VENV)/.dev ## build the wheel, install it away from the repository, run it there
	@$(BIN)/python -m pytest -m wheel tests/test_packaging.py

conformance: $(VENV)/.dev ## certify BACKEND (cpu) in full, some minutes, and renew docs/ops.md
	@$(BIN)/step3-hetero conformance run --backend $(BACKEND) --full --workers $(WORKERS) \
	  --json docs/certificates/$(BACKEND).certificate.json
	@$(BIN)/python -m step3_hetero.conformance.ops_page

bench: $(VENV)/.dev ## time the backends on this machine
	@$(BIN)/python -m bench

faults: $(VENV)/.dev ## a hundred rounds of random faults with 64 requests under way, some 12 minutes
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m faults.run

cuda-gate: $(VENV)/.dev ## compile every CUDA kernel for sm_80 and sm_90, without a card
	@$(BIN)/python -m bench.gpu_compiled

cuda-interpreted: $(VENV)/.dev ## certify the CUDA kernels in Triton's interpreter, some ten minutes
	@$(BIN)/step3-hetero conformance run --backend cuda --option interpret=true --deadline 1800 \
	  --workers $(WORKERS) --json docs/certificates/cuda-interpreted.certificate.json
	@$(BIN)/python -m step3_hetero.conformance.ops_page

test-gpu: $(VENV)/.dev ## certify cuda in full on the card of this machine; without one, say so
	@$(BIN)/python -m bench.gpu --test

bench-gpu: $(VENV)/.dev ## time the CUDA kernels on the card of this machine; without one, say so
	@$(BIN)/python -m bench.gpu

test-ascend: $(VENV)/.dev ## the Ascend backend on a stand-in device (tier 1)
	@$(BIN)/python -m pytest tests/ascend

ascend-stand-in: $(VENV)/.dev ## certify the Ascend backend on its stand-in device (tier 1), some minutes
	@STEP3_HETERO_ASCEND_STAND_IN=tests/ascend/device $(BIN)/step3-hetero conformance run \
	  --backend ascend --full --workers $(WORKERS) \
	  --json docs/certificates/ascend-stand-in.certificate.json
	@$(BIN)/python -m step3_hetero.conformance.ops_page

ascend-t2: $(VENV)/.dev ## its calls against the real torch_npu, without a card (tier 2)
	@$(BIN)/python tests/ascend/t2/run.py

ascend-t3: $(VENV)/.dev ## its Triton kernels through the vendor's open compiler (tier 3)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/ascend/t3/run.py

test-npu: ## on a machine with a 910B: certify it and write ascend.certificate.json (tier 4)
	@$(PYTHON) -c 'import torch_npu' || { echo "torch_npu does not import: see docs/ascend.md" >&2; exit 1; }
	@$(PYTHON) -m step3_hetero.cli conformance run --backend ascend --full \
	  --json ascend.certificate.json

setup: $(VENV)/.dev ## only set up .venv

clean: ## remove .venv and everything built
	@rm -rf $(VENV) $(NIXL) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache

# One empty file for each finished step of the setup; pip runs again when pyproject.toml changes.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { found=$$($(PYTHON) --version 2>/dev/null) || found="not on this machine"; \
	    echo "$(PYTHON) is $$found; Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; \
	    exit 1; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# PyPI's torch for x86 Linux brings gigabytes of CUDA libraries. The CPU build has a version of its
# own: from a folder that pip knows, else from PyTorch's index, else PyPI's after all.
$(VENV)/.torch-$(TORCH)-cpu: $(VENV)/.created
	@echo "installing torch $(TORCH)"
	@$(PIP) install "torch==$(TORCH)+cpu" 2>$(VENV)/torch.log || \
	  $(PIP) install --retries 1 --timeout 20 --extra-index-url $(TORCH_INDEX) "torch==$(TORCH)+cpu" 2>>$(VENV)/torch.log || \
	  { echo "no CPU build of torch $(TORCH) at hand (see $(VENV)/torch.log): taking the default build"; \
	    $(PIP) install "torch==$(TORCH)"; }
	@touch $@

# To pip the CPU build is this version too, and would stay.
$(VENV)/.torch-$(TORCH)-cuda: $(VENV)/.created
	@echo "installing torch $(TORCH) with CUDA: gigabytes"
	@$(PIP) uninstall --yes torch 2>$(VENV)/torch.log
	@$(PIP) install "torch==$(TORCH)"
	@touch $@

$(VENV)/.run: pyproject.toml $(VENV)/.torch-$(TORCH)-$(TORCH_BUILD)
	@echo "installing step3-hetero"
	@$(PIP) install --editable '.[cpu,plan]'
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.run
	@echo "installing what tests and checks need"
	@$(PIP) install --editable '.[cpu,plan,dev]'
	@[ "$$(uname -sm)" != "Linux x86_64" ] || $(PIP) install --no-deps "triton==$(TRITON)"
	@touch $@

# Apart from .venv, and without what it asks for: its torch would be the one with CUDA.
$(NIXL)/.installed:
	@echo "installing nixl in $(NIXL)"
	@$(PIP) install --no-deps --upgrade --target $(NIXL) 'nixl==1.5.1' 'nixl-cu12==1.5.1'
	@touch $@
