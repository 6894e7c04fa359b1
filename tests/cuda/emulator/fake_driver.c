/* A fake libcuda.so.1 for planning with cuDNN without a device (tests/cuda/test_cudnn.c). cuDNN opens the
 * driver to load the kernels that it has compiled; here they load but are never launched. Every call that
 * planning does not need aborts, so no kernel can seem to have run. The CUDA runtime inside cuDNN finds no
 * device. */
#include <stdio.h>
#include <stdlib.h>

enum { SUCCESS = 0, NO_DEVICE = 100 };

static char loaded; /* what every handle points to */

int cuInit(unsigned flags) {
    (void)flags;
    return NO_DEVICE;
}

int cuDriverGetVersion(int *version) {
    *version = 13000;
    return SUCCESS;
}

int cuDeviceGetCount(int *count) {
    *count = 1;
    return SUCCESS;
}

int cuLibraryLoadData(void **library, const void *image) {
    if (!image)
        return 1;
    *library = &loaded;
    return SUCCESS;
}

int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
    (void)name;
    *kernel = library;
    return SUCCESS;
}

int cuLibraryUnload(void *library) {
    (void)library;
    return SUCCESS;
}

int cuGetErrorString(int error, const char **text) {
    *text = error == SUCCESS ? "no error" : error == NO_DEVICE ? "no device" : "an error";
    return SUCCESS;
}

/* Looked up by name, never called. */
#define NEVER(name)                                                                                          \
    void name(void);                                                                                         \
    void name(void) {                                                                                        \
        fprintf(stderr, "fake driver: " #name " was called, but there is no GPU\n");                         \
        abort();                                                                                             \
    }
NEVER(cuCtxGetCurrent)
NEVER(cuCtxGetDevice)
NEVER(cuCtxGetLimit)
NEVER(cuCtxPopCurrent)
NEVER(cuCtxPushCurrent)
NEVER(cuDeviceGet)
NEVER(cuDeviceGetAttribute)
NEVER(cuDevicePrimaryCtxRelease)
NEVER(cuDevicePrimaryCtxReset)
NEVER(cuDevicePrimaryCtxRetain)
NEVER(cuFuncGetAttribute)
NEVER(cuFuncSetAttribute)
NEVER(cuGetErrorName)
NEVER(cuKernelGetAttribute)
NEVER(cuKernelSetAttribute)
NEVER(cuLaunchCooperativeKernel)
NEVER(cuLaunchKernel)
NEVER(cuLaunchKernelEx)
NEVER(cuLibraryLoadFromFile)
NEVER(cuLinkAddData)
NEVER(cuLinkAddData_v2)
NEVER(cuLinkAddFile_v2)
NEVER(cuLinkComplete)
NEVER(cuLinkCreate)
NEVER(cuLinkCreate_v2)
NEVER(cuLinkDestroy)
NEVER(cuMemcpyDtoH_v2)
NEVER(cuModuleGetFunction)
NEVER(cuModuleGetGlobal_v2)
NEVER(cuModuleLoadData)
NEVER(cuModuleLoadDataEx)
NEVER(cuModuleLoadFatBinary)
NEVER(cuModuleUnload)
NEVER(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NEVER(cuOccupancyMaxPotentialClusterSize)
NEVER(cuStreamGetCtx)
NEVER(cuStreamSynchronize)
NEVER(cuTensorMapEncodeTiled)
