// The emulator and the kernels as one unit: what nothing names, a linker would leave out.
#include "../kernels.cu"
#include "emulator.cc"
#include "faulty.cuh"
