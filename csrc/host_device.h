// MBF_HOST_DEVICE: a function that both sides call. Nothing where there is only one side.
#pragma once

#ifdef __CUDACC__
#define MBF_HOST_DEVICE __host__ __device__
#else
#define MBF_HOST_DEVICE
#endif
