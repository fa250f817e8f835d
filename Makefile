# Every target does its own set-up: `make demo` and `make test` work from a bare clone with python3.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Kernels for the CPU only unless asked otherwise: FDM_CUDA=ON compiles every CUDA architecture.
FDM_CUDA ?= OFF

INSTALLED := $(VENV)/.installed
NATIVE := $(wildcard csrc/*.h csrc/*.cc csrc/cpu/* csrc/cuda/* csrc/paddle/*)

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

# Editable: Python files are used where they stand; the kernels are built once and after a change.
$(INSTALLED): pyproject.toml CMakeLists.txt fd_minicpm41_autoload.pth $(NATIVE)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --config-settings=cmake.define.FDM_CUDA=$(FDM_CUDA) \
	    --editable '.[cpu,demo,plot,test,dev]'
	@touch $@

.PHONY: install
install: $(INSTALLED) ## Make .venv with the package and everything its tests need

.PHONY: demo
demo: $(INSTALLED) ## Find facts, think and call a tool with the small trained model, on this CPU
	$(BIN)/fd-minicpm41 demo $(DEMO_ARGS)

.PHONY: demo-smollm2
demo-smollm2: $(INSTALLED) ## Fetch SmolLM2-135M, which some tests use, and answer with it
	$(BIN)/fd-minicpm41 demo --model smollm2 $(DEMO_ARGS)

.PHONY: test
test: $(INSTALLED) ## Run the tests that need neither GPU nor FastDeploy (ARGS=... go to pytest)
	$(BIN)/python -m pytest $(ARGS)

.PHONY: coverage
coverage: $(INSTALLED) ## The same with line coverage, at least 90 %
	$(BIN)/python -m pytest --cov --cov-report=term-missing --cov-fail-under=90 $(ARGS)

# The reference is Paddle, whose allocations are not our concern; and its libraries must be found
# although the sanitizer opens them in Paddle's stead.
ASAN_OPTIONS := detect_leaks=0:alloc_dealloc_mismatch=0:abort_on_error=1

.PHONY: test-sanitize
test-sanitize: $(INSTALLED) ## Run the op tests on kernels built with AddressSanitizer and UBSan
	$(BIN)/cmake -S . -B build/sanitize -DFDM_SANITIZE=ON -DFDM_CUDA=OFF -DCMAKE_BUILD_TYPE=RelWithDebInfo
	$(BIN)/cmake --build build/sanitize
	ASAN_OPTIONS=$(ASAN_OPTIONS) UBSAN_OPTIONS=print_stacktrace=1 \
	FD_MINICPM41_KERNELS=build/sanitize/libfd_minicpm41_kernels.so \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	LD_LIBRARY_PATH="$$($(BIN)/python -c 'import importlib.util as u; print(u.find_spec("paddle").submodule_search_locations[0])')/libs" \
	$(BIN)/python -m pytest -p no:cacheprovider tests/test_rope_and_write_kv.py \
	    tests/test_compress_keys.py tests/test_select_blocks.py tests/test_sparse_attention.py \
	    tests/test_ops_bad_input.py tests/test_low_bit_linear.py $(ARGS)

# The wheel goes into a fresh environment on top of FastDeploy's requirements: tests/host/README.md.
.PHONY: test-host
test-host: $(INSTALLED) ## Test on the real FastDeploy, on this CPU: FASTDEPLOY_SRC=checkout ARGS=...
	BUILD_PYTHON=$(BIN)/python tests/host/run.sh $(ARGS)

# PyTorch brings the tensors, the kernels are a build of their own, for every architecture.
GPU_KERNELS := build/gpu/libfd_minicpm41_kernels.so
$(GPU_KERNELS): $(INSTALLED)
	$(BIN)/cmake -S . -B build/gpu -DFDM_CUDA=ON -DCMAKE_BUILD_TYPE=Release
	$(BIN)/cmake --build build/gpu --parallel $$(nproc)
	$(PIP) install --quiet torch
	@touch $@

.PHONY: test-gpu
test-gpu: $(GPU_KERNELS) ## Test the CUDA kernels on this machine's GPU (ARGS=... go to pytest)
	FD_MINICPM41_KERNELS=$(GPU_KERNELS) $(BIN)/python -m pytest tests/gpu $(ARGS)

KIND ?= decode
.PHONY: benchmark
benchmark: $(GPU_KERNELS) ## Measure on this GPU: KIND=decode, prefill, linear or step, ARGS=...
	FD_MINICPM41_KERNELS=$(GPU_KERNELS) $(BIN)/python benchmarks/minicpm41_performance.py $(KIND) $(ARGS)

.PHONY: accuracy
accuracy: demo-smollm2 ## Measure what each weight format costs SmolLM2 (half an hour)
	$(BIN)/python benchmarks/quantization_smollm2.py

.PHONY: parity-data
parity-data: demo-smollm2 ## Record anew what PyTorch gives: SmolLM2's tokens, the small model's logits
	$(PYTHON) -m venv .venv-transformers
	.venv-transformers/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0
	.venv-transformers/bin/pip install --quiet .
	PYTHONPATH=benchmarks .venv-transformers/bin/python tests/data/make_small_model_logits.py
	.venv-transformers/bin/python tests/data/make_smollm2_greedy.py \
	    .demo/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: lint
lint: $(INSTALLED) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@git ls-files 'csrc/*.h' 'csrc/*.cc' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | \
	    xargs $(BIN)/clang-format --dry-run --Werror

.PHONY: format
format: $(INSTALLED) ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@git ls-files 'csrc/*.h' 'csrc/*.cc' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh' | \
	    xargs $(BIN)/clang-format -i

.PHONY: wheel
wheel: $(INSTALLED) ## Build the wheel into dist/
	$(PIP) wheel --quiet --no-deps --config-settings=cmake.define.FDM_CUDA=$(FDM_CUDA) \
	    --wheel-dir dist .

.PHONY: clean
clean: ## Remove everything that was built, the environments too
	rm -rf $(VENV) .venv-host .venv-transformers .demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
