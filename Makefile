# iha.c: build, test, measure. `make help` lists the targets.
#
#   make                 build ./train_iha, with CUDA where a toolkit is found (kernels/cuda/cuda.mk)
#   make deps            install what is missing: distribution packages, and .venv
#   make quickstart      from real text to a trained model in a few minutes; TEXT=FILE.txt for your own
#   make reproduce       the paper's experiments: data, training, figures, a table; QUICK=1 ONLY=binary,lm SEEDS=2 JOBS=1
#   make check           the inner loop: the C tests of units, and of CUDA kernels on an emulated GPU; ONLY=cuda: one group
#   make test            every test; SANITIZE=1 runs them under ASan and UBSan
#   make test-hf         checkpoints in PyTorch and Transformers, which it installs in .venv-hf (2.2 GB)
#   make test-watching   pages in Chromium, TensorBoard and W&B, which it installs, in .venv-watching (600 MB)
#   make test-distro     every test in another Debian release, SUITE=trixie, in build/distro; needs root and debootstrap
#   make test-toolkits   the CUDA sources against the oldest and the newest CUDA, cuDNN and NCCL, from PyPI; runs nothing
#   make test-aarch64    the unit tests and a training run, cross-compiled and under qemu; needs Debian's compiler
#   make faults          every fault and kill; make test takes a sample of them
#   make leaks           every command under LeakSanitizer, AddressSanitizer and Valgrind
#   make tsan            every command under ThreadSanitizer
#   make bench           measure, and print a table; TORCH=PYTHON: PyTorch's training steps too, in turn with ours
#   make fuzz            feed the file readers hostile files; FUZZ_SECONDS=600 for each target, FUZZ_ONLY=shards
#   make check-gpu       every operation and whole models on the GPU, against the CPU; full results in build/check-gpu.txt
#   make bench-gpu       measure on the GPU
#   make gpu-pack        both as build/gpu-pack.tar.xz, for a machine with a GPU and no compiler (scripts/pack_gpu.sh)
#   make docs            write the tables of docs/configuration.md again, from the table in model/config/config.c
#   make kernel-resources
#                        write docs/kernel-resources.md again: registers and memory of every CUDA kernel; needs nvcc
#   make golden          compute the reference cases in tests/golden again (needs jax)
#   make clean           remove what was built
#
#   WERROR=1             for any of these: a compiler's warning is an error, as in CI

.DEFAULT_GOAL = all

CC ?= cc
OBJCOPY ?= objcopy
# The machine that runs is the machine that builds; ARCH=x86-64-v3 makes a binary for others.
ARCH ?= native
SANITIZE ?= 0

# Warnings end the build for developers and in CI only, because a newer compiler has new ones.
WERROR ?= 0
ERRORS = $(if $(filter 1,$(WERROR)),-Werror)
NVCC_ERRORS = $(if $(filter 1,$(WERROR)),-Werror all-warnings)
# Clang warns of loops that it does not vectorize, and of members left out in initializers within initializers.
CLANG := $(findstring clang,$(shell $(CC) --version 2>/dev/null))
WARNINGS = -Wall -Wextra $(ERRORS) -Wno-format-truncation $(if $(CLANG),-Wno-pass-failed -Wno-missing-field-initializers)
COMMON = -std=gnu17 -g -march=$(ARCH) -fopenmp -I. $(WARNINGS)
# GCC's own choice on AVX-512 machines is 256-bit vectors; the kernels are written for the full width.
TARGET := $(shell $(CC) -dumpmachine)
ifneq ($(filter x86_64%,$(TARGET)),)
VECTORS = -mprefer-vector-width=512
endif
# Any processor of the last ten years.
PORTABLE_ARCH = $(if $(filter x86_64%,$(TARGET)),x86-64-v3,armv8-a)
ifeq ($(SANITIZE),1)
BUILD = build/sanitize
CFLAGS = $(COMMON) -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
else
BUILD = build/release
CFLAGS = $(COMMON) -O3 $(VECTORS) -fno-math-errno -fno-trapping-math
endif
LIBS = -ldnnl -lcjson -linih -lpcre2-8 -lutf8proc -lm

KERNELS = $(wildcard kernels/*.c kernels/*/*.c)
# Ranks that mpirun starts need MPI; without it ranks connect over TCP.
MPI_CFLAGS := $(shell pkg-config --cflags ompi-c 2>/dev/null || mpicc --showme:compile 2>/dev/null)
MPI_LIBS := $(shell pkg-config --libs ompi-c 2>/dev/null || mpicc --showme:link 2>/dev/null)
ifeq ($(MPI_LIBS),)
KERNELS := $(filter-out kernels/comm/transport_mpi.c,$(KERNELS))
else
MPI_FLAGS = -DWITH_MPI $(patsubst -I%,-isystem %,$(MPI_CFLAGS))
COMMON += $(MPI_FLAGS)
LIBS += $(MPI_LIBS)
endif
MODEL = $(wildcard model/*.c model/*/*.c)
DATA = $(wildcard data/*.c)

# The operations are built once more in bf16; kernels/cpu/real.h describes the builds.
CPU_BF16 = $(addprefix kernels/cpu/,act.c attention.c attention_backward.c check_products.c classifier.c collapse.c cpu.c \
    decode.c diff_combine.c embed.c fold.c gemm_bf16.c linear.c muon.c norm.c optimizer.c qk_norm.c qkv_mix.c simplicial.c talking.c)
BF16_ALONE = kernels/cpu/gemm_bf16.c
# Some of them once more in bf16, with vdpbf16ps, for processors that have it whatever ARCH says.
ifneq ($(filter x86_64%,$(TARGET)),)
CPU_PAIRS = $(addprefix kernels/cpu/,attention.c attention_backward.c collapse.c qkv_mix.c)
PAIRS_FLAGS = -DKERNELS_BF16 -DKERNELS_PAIRS -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16
endif

KERNEL_OBJECTS = $(patsubst %.c,$(BUILD)/%.o,$(filter-out $(BF16_ALONE),$(KERNELS))) $(CPU_BF16:%.c=$(BUILD)/bf16/%.o) \
    $(CPU_PAIRS:%.c=$(BUILD)/pairs/%.o)
DOUBLE_OBJECTS = $(patsubst %.c,$(BUILD)/double/%.o,$(filter-out $(BF16_ALONE),$(KERNELS)))
OTHER_OBJECTS = $(patsubst %.c,$(BUILD)/%.o,$(MODEL) $(DATA))

# Tests of gradients link the kernels built in double; the others link what training runs.
DOUBLE_TESTS = $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/unit/test_*_gradients.c tests/unit/test_facts.c))
C_TESTS = $(filter-out $(DOUBLE_TESTS),$(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/unit/test_*.c tests/ranks/test_*.c)))

# The CPU backend in double, to be linked beside the others: one object that exports a single symbol.
CPU_DOUBLE = $(BUILD)/double/cpu_double.o

ifeq ($(SANITIZE),1)
BINARY = $(BUILD)/train_iha
else
BINARY = train_iha
endif

include kernels/cuda/cuda.mk
include tests/cuda/emulator.mk
include tests/gpu/gpu.mk

.PHONY: all help deps check test test-hf test-watching test-distro test-toolkits test-aarch64 bench quickstart reproduce docs golden clean \
    format
.SECONDARY:

all: $(BINARY)

# Look for the library headers once, so that a missing one gives one line with what to do instead of pages of errors.
HEADERS = oneapi/dnnl/dnnl.h cjson/cJSON.h ini.h pcre2.h utf8proc.h
build/headers-found:
	@mkdir -p build
	@for header in $(HEADERS); do \
	    printf '#define PCRE2_CODE_UNIT_WIDTH 8\n#include <%s>\n' $$header | $(CC) -fsyntax-only -x c - 2>/dev/null || \
	    { echo "make: <$$header> is not installed; run: make deps" >&2; exit 2; }; \
	done
	@touch $@

deps:
	@scripts/deps.sh

quickstart: deps
	@$(MAKE) --no-print-directory
	@scripts/quickstart.sh "$(TEXT)"

reproduce: deps
	@$(MAKE) --no-print-directory
	@.venv/bin/python scripts/reproduce/main.py $(ONLY:%=--only=%) $(SEEDS:%=--seeds=%) $(JOBS:%=--jobs=%) \
	    $(if $(filter-out 0,$(QUICK)),--quick) $(if $(filter-out 0,$(RECORDED)),--recorded)

# By default the groups of tests/run.sh whose C tests do not start train_iha.
check: deps
	@$(MAKE) --no-print-directory -j2 check-built
	@PYTHON=no tests/run.sh $(BUILD) $(BINARY) $(or $(ONLY),unit cuda)

test: deps
	@$(MAKE) --no-print-directory -j2 $(BINARY) tests-built fuzz-built
	@tests/run.sh $(BUILD) $(BINARY)

# The tests of what Transformers does with checkpoints.
test-hf: deps
	@$(MAKE) --no-print-directory -j2 $(BINARY)
	@tests/hf/install.sh
	@tests/run.sh $(BUILD) $(BINARY) hf

# The page in a browser, TensorBoard and W&B: what the tests of make test skip where these are not installed.
test-watching: deps
	@$(MAKE) --no-print-directory -j2 $(BINARY)
	@TRAIN_IHA=$(BINARY) BUILD=$(BUILD) tests/watching.sh

test-distro:
	@tests/distro/run.sh $(SUITE)

test-toolkits: deps
	@tests/toolkits/run.sh

test-aarch64: deps
	@tests/aarch64/run.sh

.PHONY: check-built tests-built
check-built: $(filter $(BUILD)/tests/unit/%,$(C_TESTS) $(DOUBLE_TESTS)) $(filter $(BUILD)/tests/cuda/%,$(EMULATOR_BUILT))
tests-built: $(C_TESTS) $(DOUBLE_TESTS) $(EMULATOR_BUILT)

include tests/fuzz/fuzz.mk

bench: deps
	@$(MAKE) --no-print-directory $(BENCH)
	@$(BENCH) $(if $(TORCH),--torch $(TORCH))

# The text up to the marker is written by hand, the tables after it are not.
docs: $(BINARY)
	@{ sed '/^<!-- Generated/q' docs/configuration.md; $(BINARY:%=./%) --help=markdown; } >$(BUILD)/configuration.md
	@mv $(BUILD)/configuration.md docs/configuration.md

golden:
	.venv/bin/pip install --quiet jax
	.venv/bin/python tests/reference/make_golden.py

help:
	@sed -n 's/^#   //p' Makefile

$(BINARY): $(BUILD)/train_iha.o $(KERNEL_OBJECTS) $(OTHER_OBJECTS) $(CUDA_LINKED) $(BUILD)/cuda/linked-with
	@mkdir -p $(@D)
	@echo "  LINK $@ $(CUDA_SUMMARY)"
	@$(CC) $(CFLAGS) $(filter %.o,$^) -o $@ $(LIBS) $(CUDA_LINK)

$(BUILD)/train_iha.o: train_iha.cu | build/headers-found
	@mkdir -p $(@D)
	@echo "  CC   $<"
	@$(CC) $(CFLAGS) -MMD -MP -x c -c $< -o $@

$(BUILD)/double/%.o: %.c | build/headers-found
	@mkdir -p $(@D)
	@echo "  CC   $<"
	@$(CC) $(CFLAGS) -DKERNELS_DOUBLE -MMD -MP -c $< -o $@

$(BUILD)/bf16/%.o: %.c | build/headers-found
	@mkdir -p $(@D)
	@echo "  CC   $< (bf16)"
	@$(CC) $(CFLAGS) -DKERNELS_BF16 -MMD -MP -c $< -o $@

$(BUILD)/pairs/%.o: %.c | build/headers-found
	@mkdir -p $(@D)
	@echo "  CC   $< (vdpbf16ps)"
	@$(CC) $(CFLAGS) $(PAIRS_FLAGS) -MMD -MP -c $< -o $@

$(BUILD)/%.o: %.c | build/headers-found
	@mkdir -p $(@D)
	@echo "  CC   $<"
	@$(CC) $(CFLAGS) -MMD -MP -c $< -o $@

# Its text is in the program, which the compiler does not list as a dependency.
$(BUILD)/model/checkpoint/transformers.o build/fuzz/model/checkpoint/transformers.o: $(wildcard model/checkpoint/hf/*.py)

$(CPU_DOUBLE): $(DOUBLE_OBJECTS)
	@mkdir -p $(@D)
	@$(LD) -r $^ -o $@
	@$(OBJCOPY) --redefine-sym kernels_cpu=kernels_cpu_double --keep-global-symbol=kernels_cpu_double $@

BENCH = $(BUILD)/tests/bench/bench
$(BUILD)/tests/unit/test_bf16: $(CPU_DOUBLE)
$(C_TESTS) $(BENCH): $(BUILD)/tests/%: $(BUILD)/tests/%.o $(KERNEL_OBJECTS) $(OTHER_OBJECTS)
	@mkdir -p $(@D)
	@echo "  LINK $@"
	@$(CC) $(CFLAGS) $^ -o $@ -lcmocka $(LIBS)

$(DOUBLE_TESTS): $(BUILD)/tests/%: $(BUILD)/double/tests/%.o $(DOUBLE_OBJECTS) $(OTHER_OBJECTS)
	@mkdir -p $(@D)
	@echo "  LINK $@"
	@$(CC) $(CFLAGS) $^ -o $@ -lcmocka $(filter-out -ldnnl,$(LIBS))

clean:
	rm -rf build train_iha

format:
	clang-format -i $$(git ls-files '*.c' '*.h' '*.cc' '*.cpp' '*.cu' '*.cuh')

include tests/faults/faults.mk
-include $(shell find build -path build/distro -prune -o -name '*.d' -print 2>/dev/null)
