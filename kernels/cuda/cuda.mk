# The CUDA backend: where the toolkit and cuDNN are, how they compile, what the binary links. Included by the Makefile.
#
#   CUDA=0               build without CUDA, as when no toolkit is found
#   CUDA_HOME=DIR        the toolkit; default: that of the nvcc on the PATH, or /usr/local/cuda
#   NVIDIA_WHEELS=DIR    .../site-packages/nvidia: Python wheels with the libraries that the toolkit lacks
#   CUDNN_FRONTEND=DIR   the folder of cudnn_frontend.h; default: where `make deps` installs it
#
# Set in local.mk they apply to every make. The libraries are linked dynamically, with an rpath to the folder they were
# found in; none of them needs the driver to load, so the binary also runs where there is no GPU.

-include local.mk

CUDA ?= 1
CUDA_HOME ?= $(or $(patsubst %/bin/nvcc,%,$(shell command -v nvcc 2>/dev/null)),/usr/local/cuda)
NVCC ?= $(firstword $(wildcard $(CUDA_HOME)/bin/nvcc $(NVIDIA_WHEELS:%=%/cu*/bin/nvcc)))
CUDA_SOURCES = $(wildcard kernels/cuda/*.cu kernels/cuda/*/*.cu)

# Ampere and Hopper, and PTX that the driver compiles for later GPUs.
CUDA_ARCHS ?= -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 \
    -gencode arch=compute_90,code=compute_90
# Designated initializers in the shared headers leave members out, which C++ compilers warn about.
CUDA_WARNINGS = -Wall -Wextra $(ERRORS) -Wno-missing-field-initializers

# ---- what is installed ----

CUDA_TARGET := $(if $(filter aarch64%,$(TARGET)),sbsa,x86_64)
CUDA_FOLDERS := $(wildcard $(NVIDIA_WHEELS:%=%/*)) $(CUDA_HOME)
CUDA_LIB_DIRS := $(foreach dir,$(CUDA_FOLDERS),$(dir)/lib64 $(dir)/lib) $(CUDA_HOME)/targets/$(CUDA_TARGET)-linux/lib \
    /usr/lib/$(shell $(CC) -print-multiarch 2>/dev/null) /usr/local/lib /usr/lib64
CUDA_INCLUDE_DIRS := $(CUDA_FOLDERS:%=%/include) $(CUDA_HOME)/targets/$(CUDA_TARGET)-linux/include

# The path of lib$(1).so, or of a version of it (wheels have no other), in the first folder that has one.
cuda_lib = $(firstword $(wildcard $(foreach dir,$(CUDA_LIB_DIRS),$(dir)/lib$(1).so $(dir)/lib$(1).so.[0-9]*)))

CUDART := $(call cuda_lib,cudart)
CUBLASLT := $(call cuda_lib,cublasLt)
CUDNN := $(call cuda_lib,cudnn)
NVRTC := $(call cuda_lib,nvrtc)
NCCL := $(call cuda_lib,nccl)
NCCL_HEADER := $(firstword $(wildcard $(CUDA_INCLUDE_DIRS:%=%/nccl.h) /usr/include/nccl.h))
CUDNN_HEADER := $(firstword $(wildcard $(CUDA_INCLUDE_DIRS:%=%/cudnn.h) /usr/include/cudnn.h \
    /usr/include/*/cudnn.h))
CUDNN_FRONTEND ?= $(patsubst %/cudnn_frontend.h,%,$(firstword $(wildcard \
    .venv/lib/python3*/site-packages/include/cudnn_frontend.h $(CUDA_INCLUDE_DIRS:%=%/cudnn_frontend.h))))

CUDA_ISYSTEM = $(addprefix -isystem ,$(wildcard $(CUDA_INCLUDE_DIRS)))

# Why CUDA is not built, in a few words; empty: it is.
CUDA_MISSING := $(strip $(if $(filter 0,$(CUDA)),CUDA=0, $(if $(filter 1,$(SANITIZE)),SANITIZE=1, \
    $(if $(NVCC),,no nvcc) $(if $(CUDART),,no libcudart) $(if $(CUBLASLT),,no libcublasLt))))
CUDNN_MISSING := $(strip $(if $(CUDNN),,no libcudnn) $(if $(CUDNN_HEADER),,no cudnn.h) \
    $(if $(wildcard $(CUDNN_FRONTEND)/cudnn_frontend.h),,no cudnn_frontend.h: run make deps))

NCCL_MISSING := $(strip $(if $(NCCL),,no libnccl) $(if $(NCCL_HEADER),,no nccl.h))
NCCL_FLAGS = $(if $(NCCL_MISSING),,-DWITH_NCCL -isystem $(patsubst %/,%,$(dir $(NCCL_HEADER))))

# ---- what is built ----

CUDA_OBJECTS = $(CUDA_SOURCES:%.cu=$(BUILD)/cuda/%.o)
CUDNN_OBJECTS = $(if $(CUDNN_MISSING),,$(patsubst %.cpp,$(BUILD)/cuda/%.o,$(wildcard kernels/cuda/*/*.cpp)))
CUDA_LIBS = $(CUDART) $(CUBLASLT) $(if $(CUDNN_MISSING),,$(CUDNN)) $(if $(NCCL_MISSING),,$(NCCL))
CUDA_RPATH = $(patsubst %,-Wl$(comma)-rpath$(comma)%,$(sort $(abspath $(dir $(CUDA_LIBS)))))
comma := ,

# What the binary links beside the CPU backend, and a line for the user that says so.
ifeq ($(CUDA_MISSING),)
CUDA_LINKED = $(CUDA_OBJECTS) $(CUDNN_OBJECTS)
CUDA_LINK = $(CUDA_LIBS) $(CUDA_RPATH) -lstdc++
CUDA_SUMMARY = with CUDA ($(NVCC)), attention \
    $(if $(CUDNN_MISSING),by the built-in kernels alone ($(CUDNN_MISSING)),also by cuDNN ($(CUDNN))), ranks over \
    $(if $(NCCL_MISSING),host memory alone ($(NCCL_MISSING)),NCCL ($(NCCL)))
else
CUDA_LINKED =
CUDA_LINK =
CUDA_SUMMARY = without CUDA ($(CUDA_MISSING)): the CPU backend alone
endif

# Stamp files: rewritten when the compiler, flags or libraries that they list change, so that dependents are rebuilt.
CUDA_STAMPS = $(addprefix $(BUILD)/cuda/,compiled-with cudnn-with linked-with)
$(BUILD)/cuda/compiled-with: WITH = $(NVCC) $(CUDA_ARCHS) $(CUDA_ISYSTEM) $(NCCL_FLAGS)
$(BUILD)/cuda/cudnn-with: WITH = $(CUDNN_HEADER) $(CUDNN_FRONTEND) $(CUDA_ISYSTEM) $(NVRTC)
$(BUILD)/cuda/linked-with: WITH = $(CUDA_SUMMARY) $(CUDA_LINK)
$(CUDA_STAMPS): FORCE
	@mkdir -p $(@D)
	@echo '$(WITH)' | cmp -s - $@ || echo '$(WITH)' >$@
.PHONY: FORCE
FORCE:

$(BUILD)/cuda/%.o: %.cu $(BUILD)/cuda/compiled-with
	@mkdir -p $(@D)
	@echo "  NVCC $<"
	@$(NVCC) -std=c++17 -O3 -lineinfo -I. $(CUDA_ISYSTEM) $(CUDA_ARCHS) $(NCCL_FLAGS) $(NVCC_ERRORS) \
	    $(addprefix -Xcompiler ,$(CUDA_WARNINGS)) -MMD -MP -c $< -o $@

# The cuDNN frontend is header-only and large: optimizing it takes four times as long and saves only microseconds.
$(BUILD)/cuda/%.o: %.cpp $(BUILD)/cuda/cudnn-with
	@mkdir -p $(@D)
	@echo "  CXX  $<"
	@$(CXX) -std=c++17 -O0 -I. -isystem $(CUDNN_FRONTEND) -isystem $(dir $(CUDNN_HEADER)) $(CUDA_ISYSTEM) \
	    -DCUDNN_FRONTEND_SKIP_JSON_LIB $(NVRTC:%=-DNVRTC_LIBRARY='"%"') $(CUDA_WARNINGS) -MMD -MP -c $< -o $@

.PHONY: cuda-objects kernel-resources
cuda-objects: $(CUDA_OBJECTS) $(CUDNN_OBJECTS)

# Registers, stack and shared memory of every kernel, as cuobjdump knows them.
kernel-resources: $(CUDA_OBJECTS)
	$(if $(NVCC),,$(error kernel-resources needs nvcc))
	@.venv/bin/python scripts/kernel_resources.py $(BUILD)/cuda $(NVCC) --out docs/kernel-resources.md
