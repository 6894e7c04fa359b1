# Tests of the CUDA kernels on a CPU (tests/simt/simt.h). They need the CUDA runtime's headers, of the toolkit or of
# the wheels that `make deps` installs without one, but neither nvcc nor a GPU. Included by the Makefile.

CXX ?= g++
SIMT_INCLUDE := $(patsubst %/cuda_bf16.h,%,$(firstword $(wildcard $(CUDA_HOME)/include/cuda_bf16.h \
    .venv/lib/python3*/site-packages/nvidia/cu13/include/cuda_bf16.h)))

SIMT_TESTS = $(filter-out $(if $(CUDNN_MISSING)$(CUDA_MISSING),%/test_simt_cudnn), \
    $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/test_simt_*.c)))
ifneq ($(SIMT_INCLUDE),)
SIMT_BUILT = $(SIMT_TESTS) $(SIMT_PROGRAM)
else
SIMT_BUILT =
endif

SIMT_FLAGS = $(filter-out -std=% -O%,$(CFLAGS)) -O2 -Wno-missing-field-initializers -Wno-unknown-pragmas \
    -fno-strict-aliasing -DWITH_NCCL -isystem tests/simt/stand_in/first -isystem $(SIMT_INCLUDE) -isystem tests/simt/stand_in
SIMT_HARNESS = $(patsubst %.cc,$(BUILD)/%.o,$(filter-out %_program.cc,$(wildcard tests/simt/*.cc)))
SIMT_BACKEND = $(patsubst %.cu,$(BUILD)/simt/%.o,$(CUDA_SOURCES))
SIMT_KERNELS = $(SIMT_BACKEND) $(patsubst %.cu,$(BUILD)/simt/%.o,$(wildcard tests/simt/*.cu))
SIMT_PROGRAM = $(BUILD)/simt/train_iha

$(BUILD)/tests/simt/%.o: tests/simt/%.cc
	@mkdir -p $(@D)
	@echo "  CXX  $<"
	@$(CXX) -std=gnu++17 $(SIMT_FLAGS) -MMD -c $< -o $@

$(BUILD)/simt/%.o: %.cu
	@mkdir -p $(@D)
	@echo "  SIMT $<"
	@$(CXX) -std=gnu++17 $(SIMT_FLAGS) -x c++ -include tests/simt/simt.h -MMD -c $< -o $@

# These call the runtime and NCCL themselves.
$(patsubst %,$(BUILD)/tests/test_simt_%.o,streams nccl comm determinism): CFLAGS += -isystem tests/simt/stand_in/first \
    -isystem $(SIMT_INCLUDE) -isystem tests/simt/stand_in

# The CPU backend in double beside the one in float: one object, with one name to the outside.
$(BUILD)/simt/cpu_double.o: $(DOUBLE_OBJECTS)
	@mkdir -p $(@D)
	@$(LD) -r $^ -o $@
	@objcopy --redefine-sym kernels_cpu=kernels_cpu_double --keep-global-symbol=kernels_cpu_double $@

$(SIMT_TESTS): $(BUILD)/tests/%: $(BUILD)/tests/%.o $(SIMT_HARNESS) $(SIMT_KERNELS) \
    $(BUILD)/simt/cpu_double.o $(KERNEL_OBJECTS) $(OTHER_OBJECTS)
	@mkdir -p $(@D)
	@echo "  LINK $@"
	@$(CXX) $(CFLAGS:-std=%=) $^ -o $@ -lcmocka $(LIBS)

# The product's own cuDNN file and the library, on a driver without a GPU: linked, it is the libcuda.so.1 that cuDNN
# finds loaded.
PAPER_DRIVER = $(BUILD)/tests/paper/libcuda.so.1
$(PAPER_DRIVER): tests/simt/paper_driver.c
	@mkdir -p $(@D)
	@echo "  CC   $<"
	@$(CC) $(filter-out -MMD -fsanitize%,$(CFLAGS)) -shared -fPIC -Wl,-soname,libcuda.so.1 $< -o $@

$(BUILD)/tests/test_simt_cudnn: $(CUDNN_OBJECTS) | $(PAPER_DRIVER)
$(BUILD)/tests/test_simt_cudnn: LIBS += -Wl,--wrap=cudnn_attention_open -Wl,--no-as-needed $(PAPER_DRIVER) $(CUDNN) \
    -Wl,-rpath,$(abspath $(dir $(PAPER_DRIVER))) $(patsubst %,-Wl$(comma)-rpath$(comma)%,$(abspath $(dir $(CUDNN))))

# The whole program on the harness's GPUs. simt_program.o comes after the harness, whose variables must be there when it
# starts before main().
$(SIMT_PROGRAM): $(BUILD)/train_iha.o $(SIMT_HARNESS) $(BUILD)/tests/simt/simt_program.o $(SIMT_BACKEND) \
    $(KERNEL_OBJECTS) $(OTHER_OBJECTS)
	@mkdir -p $(@D)
	@echo "  LINK $@"
	@$(CXX) $(CFLAGS:-std=%=) -Wl,--wrap=cpu_memory_available $^ -o $@ $(LIBS)

.PHONY: simt
simt: $(SIMT_BUILT)
	@for test in $(SIMT_TESTS); do $$test || exit 1; done
