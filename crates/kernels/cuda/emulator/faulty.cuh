// A kernel with a fault, for the emulator alone: a test holds the emulator to showing each in those orders that can show it.
#pragma once
#include "common.cuh"
#include "groups.cuh"

// What is left out or comes too early.
enum class Fault { None, Wait, WarpBarrier, BarrierBeforeReading, BarrierBeforeWriting, EarlyCopy };

struct FaultyParams {
  const float *in; // [2, threads]
  float *out;      // [threads]: first numbers of the thread, the next lane and the next warp, and a second one of the next warp
  Fault fault;
};

constexpr int FAULTY_THREADS = 128;

// Numbers go up alone, from a thread to those before it, so that a fault shows in one direction. What lies between two accesses that
// want a barrier is an exchange: warps that went from wait to wait together would never meet a fault between warps.
KERNEL(faulty, FaultyParams, FAULTY_THREADS) {
  SHARED_MEMORY(memory);
  float *const numbers = reinterpret_cast<float *>(memory);
  const int own = static_cast<int>(threadIdx.x), count = static_cast<int>(blockDim.x);
  const int next_lane = lane() < 31 ? own + 1 : own, next_warp = own + 32 < count ? own + 32 : own;
  copy_async<4>(numbers + own, p.in + own, true);
  if (p.fault != Fault::Wait) wait_for_copies();
  if (p.fault != Fault::WarpBarrier) __syncwarp();
  float sum = numbers[own] + numbers[next_lane];
  from_lane_xor(sum, 1);
  if (p.fault != Fault::BarrierBeforeReading) __syncthreads();
  sum += numbers[next_warp];
  from_lane_xor(sum, 1);
  if (p.fault == Fault::EarlyCopy) copy_async<4>(numbers + own, p.in + count + own, true);
  if (p.fault != Fault::BarrierBeforeWriting) __syncthreads();
  if (p.fault != Fault::EarlyCopy) copy_async<4>(numbers + own, p.in + count + own, true);
  wait_for_copies();
  __syncthreads();
  p.out[own] = sum + numbers[next_warp];
}

// What is wrong with a group's product.
enum class GroupFault { None, NotShown, NotAwaited, ReadEarly, WrongPlace, CopyTooEarly };

struct FaultyGroupParams {
  const bf16 *in; // [2, 64, 64]
  float *out;     // [64, 64]: the first matrix times itself, transposed
  GroupFault fault;
};

KERNEL(faulty_group, FaultyGroupParams, GROUP_THREADS) {
  GROUP_SHARED_MEMORY(memory);
  bf16 *const tile = reinterpret_cast<bf16 *>(memory) + (p.fault == GroupFault::WrongPlace ? 64 : 0);
  copy_group_tile(tile, p.in, GROUP_ROWS, 64, 64, true);
  wait_for_copies();
  if (p.fault != GroupFault::NotShown) show_copies();
  __syncthreads();
  float sums[8][4];
  clear(sums);
  before_products();
  start_rows(sums, tile, tile);
  if (p.fault == GroupFault::CopyTooEarly) {
    __syncthreads();
    copy_group_tile(tile, p.in + GROUP_TILE, GROUP_ROWS, 64, 64, true);
    wait_for_copies(), show_copies();
    __syncthreads();
  }
  const float early = sums[0][0];
  if (p.fault != GroupFault::NotAwaited) await_products<0>(sums);
  if (p.fault == GroupFault::ReadEarly) sums[0][0] = early;
  store_rows(sums, p.out, 64, 64, 64, [](int) { return 1.0f; });
}
