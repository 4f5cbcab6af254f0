# Everything runs in a virtual environment that these targets make and keep up to date.
#   PYTHON     the Python (>= 3.10) to make it with
#   OPENMMLAB  openmmlab (the original packages) or onedl (the maintained forks)
#   VENV       its folder; one for each flavour by default
PYTHON ?= python3
OPENMMLAB ?= openmmlab
VENV ?= $(if $(filter onedl,$(OPENMMLAB)),.venv-onedl,.venv)

RUN := $(VENV)/bin/python
INSTALL = $(PYTHON) requirements/install.py --venv $(VENV) --openmmlab $(OPENMMLAB)
CXX_FILES = $(shell find vrwkv_ops/csrc tests tools -name '*.cpp' -o -name '*.h' -o -name '*.cu')
SHELL_FILES = .ci/run $(wildcard tools/*.sh)
PYTEST_ARGS ?=
GPU_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help python demo demo-detection demo-segmentation test test-mmcv docs install-demo install-dense install-test \
	install-lint install-mmcv install-mmcv-lite matrix lint format unit gpu cuda-compile wheel clean clean-env

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' Makefile

python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || { echo "[install] Error: \
	Python 3.10 to 3.13 is needed, and $(PYTHON) is not. Name one: make demo \
	PYTHON=/path/to/python3.12" >&2; exit 1; }

install-demo: python ## Install what classification needs
	@$(INSTALL) demo

install-dense: python ## Install what all three tasks need
	@$(INSTALL) dense

install-test: python ## Install what all three tasks and the tests need
	@$(INSTALL) test

install-lint: python
	@$(INSTALL) lint

install-mmcv: python ## Compile mmcv with its operators into the environment (10 to 20 minutes)
	@$(INSTALL) mmcv

install-mmcv-lite: python ## Go back to mmcv without compiled operators
	@$(INSTALL) mmcv-lite

demo: install-demo ## Train a small VRWKV on digits, evaluate it and draw its predictions
	$(RUN) demo/digits_demo.py

demo-detection: install-dense ## The same for detection: find digits on photographs
	$(RUN) demo/digits_detection_demo.py

demo-segmentation: install-dense ## The same for segmentation: label the pixels of digits on photographs
	$(RUN) demo/digits_segmentation_demo.py

test: install-test ## Lint and run all tests
	$(MAKE) --no-print-directory lint unit

test-mmcv: install-mmcv test ## The same tests on compiled mmcv, which then stays installed

matrix: install-lint ## Try Pythons, versions and flavours, and write the table in docs/install.md (an hour)
	$(RUN) requirements/matrix.py

# Two processes with one thread each are faster on two cores than one process with two threads.
# The tests start many processes: each would compile OpenMMLab anew if Python kept no bytecode.
unit:
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: install-lint ## Check style and spelling
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/codespell
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	for file in $(SHELL_FILES); do bash -n $$file || exit 1; done

format: install-lint ## Format Python, C++ and CUDA
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

# With the environment of the other targets if it is there, else with the torch that PYTHON has.
gpu: python ## On a machine with an NVIDIA GPU, torch and nvcc: build, test and measure the kernels
	$(or $(wildcard $(RUN)),$(PYTHON)) tools/gpu_check.py $(GPU_ARGS)

# CPATH: headers that torch wants (cusparse.h) come with its wheels where the toolkit has only nvcc.
cuda-compile: install-demo ## Compile the CUDA kernels for one architecture (needs nvcc, no GPU)
	set -e; folder=$$(mktemp -d); trap 'rm -rf $$folder' EXIT; cp -r vrwkv_ops $$folder; \
	headers=$$(printf '%s:' $(abspath $(VENV))/lib/python3*/site-packages/nvidia/*/include); \
	CPATH=$$headers$$CPATH FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$${TORCH_CUDA_ARCH_LIST:-9.0} \
	$(RUN) -m uv build --wheel --no-build-isolation --python $(RUN) \
	--out-dir $$folder/dist $$folder/vrwkv_ops

wheel: install-demo ## Build a wheel of vrwkv_ops and run it on Python 3.10 to 3.13
	$(RUN) vrwkv_ops/build_tools/check_wheel.py --out dist

# The pages are copied, so that links between folders work as they do in the checkout.
docs: install-lint ## Build the documentation site in build/site; a warning is an error
	rm -rf build/docs build/site && mkdir -p build/docs
	git ls-files -z --cached --others --exclude-standard '*.md' configs docs LICENSE | xargs -0 cp --parents -t build/docs
	$(RUN) -m mkdocs build --strict --quiet

clean: ## Remove build products and caches
	rm -rf build *.egg-info vrwkv_ops/build vrwkv_ops/src/*.egg-info .pytest_cache .ruff_cache
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

clean-env: ## Remove the virtual environment
	rm -rf $(VENV)
