# Every target sets up what it needs: a virtual environment in the checkout with the package installed
# in place. PyTorch is the one that PYTHON already has, if it is 2.10 or newer; else TORCH is installed.
PYTHON ?= python3
TORCH ?= torch==2.14.1 torchvision==0.29.1
CORE_TORCH ?= torch==2.13.0

BIN := .venv/bin
CORE_BIN := .venv-core/bin
PIP := -m pip install --quiet --disable-pip-version-check
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
EMULATION := $(wildcard tests/emulation/*.h tests/emulation/*.cpp tests/emulation/*.cu)
BUILD := CMakeLists.txt setup.py pyproject.toml $(CPP)
HAS_TORCH := import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10))

# tests run in a process for each core: threads of one would wait for those of another, and where a test
# starts some they sleep while they wait, instead of taking the core from those that they wait for
PARALLEL := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

# what runs in Triton's interpreter, and what compiles for every architecture
CONVS := tests/test_conv_fwd.py tests/test_conv_bias_act.py tests/test_conv_int8.py tests/test_conv_dgrad.py \
	tests/test_conv_wgrad.py tests/test_stem_conv.py
INTERPRETED := tests/test_gpu_kernels.py $(CONVS) tests/test_conv_bn_act.py tests/test_stem.py tests/test_traffic.py \
	tests/test_inference_gpu.py tests/test_quantize_gpu.py tests/test_quantize_int8.py
CODEGEN := tests/test_triton_codegen.py tests/test_cuda_codegen.py tests/test_quantize_int8.py $(CONVS)

.PHONY: demo test test-full torches lint test-main test-interpreted test-emulated test-core codegen matrix bench format clean

demo: .venv/ready
	mkdir -p demo && rm -rf demo/digits
	$(BIN)/fusedres info
	$(BIN)/fusedres bench --model resnet50 --batch 16 --dtype bf16 --mode train --json demo/bench.json --plot demo/bench.png
	$(BIN)/fusedres train --data digits --out demo/digits
	@echo "The table above is in demo/bench.json, the picture in demo/bench.png, the trained net in demo/digits."

test: torches lint test-main test-interpreted test-emulated test-core

# side by side: unpacking one keeps one core busy
torches:
	$(MAKE) --jobs 2 .venv/torch .venv-core/torch

# three training steps instead of one, also in the interpreter
test-full: test
	$(BIN)/python -m pytest tests -m full
	$(PARALLEL) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/test_training_step.py -m full

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP) $(EMULATION)

test-main: .venv/ready
	$(PARALLEL) $(BIN)/python -m pytest -n auto --dist loadgroup tests --durations=10

# the Triton kernels on a CPU, in Triton's interpreter
test-interpreted: .venv/ready
	$(PARALLEL) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --dist worksteal tests/test_training_step.py $(INTERPRETED)

# the CUDA kernels on a CPU, compiled by g++ with sanitizers over an emulation of the execution model
test-emulated: .venv/ready
	variables=$$($(BIN)/python tests/emulation/build.py --env); status=$$?; \
	if [ $$status = 77 ]; then exit 0; fi; \
	[ $$status = 0 ] && env $$variables $(BIN)/python -m pytest -n auto --dist worksteal \
		tests/emulation tests/test_gpu_kernels.py tests/test_bn_relu_maxpool.py tests/test_bias_relu_maxpool.py \
		tests/test_global_avg_pool.py tests/test_cast_weights.py tests/test_stem_kernels.py tests/test_stem.py \
		tests/test_conv_dgrad.py

# a plain install without nvcc, Triton and torchvision, on another PyTorch; the real data are test-main's, and
# so is what asks nothing of PyTorch, or much of the machine
ELSEWHERE := test_cuda_codegen test_gpu_check test_report test_report_browser test_roofline test_tables
test-core: .venv-core/ready
	FUSEDRES_DATA= $(PARALLEL) $(CORE_BIN)/python -m pytest -n auto --dist loadgroup tests --durations=5 \
		$(ELSEWHERE:%=--ignore tests/%.py)

# every configuration of every kernel for every architecture
codegen: .venv/ready
	$(BIN)/python -m pytest -n auto $(CODEGEN) -m 'codegen or not codegen'

# installs into fresh environments, with and without nvcc and Triton: MATRIX="--torch 2.14.1 2.10.0"
matrix:
	$(PYTHON) tests/install_matrix.py $(MATRIX)

bench: .venv/ready
	$(BIN)/python -m pytest benchmarks --benchmark-only --full --benchmark-autosave
	$(BIN)/python benchmarks/scaling.py --out .benchmarks/scaling.jsonl

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP) $(EMULATION)

clean:
	rm -rf .venv .venv-core build demo fusedres/_C*.so

.venv/torch:
	if $(PYTHON) -c '$(HAS_TORCH)' 2> /dev/null; then \
		$(PYTHON) -m venv --system-site-packages .venv; \
	else \
		$(PYTHON) -m venv .venv && $(BIN)/python $(PIP) $(TORCH); \
	fi
	touch $@

.venv/ready: .venv/torch $(BUILD)
	$(BIN)/python $(PIP) --editable '.[test]'
	touch $@

.venv-core/torch:
	$(PYTHON) -m venv .venv-core
	$(CORE_BIN)/python $(PIP) $(CORE_TORCH) 'pytest<9.2' pytest-benchmark pytest-xdist pillow
	touch $@

.venv-core/ready: .venv-core/torch $(BUILD) $(wildcard fusedres/*.py fusedres/*/*.py fusedres/*/*/*.py)
	FUSEDRES_BUILD_CUDA=0 $(CORE_BIN)/python $(PIP) .
	touch $@
