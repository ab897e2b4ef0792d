// All kernels, as one unit: one image for the GPU, one object for the emulator.
#include "absorbed.cuh"
#include "attention_gradient.cuh"
#include "attention_groups.cuh"
#include "elementwise.cuh"
#include "loss.cuh"
#include "norm.cuh"
#include "rows.cuh"
