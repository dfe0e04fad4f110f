// The kernels of cuda/rank_one_kernels.cu for the emulator.
#include "../cuda/rank_one_kernels.cu"
