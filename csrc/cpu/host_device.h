// Marks functions that CUDA kernels call as well: the formulas of the specification, stated once.
#pragma once

#ifdef __CUDACC__
#define DYNQUANT_BOTH __host__ __device__
#else
#define DYNQUANT_BOTH
#endif
