// Enough of CUDA to run the kernels on a CPU, for tests: one block after the other, and the threads of a block in turns, each
// until it has to wait for others.
#include <cmath>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __shared__ static thread_local

struct Index {
  unsigned x, y;
};
// Each of a thread, for tests side by side.
static thread_local Index blockDim, blockIdx, threadIdx;

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float half_to_float(unsigned short bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return x;
}
inline unsigned short float_to_half(float x) {
  _Float16 half = x;
  unsigned short bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

// How many have come to where threads meet, all times together: one that came n times goes on when everybody did.
struct Meeting {
  unsigned members, arrived = 0;
};
struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  bool done = false;
};
static thread_local ucontext_t scheduler;
static thread_local Thread *running;
static thread_local std::vector<Meeting> *warps;
static thread_local std::vector<float> *shown;
static thread_local Meeting *whole_block;
static thread_local void (*the_kernel)(const void *);
static thread_local const void *the_args;

inline void meet(Meeting &meeting) {
  unsigned last = meeting.arrived / meeting.members * meeting.members + meeting.members;
  meeting.arrived++;
  while (meeting.arrived < last) {
    Index mine = threadIdx;
    swapcontext(&running->context, &scheduler);
    threadIdx = mine;
  }
}
inline void __syncthreads() { meet(*whole_block); }
inline float __shfl_xor_sync(unsigned, float x, unsigned mask) {
  float *of_warp = shown->data() + 32 * threadIdx.y;
  of_warp[threadIdx.x] = x;
  meet((*warps)[threadIdx.y]);
  float other = of_warp[threadIdx.x ^ mask];
  meet((*warps)[threadIdx.y]);
  return other;
}

static void one_thread() {
  the_kernel(the_args);
  running->done = true;
  swapcontext(&running->context, &scheduler);
}

extern "C" inline __attribute__((used)) void run(void (*kernel)(const void *), const void *args, unsigned grid,
                                                 unsigned x, unsigned y) {
  blockDim = {x, y};
  the_kernel = kernel;
  the_args = args;
  std::vector<Thread> threads(x * y);
  for (unsigned block = 0; block < grid; block++) {
    blockIdx = {block, 0};
    std::vector<Meeting> of_warps(y, Meeting{32});
    std::vector<float> of_lanes(32 * y);
    Meeting all{x * y};
    warps = &of_warps, shown = &of_lanes, whole_block = &all;
    for (Thread &thread : threads) {
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.data();
      thread.context.uc_stack.ss_size = thread.stack.size();
      thread.done = false;
      makecontext(&thread.context, one_thread, 0);
    }
    for (unsigned left = x * y; left > 0;) {
      left = 0;
      for (unsigned at = 0; at < x * y; at++) {
        if (threads[at].done) continue;
        running = &threads[at];
        threadIdx = {at % x, at / x};
        swapcontext(&scheduler, &running->context);
        left += !threads[at].done;
      }
    }
  }
}
