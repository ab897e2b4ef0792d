// Runs kernels on the CPU, block after block. Each thread of a block is a fiber that runs until it waits for others. Between two
// barriers a GPU may run any warp far ahead of the others, so a warp here runs through all its exchanges up to the next barrier of
// the block before another warp begins: of any two accesses that no barrier divides, each comes first in one of the orders, and as
// tests run every kernel in all of them, a missing barrier shows as another number. Memory that a launch asks for is filled with NaN
// before each block.
#include "emulator.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <ucontext.h>
#include <unordered_map>
#include <vector>

namespace emulator {

Index thread_index, block_index, block_size, grid_size;
unsigned char *shared_memory;

namespace {

constexpr size_t STACK = 256 * 1024;
constexpr size_t LARGEST_EXCHANGE = 32;

constexpr unsigned WARP = 32;

struct Kernel {
  Body body;
  unsigned threads;
};

std::unordered_map<std::string, Kernel> &kernels() {
  static std::unordered_map<std::string, Kernel> all;
  return all;
}

// In which order a block's threads run. Warp by warp, or, mixed, all of them from wait to wait, each round from another thread on.
// Numbers that are copied into shared memory come at once, or when they are waited for; in a mixed order some so and some so.
struct Order {
  bool descending, copies_at_once, mixed;
  uint64_t random;

  explicit Order(uint64_t number = 0)
      : descending(number % 2 == 1), copies_at_once(number / 2 % 2 == 1), mixed(number >= 4),
        random(number * 0x9E3779B97F4A7C15ull + 1) {}

  unsigned draw() {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<unsigned>(random >> 33);
  }
};

enum class State { New, Ready, AtBlock, AtWarp, Done };

struct Fiber {
  std::unique_ptr<unsigned char[]> stack{new unsigned char[STACK]};
  jmp_buf place;
  State state = State::New;
  // Two, by turns: a fast lane may give its next one while a slow one still reads.
  unsigned char given[2][LARGEST_EXCHANGE];
  unsigned turn = 0;
  // Copies that began and were not waited for, and those that were and the matrix instructions of groups need not see yet.
  std::vector<Copy> copies, unseen;
  // Products of the thread's group that began and were not waited for.
  std::vector<GroupProduct> products;
};

std::vector<std::unique_ptr<Fiber>> fibers;
unsigned current;
jmp_buf scheduler;
Body body;
const void *params;
std::string failure;
Order order;

void start_fiber() {
  body(params);
  if (!fibers[current]->copies.empty()) fail("a thread ends before its copies into shared memory");
  if (!fibers[current]->products.empty()) fail("a thread ends before its group's products");
  fibers[current]->state = State::Done;
  _longjmp(scheduler, 1);
}

void wait_as(State state) {
  Fiber &fiber = *fibers[current];
  fiber.state = state;
  if (_setjmp(fiber.place) == 0) _longjmp(scheduler, 1);
}

void resume(unsigned i) {
  Fiber &fiber = *fibers[i];
  current = i;
  thread_index = {i, 0, 0};
  if (_setjmp(scheduler) != 0) return;
  if (fiber.state != State::New) {
    fiber.state = State::Ready;
    _longjmp(fiber.place, 1);
  }
  fiber.state = State::Ready;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, start_fiber, 0);
  setcontext(&context);
}

// Lets the lanes of those warps go on that all wait for each other.
void release_warps(unsigned begin, unsigned end) {
  for (unsigned first = begin; first < end; first += WARP) {
    bool all = true;
    for (unsigned i = first; i < first + WARP; i++) all &= fibers[i]->state == State::AtWarp;
    for (unsigned i = first; all && i < first + WARP; i++) fibers[i]->state = State::Ready;
  }
}

// Lets threads `begin ...` before `end` run as far as they can without others, in rounds: in each all of them run to their next wait.
void run_alone(unsigned begin, unsigned end) {
  const unsigned count = end - begin;
  for (bool ran = true; ran;) {
    ran = false;
    const unsigned shift = order.mixed ? order.draw() % count : 0;
    if (order.mixed) order.descending = order.draw() % 2 == 1;
    for (unsigned n = 0; n < count; n++) {
      const unsigned i = (n + shift) % count, place = order.descending ? end - 1 - i : begin + i;
      if (fibers[place]->state != State::New && fibers[place]->state != State::Ready) continue;
      resume(place), ran = true;
      if (!failure.empty()) return;
    }
    release_warps(begin, end);
  }
}

bool run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; i++) {
    Fiber &fiber = *fibers[i];
    fiber.state = State::New, fiber.turn = 0;
    fiber.copies.clear(), fiber.unseen.clear(), fiber.products.clear();
  }
  for (;;) {
    const unsigned count = order.mixed ? threads : WARP;
    for (unsigned n = 0; n < threads && failure.empty(); n += count) {
      const unsigned begin = order.descending ? threads - count - n : n;
      run_alone(begin, begin + count);
    }
    if (!failure.empty()) return false;
    // Those at the barrier go on when nobody is left who may come. Threads that have ended are not waited for.
    unsigned at_block = 0, done = 0;
    for (unsigned i = 0; i < threads; i++) {
      at_block += fibers[i]->state == State::AtBlock;
      done += fibers[i]->state == State::Done;
    }
    if (done == threads) return true;
    if (at_block + done < threads) {
      failure = "threads wait for each other at different places";
      return false;
    }
    for (unsigned i = 0; i < threads; i++)
      if (fibers[i]->state == State::AtBlock) fibers[i]->state = State::Ready;
  }
}

} // namespace

Registration::Registration(const char *name, Body body, unsigned threads) { kernels()[name] = {body, threads}; }

void fail(const char *what) {
  failure = what;
  _longjmp(scheduler, 1);
}

void carry_out(const Copy &copy) {
  if (copy.from == nullptr) std::memset(copy.to, 0, copy.size);
  else std::memcpy(copy.to, copy.from, copy.size);
}

void begin_copy(const Copy &copy) {
  if (order.mixed ? order.draw() % 2 == 1 : order.copies_at_once) carry_out(copy), fibers[current]->unseen.push_back(copy);
  else fibers[current]->copies.push_back(copy);
}

void block_barrier() { wait_as(State::AtBlock); }

void exchange(const void *mine, size_t size) {
  Fiber &fiber = *fibers[current];
  fiber.turn ^= 1;
  if (size > 0) std::memcpy(fiber.given[fiber.turn], mine, size);
  wait_as(State::AtWarp);
}

const void *of_lane(int lane) {
  const unsigned first = current / WARP * WARP;
  return fibers[first + static_cast<unsigned>(lane)]->given[fibers[current]->turn];
}

} // namespace emulator

void wait_for_copies() {
  auto &copies = emulator::fibers[emulator::current]->copies;
  for (const auto &copy : copies) emulator::carry_out(copy), emulator::fibers[emulator::current]->unseen.push_back(copy);
  copies.clear();
}

void show_copies() { emulator::fibers[emulator::current]->unseen.clear(); }

namespace {

void gather_matrices(uint32_t (&r)[4], const bf16 *row, bool transposed) {
  check_aligned<16>(row);
  emulator::exchange(&row, sizeof row);
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int matrix = 0; matrix < 4; matrix++) {
    const auto number = [&](int r, int c) {
      const bf16 *address;
      std::memcpy(&address, emulator::of_lane(8 * matrix + r), sizeof address);
      return static_cast<uint32_t>(address[c].bits);
    };
    const int a = lane / 4, b = 2 * (lane % 4);
    r[matrix] = transposed ? number(b, a) | number(b + 1, a) << 16 : number(a, b) | number(a, b + 1) << 16;
  }
  __syncwarp(); // the instruction has read when it returns
}

float half_of(uint32_t pair, int which) { return of_bits(pair >> (16 * which) << 16); }

} // namespace

void load_matrices(uint32_t (&r)[4], const bf16 *row) { gather_matrices(r, row, false); }
void load_matrices_transposed(uint32_t (&r)[4], const bf16 *row) { gather_matrices(r, row, true); }

void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  emulator::exchange(mine, sizeof mine);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto given = [](int of, int which) { return static_cast<const uint32_t *>(emulator::of_lane(of))[which]; };
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), col = 2 * (lane % 4) + i % 2;
    float sum = d[i];
    for (int k = 0; k < 16; k++) {
      // a: register k / 8 * 2 + row / 8 of lane (row % 8, k % 8 / 2); b: register k / 8 of lane (col, k % 8 / 2).
      const float x = half_of(given(row % 8 * 4 + k % 8 / 2, k / 8 * 2 + row / 8), k % 2);
      const float y = half_of(given(col * 4 + k % 8 / 2, 4 + k / 8), k % 2);
      sum += x * y;
    }
    d[i] = sum;
  }
}

namespace emulator {
namespace {

// A tile that a product of a group reads, and that some thread has not shown to it.
bool is_unseen(const bf16 *tile) {
  const auto *const begin = reinterpret_cast<const unsigned char *>(tile), *const end = begin + GROUP_TILE * sizeof(bf16);
  for (unsigned i = 0; i < block_size.x; i++)
    for (const auto *const copies : {&fibers[i]->copies, &fibers[i]->unseen})
      for (const Copy &copy : *copies)
        if (copy.to >= begin && copy.to < end) return true;
  return false;
}

void carry_out(const GroupProduct &product) {
  const int lane = static_cast<int>(threadIdx.x % 32), first = static_cast<int>(threadIdx.x) / 32 * 16;
  if (lane == 0 && (is_unseen(product.b) || (product.a != nullptr && is_unseen(product.a))))
    fail("a group's product reads copies that were not shown to it");
  const auto number = [](const bf16 *tile, int row, int column) { return widen(tile[part_of_row(row, column / 8) + column % 8]); };
  for (int k = 0; k < 64; k++) {
    if (product.a == nullptr && k % 16 == 0) exchange(product.left[k / 16], sizeof product.left[0]);
    const auto left = [&](int row) {
      if (product.a != nullptr) return number(product.a, first + row, k);
      // As in multiply_add.
      const int i = k % 16;
      return half_of(static_cast<const uint32_t *>(of_lane(row % 8 * 4 + i % 8 / 2))[i / 8 * 2 + row / 8], i % 2);
    };
    for (int i = 0; i < 32; i++) {
      const int row = lane / 4 + 8 * (i % 4 / 2), column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float &sum = product.sums[i / 4][i % 4];
      if (product.a != nullptr && k == 0) sum = 0.0f;
      sum += left(row) * (product.a != nullptr ? number(product.b, column, k) : number(product.b, k, column));
    }
  }
  __syncwarp(); // what was exchanged is read
}

} // namespace

// A product reads its tiles when it begins, or when it is waited for.
void start(const GroupProduct &product) {
  if (reinterpret_cast<uintptr_t>(product.b) % 1024 != 0 || reinterpret_cast<uintptr_t>(product.a) % 1024 != 0)
    fail("a group's tile does not begin at a multiple of 1024 bytes");
  if (!order.mixed && order.copies_at_once) carry_out(product);
  else fibers[current]->products.push_back(product);
}

void await(size_t left) {
  auto &products = fibers[current]->products;
  while (products.size() > left) {
    const GroupProduct product = products.front();
    products.erase(products.begin());
    carry_out(product);
  }
}

} // namespace emulator

// Runs a kernel; 0, or 1 with a message. `number` is that of the order in which threads run: below 4 warp by warp, odd ones
// descending, 2 and 3 with copies at once; from 4 on a mixed one each.
extern "C" int incipit_emulate(const char *name, const unsigned grid[3], unsigned threads, unsigned shared_bytes, const void *params,
                               uint64_t number, char *message, size_t message_size) {
  using namespace emulator;
  const auto say = [&](const std::string &what) {
    std::snprintf(message, message_size, "%s: %s", name, what.c_str());
    return 1;
  };
  const auto found = kernels().find(name);
  if (found == kernels().end()) return say("there is no such kernel");
  if (threads == 0 || threads % WARP != 0 || threads > found->second.threads) return say("a block of a wrong size");
  if (shared_bytes > 227 * 1024) return say("more shared memory than a block can have");
  while (fibers.size() < threads) fibers.push_back(std::make_unique<Fiber>());
  std::vector<uint32_t> memory(shared_bytes / 4 + 256);
  shared_memory = reinterpret_cast<unsigned char *>((reinterpret_cast<uintptr_t>(memory.data()) + 1023) / 1024 * 1024);
  body = found->second.body;
  ::emulator::params = params;
  grid_size = {grid[0], grid[1], grid[2]};
  block_size = {threads, 1, 1};
  failure.clear();
  order = Order(number);
  for (unsigned z = 0; z < grid[2]; z++)
    for (unsigned y = 0; y < grid[1]; y++)
      for (unsigned x = 0; x < grid[0]; x++) {
        std::fill(memory.begin(), memory.end(), 0x7fc0ffc0u);
        block_index = {x, y, z};
        if (!run_block(threads)) return say(failure);
      }
  return 0;
}
