# The CUDA backend: its sources, the toolkit's headers, and how nvcc compiles. Included by the Makefile.

CUDA_HOME ?= $(or $(patsubst %/bin/nvcc,%,$(shell command -v nvcc 2>/dev/null)),/usr/local/cuda)
CUDA_SOURCES = $(wildcard kernels/cuda/*.cu)

# Ampere and Hopper, and code that later GPUs compile for themselves.
CUDA_ARCHS ?= -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 \
    -gencode arch=compute_90,code=compute_90
# In C++ the shared headers' designated initializers would each need every member.
CUDA_WARNINGS = -Wall -Wextra -Werror -Wno-missing-field-initializers

$(BUILD)/cuda/%.o: %.cu
	@mkdir -p $(@D)
	@echo "  NVCC $<"
	@$(CUDA_HOME)/bin/nvcc -std=c++17 -O3 -lineinfo -I. $(CUDA_ARCHS) -Werror all-warnings \
	    $(addprefix -Xcompiler ,$(CUDA_WARNINGS)) -MMD -c $< -o $@

CUDA_OBJECTS = $(CUDA_SOURCES:%.cu=$(BUILD)/cuda/%.o)

.PHONY: cuda-objects
cuda-objects: $(CUDA_OBJECTS)
