// The kernels of cuda/thread_kernels.cu for the emulator.
#include "../cuda/thread_kernels.cu"
