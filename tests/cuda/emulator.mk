# Tests of the CUDA kernels on a CPU, by the emulator (tests/cuda/emulator/emulator.h). They need the CUDA runtime's
# headers, from the toolkit or from the wheels that `make deps` installs without one, but neither nvcc nor a GPU.
# Included by the Makefile.

CXX ?= g++
EMULATOR_INCLUDE := $(patsubst %/cuda_bf16.h,%,$(firstword $(wildcard $(CUDA_HOME)/include/cuda_bf16.h \
    .venv/lib/python3*/site-packages/nvidia/cu13/include/cuda_bf16.h)))

EMULATOR_TESTS = $(filter-out $(if $(CUDNN_MISSING)$(CUDA_MISSING),%/cuda/test_cudnn), \
    $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/cuda/test_*.c)))
ifneq ($(EMULATOR_INCLUDE),)
EMULATOR_BUILT = $(EMULATOR_TESTS) $(EMULATOR_PROGRAM)
else
EMULATOR_BUILT =
endif

EMULATOR_FLAGS = $(filter-out -std=% -O%,$(CFLAGS)) -O2 -Wno-missing-field-initializers -Wno-unknown-pragmas \
    -fno-strict-aliasing -DWITH_NCCL -isystem tests/cuda/emulator/include/first -isystem $(EMULATOR_INCLUDE) -isystem tests/cuda/emulator/include
# For tests/toolkits/run.sh, which compiles the same sources against other headers.
.PHONY: emulator-sources
emulator-sources:
	@echo '$(EMULATOR_FLAGS)'
	@echo '$(CUDA_SOURCES) $(wildcard tests/cuda/*.cu)'
	@echo '$(wildcard tests/cuda/emulator/*.cc)'

EMULATOR_OBJECTS = $(patsubst %.cc,$(BUILD)/%.o,$(filter-out %/program.cc,$(wildcard tests/cuda/emulator/*.cc)))
EMULATOR_BACKEND = $(patsubst %.cu,$(BUILD)/emulator/%.o,$(CUDA_SOURCES))
EMULATOR_KERNELS = $(EMULATOR_BACKEND) $(patsubst %.cu,$(BUILD)/emulator/%.o,$(wildcard tests/cuda/*.cu))
EMULATOR_PROGRAM = $(BUILD)/emulator/train_iha

$(BUILD)/tests/cuda/emulator/%.o: tests/cuda/emulator/%.cc
	@mkdir -p $(@D)
	@echo "  CXX  $<"
	@$(CXX) -std=gnu++17 $(EMULATOR_FLAGS) -MMD -MP -c $< -o $@

$(BUILD)/emulator/%.o: %.cu
	@mkdir -p $(@D)
	@echo "  EMU  $<"
	@$(CXX) -std=gnu++17 $(EMULATOR_FLAGS) -x c++ -include tests/cuda/emulator/emulator.h -MMD -MP -c $< -o $@

# These call the runtime and NCCL themselves.
$(patsubst %,$(BUILD)/tests/cuda/test_%.o,streams nccl comm determinism libraries device): CFLAGS += -isystem tests/cuda/emulator/include/first \
    -isystem $(EMULATOR_INCLUDE) -isystem tests/cuda/emulator/include

$(EMULATOR_TESTS): $(BUILD)/tests/%: $(BUILD)/tests/%.o $(EMULATOR_OBJECTS) $(EMULATOR_KERNELS) \
    $(CPU_DOUBLE) $(KERNEL_OBJECTS) $(OTHER_OBJECTS)
	@mkdir -p $(@D)
	@echo "  LINK $@"
	@$(CXX) $(CFLAGS:-std=%=) $^ -o $@ -lcmocka $(LIBS)

# attention_cudnn.cpp with the real cuDNN on a fake driver: because the test is linked with it, it is the libcuda.so.1
# that cuDNN finds loaded.
FAKE_DRIVER = $(BUILD)/tests/fake_driver/libcuda.so.1
$(FAKE_DRIVER): tests/cuda/emulator/fake_driver.c
	@mkdir -p $(@D)
	@echo "  CC   $<"
	@$(CC) $(filter-out -MMD -fsanitize%,$(CFLAGS)) -shared -fPIC -Wl,-soname,libcuda.so.1 $< -o $@

$(BUILD)/tests/cuda/test_cudnn: $(CUDNN_OBJECTS) | $(FAKE_DRIVER)
$(BUILD)/tests/cuda/test_cudnn: LIBS += -Wl,--wrap=attention_cudnn_open -Wl,--no-as-needed $(FAKE_DRIVER) $(CUDNN) \
    -Wl,-rpath,$(abspath $(dir $(FAKE_DRIVER))) $(patsubst %,-Wl$(comma)-rpath$(comma)%,$(abspath $(dir $(CUDNN))))

# The whole program on emulated GPUs. program.o comes after the emulator, whose static variables must be initialized
# before program.o's constructor runs.
$(EMULATOR_PROGRAM): $(BUILD)/train_iha.o $(EMULATOR_OBJECTS) $(BUILD)/tests/cuda/emulator/program.o $(EMULATOR_BACKEND) \
    $(KERNEL_OBJECTS) $(OTHER_OBJECTS)
	@mkdir -p $(@D)
	@echo "  LINK $@"
	@$(CXX) $(CFLAGS:-std=%=) -Wl,--wrap=cpu_memory_available $^ -o $@ $(LIBS)
