# What needs a GPU: `make check-gpu` and `make bench-gpu`. Included by the Makefile.
#
# The test programs of tests/cuda/ are linked once more: the same objects, with nvcc's code and the real runtime instead
# of the emulator. `make gpu-programs` builds everything and runs nothing, which works without a GPU.

# These test the emulator itself, or replace cuDNN.
EMULATOR_ONLY = %_emulator.c %_streams.c %_nccl.c %_determinism.c %_cudnn.c %_libraries.c %_plan_file.c
GPU_TESTS = $(patsubst tests/cuda/test_%.c,$(BUILD)/gpu/test_%,$(filter-out $(EMULATOR_ONLY),$(wildcard tests/cuda/test_*.c)))
GPU_LINKED = $(CUDA_LINKED) $(KERNEL_OBJECTS) $(OTHER_OBJECTS)
GPU_LINK = $(CC) $(CFLAGS) $(filter %.o,$^) -o $@ -lcmocka $(LIBS) $(CUDA_LINK)

$(GPU_TESTS): $(BUILD)/gpu/test_%: $(BUILD)/tests/cuda/test_%.o $(BUILD)/tests/gpu/control.o \
    $(CPU_DOUBLE) $(GPU_LINKED) $(BUILD)/cuda/linked-with
	@mkdir -p $(@D)
	@echo "  LINK $@"
	@$(GPU_LINK)

$(BUILD)/gpu/check_gpu: $(BUILD)/tests/gpu/check_gpu.o $(CPU_DOUBLE) $(GPU_LINKED) $(BUILD)/cuda/linked-with
	@mkdir -p $(@D)
	@echo "  LINK $@"
	@$(GPU_LINK)

# Of the benchmark, the timing and the tracing are C++ for the sake of the toolkit's headers. CUPTI is optional.
CUPTI := $(call cuda_lib,cupti)
CUPTI_HEADER := $(firstword $(wildcard $(CUDA_INCLUDE_DIRS:%=%/cupti.h) $(CUDA_HOME)/extras/CUPTI/include/cupti.h))
CUPTI_FLAGS = $(if $(and $(CUPTI),$(CUPTI_HEADER)),-DHAVE_CUPTI -isystem $(dir $(CUPTI_HEADER)))
CUPTI_LINK = $(if $(CUPTI_FLAGS),$(CUPTI) -Wl$(comma)-rpath$(comma)$(abspath $(dir $(CUPTI))))
$(BUILD)/cuda/tests/bench/%.o: tests/bench/%.cu $(BUILD)/cuda/compiled-with
	@mkdir -p $(@D)
	@echo "  NVCC $<"
	@$(NVCC) -std=c++17 -O2 -I. $(CUDA_ISYSTEM) $(CUDA_ARCHS) $(CUPTI_FLAGS) $(NVCC_ERRORS) \
	    $(addprefix -Xcompiler ,$(CUDA_WARNINGS)) -MMD -MP -c $< -o $@

$(BUILD)/tests/bench/bench_gpu.o: CFLAGS += $(CUDA_ISYSTEM)
$(BUILD)/gpu/bench_gpu: $(BUILD)/tests/bench/bench_gpu.o $(BUILD)/cuda/tests/bench/timing.o $(BUILD)/cuda/tests/bench/activity.o \
    $(GPU_LINKED) $(BUILD)/cuda/linked-with
	@mkdir -p $(@D)
	@echo "  LINK $@"
	@$(GPU_LINK) $(CUPTI_LINK)

.PHONY: gpu-programs check-gpu bench-gpu gpu-found gpu-pack
ifeq ($(CUDA_MISSING),)
gpu-programs: $(GPU_TESTS) $(BUILD)/gpu/check_gpu $(BUILD)/gpu/bench_gpu

# Before minutes of compilation.
gpu-found:
	@nvidia-smi -L >/dev/null 2>&1 || \
	    { echo "make: no GPU, or no driver for it, was found (nvidia-smi -L lists none): not measured" >&2; exit 2; }
else
gpu-programs gpu-found:
	@echo "make: built without CUDA ($(CUDA_MISSING)): there is nothing to run on a GPU" >&2; exit 2
endif

check-gpu: gpu-found deps
	@$(MAKE) --no-print-directory $(BINARY) gpu-programs
	@tests/gpu/check_gpu.sh $(BUILD)/gpu $(BINARY) $(CUDA_HOME)

bench-gpu: gpu-found deps
	@$(MAKE) --no-print-directory $(BUILD)/gpu/bench_gpu
	@$(BUILD)/gpu/bench_gpu

# For a machine with a GPU that cannot build: without MPI, which has many shared libraries, and for any processor of
# the last ten years.
gpu-pack:
	@$(MAKE) --no-print-directory BUILD=build/pack BINARY=build/pack/train_iha MPI_CFLAGS= MPI_LIBS= \
	    ARCH=$(if $(filter command,$(firstword $(origin ARCH))),$(ARCH),$(PORTABLE_ARCH)) build/pack/train_iha gpu-programs
	@scripts/pack_gpu.sh build/pack build/gpu-pack.tar.xz
