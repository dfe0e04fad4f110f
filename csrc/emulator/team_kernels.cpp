// The kernels of cuda/team_kernels.cu for the emulator.
#include "../cuda/team_kernels.cu"
