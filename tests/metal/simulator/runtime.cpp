// Runs one dispatch: every thread of a threadgroup as a fiber, threadgroups one after another. Compiled once, loaded
// with its symbols open to the kernels, which call it where threads meet (msl.h) and, as clang's thread sanitizer
// instruments them, before each access to memory. Nothing of the sanitizer's own runtime is used.
//
// One dispatch at a time, on one thread of the host.
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#if !defined(__x86_64__) || defined(SIM_UCONTEXT)
#include <ucontext.h>
#endif

typedef uint32_t uint;
typedef uint64_t ulong;

struct uint3 {
  uint x, y, z;
};
struct sim_pair {
  float x, y;
};

enum {
  MAX_THREADS = 1024,
  LANES = 32,
  THREADGROUP_BYTES = 32 << 10,
  STACK_BYTES = 256 << 10,
  GUARD_BYTES = 4096,
  POISON = 0xff,  // a NaN in every format, -1 as an integer
  MANY = 0xffff,  // more than one thread
};

// What a thread waits for; the first two are msl.h's.
enum State { RUNNING = 0, BARRIER = 1, SIMDGROUP_BARRIER = 2, SHARE = 3, MULTIPLY = 4, ENDED = 5 };

// What went wrong. native.py puts it into words.
enum Fault {
  NONE = 0,
  DIVERGENT_BARRIER,
  DIVERGENT_LANES,
  PARTIAL_SIMDGROUP,
  READ_AFTER_WRITE,
  WRITE_AFTER_READ,
  WRITE_AFTER_WRITE,
  UNWRITTEN_THREADGROUP,
  OUTSIDE_THREADGROUP,
  OUTSIDE_BUFFERS,
  DEVICE_RACE,
};

struct Binding {
  char* begin;
  char* end;
  ulong* writers;  // by byte, which thread of which dispatch wrote it last; null: not watched
};

struct Report {
  uint fault, thread, other, size, is_write, line, other_line, state, other_state;
  uint3 group;
  ulong address;
};

struct Dispatch {
  void (*entry)(void**, uint3, uint3);
  void** arguments;
  const Binding* bindings;
  uint num_bindings;
  uint threadgroup_bytes;
  uint3 grid, threads;
  uint meets;     // some threads wait for others: fibers are needed
  uint reversed;  // threadgroups from the last to the first
  Report report;
};

struct Fiber {
  void* stack_pointer;
  uint state, line;
  uint3 place;
};

// Who accessed a byte of threadgroup memory last: its thread, and how many barriers its group and its simdgroup had passed.
struct Access {
  uint epoch;
  uint16_t simd_epoch, thread;
};

struct Simdgroup {
  uint16_t epoch;  // simdgroup barriers passed
  uint parity;     // values are exchanged through two places by turns: nobody overwrites what others still read
  ulong shared[2][LANES];
  float left[2][8][8], right[2][8][8];
};

extern "C" {
alignas(4096) char sim_threadgroup[THREADGROUP_BYTES];
}

static Access writers[THREADGROUP_BYTES], readers[THREADGROUP_BYTES];
static Fiber fibers[MAX_THREADS];
static Simdgroup simdgroups[MAX_THREADS / LANES];
static char* stacks;
static Dispatch* dispatch;
static const Binding* last_binding;
static uint current, num_threads;
static uint epoch, first_epoch;  // barriers passed, over all dispatches; those before this threadgroup
static ulong dispatch_number, group_number;
static uint3 group;
static Report unwritten;  // the first read of threadgroup memory that nobody had written
static jmp_buf plain;
static bool is_plain;  // without fibers
static const char *plain_high, *plain_low;

// -- switching ---------------------------------------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(SIM_UCONTEXT)
static void* scheduler;
// System V: rbx, rbp, r12 to r15 survive a call
extern "C" __attribute__((naked, noinline)) void sim_switch(void** save, void* to) {
  __asm__ volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
static void to_fiber(Fiber& fiber) { sim_switch(&scheduler, fiber.stack_pointer); }
static void to_scheduler(Fiber& fiber) { sim_switch(&fiber.stack_pointer, scheduler); }
static void prepare(Fiber& fiber, char* stack, void (*begin)()) {
  void** top = (void**)(stack + STACK_BYTES);
  *--top = nullptr;  // the return address of `begin`, which does not return
  *--top = (void*)begin;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber.stack_pointer = top;
}
#else  // any processor, by the C library; slower by a system call a switch
static ucontext_t scheduler, contexts[MAX_THREADS];
static void to_fiber(Fiber& fiber) { swapcontext(&scheduler, &contexts[&fiber - fibers]); }
static void to_scheduler(Fiber& fiber) { swapcontext(&contexts[&fiber - fibers], &scheduler); }
static void prepare(Fiber& fiber, char* stack, void (*begin)()) {
  ucontext_t& context = contexts[&fiber - fibers];
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = STACK_BYTES;
  context.uc_link = nullptr;
  makecontext(&context, begin, 0);
}
#endif

static void stop(uint state, int line) {
  Fiber& fiber = fibers[current];
  fiber.state = state;
  fiber.line = line;
  to_scheduler(fiber);
}

static void fiber_main() {
  Fiber& fiber = fibers[current];
  dispatch->entry(dispatch->arguments, group, fiber.place);
  stop(ENDED, 0);
  __builtin_unreachable();
}

// -- faults -------------------------------------------------------------------------------------------------------------

static Report describe(uint fault, const char* address, uint size, bool is_write, uint other) {
  Report report = {};
  report.fault = fault;
  report.thread = current;
  report.other = other;
  report.size = size;
  report.is_write = is_write;
  report.group = group;
  report.address = (ulong)address;
  return report;
}

// Ends the dispatch: this thread never goes on.
static void fail(uint fault, const char* address, uint size, bool is_write, uint other) {
  dispatch->report = describe(fault, address, size, is_write, other);
  if (is_plain) longjmp(plain, 1);
  stop(ENDED, 0);
}

// -- accesses ------------------------------------------------------------------------------------------------------------

static inline bool meet_unordered(const Access& access) {
  if (access.epoch != epoch || access.thread == current) return false;
  bool same_simdgroup = access.thread != MANY && access.thread / LANES == current / LANES;
  return !(same_simdgroup && access.simd_epoch != simdgroups[current / LANES].epoch);
}

static void touch_threadgroup(const char* address, uint size, bool is_write) {
  ulong at = address - sim_threadgroup;
  if (at + size > dispatch->threadgroup_bytes) fail(OUTSIDE_THREADGROUP, address, size, is_write, 0);
  Access now = {epoch, simdgroups[current / LANES].epoch, (uint16_t)current};
  for (ulong i = at; i < at + size; i++) {
    if (meet_unordered(writers[i])) fail(is_write ? WRITE_AFTER_WRITE : READ_AFTER_WRITE, address, size, is_write, writers[i].thread);
    if (is_write) {
      if (meet_unordered(readers[i])) fail(WRITE_AFTER_READ, address, size, is_write, readers[i].thread);
      writers[i] = now;
    } else {
      // a fault at the next barrier, unless another thread writes it before: that names the barrier that is missing
      if (writers[i].epoch < first_epoch && !unwritten.fault) unwritten = describe(UNWRITTEN_THREADGROUP, address, size, is_write, 0);
      bool another = meet_unordered(readers[i]);
      readers[i] = now;
      if (another) readers[i].thread = MANY;
    }
  }
}

static void touch_watched(const Binding& binding, const char* address, uint size, bool is_write) {
  ulong now = dispatch_number << 40 | (group_number * MAX_THREADS + current);
  ulong* entries = binding.writers + (address - binding.begin);
  for (uint i = 0; i < size; i++) {
    if (entries[i] != now && entries[i] >> 40 == dispatch_number) fail(DEVICE_RACE, address, size, is_write, entries[i] % MAX_THREADS);
    if (is_write) entries[i] = now;
  }
}

static bool on_a_stack(const char* address) {
  if (is_plain) return address >= plain_low && address < plain_high;
  return address >= stacks && address < stacks + (ulong)MAX_THREADS * (STACK_BYTES + GUARD_BYTES);
}

static void touch_buffers(const char* address, uint size, bool is_write) {
  for (uint i = 0; i < dispatch->num_bindings; i++) {
    const Binding& binding = dispatch->bindings[i];
    if (address < binding.begin || address + size > binding.end) continue;
    last_binding = &binding;
    if (binding.writers) touch_watched(binding, address, size, is_write);
    return;
  }
  if (!on_a_stack(address)) fail(OUTSIDE_BUFFERS, address, size, is_write, 0);
}

static inline void touch(void* pointer, uint size, bool is_write) {
  const char* address = (const char*)pointer;
  if (address >= last_binding->begin && address + size <= last_binding->end && !last_binding->writers) return;
  if (address >= sim_threadgroup && address < sim_threadgroup + THREADGROUP_BYTES) return touch_threadgroup(address, size, is_write);
  touch_buffers(address, size, is_write);
}

extern "C" {
void __tsan_init() {}
#define SIM_TOUCH(size)                                                                \
  void __tsan_read##size(void* address) { touch(address, size, false); }               \
  void __tsan_write##size(void* address) { touch(address, size, true); }               \
  void __tsan_unaligned_read##size(void* address) { touch(address, size, false); }     \
  void __tsan_unaligned_write##size(void* address) { touch(address, size, true); }
SIM_TOUCH(1) SIM_TOUCH(2) SIM_TOUCH(4) SIM_TOUCH(8) SIM_TOUCH(16)
void* __tsan_memcpy(void* to, const void* from, ulong size) {
  touch((void*)from, size, false);
  touch(to, size, true);
  return memcpy(to, from, size);
}
void* __tsan_memset(void* to, int value, ulong size) {
  touch(to, size, true);
  return memset(to, value, size);
}

// -- threads that meet --------------------------------------------------------------------------------------------------

uint sim_lane() { return current % LANES; }

void sim_barrier(int line, int kind) {
  stop(kind, line);
}

ulong sim_share(int line, ulong value, uint from) {
  Simdgroup& simdgroup = simdgroups[current / LANES];
  uint parity = simdgroup.parity;
  simdgroup.shared[parity][current % LANES] = value;
  stop(SHARE, line);
  return simdgroup.shared[parity][from % LANES];
}

// An 8x8 matrix by lane: two neighbors of a row. Apple does not document the order; this one is what MLX reads and
// writes (ml-explore/mlx, mlx/backend/metal/kernels/steel/gemm/mma.h, get_coord).
sim_pair sim_multiply_accumulate(int line, float a0, float a1, float b0, float b1, float c0, float c1) {
  Simdgroup& simdgroup = simdgroups[current / LANES];
  uint lane = current % LANES, quad = lane / 4, parity = simdgroup.parity;
  uint row = (quad & 4) + lane / 2 % 4, col = (quad & 2) * 2 + lane % 2 * 2;
  auto &left = simdgroup.left[parity], &right = simdgroup.right[parity];
  left[row][col] = a0;
  left[row][col + 1] = a1;
  right[row][col] = b0;
  right[row][col + 1] = b1;
  stop(MULTIPLY, line);
  for (int k = 0; k < 8; k++) {
    c0 += left[row][k] * right[k][col];
    c1 += left[row][k] * right[k][col + 1];
  }
  return {c0, c1};
}
}

// -- scheduling -----------------------------------------------------------------------------------------------------------

// Says which two threads are at different places.
static bool differ(uint a, uint b, uint fault) {
  if (fibers[a].state == fibers[b].state && fibers[a].line == fibers[b].line) return false;
  Report& report = dispatch->report;
  report.fault = fault;
  report.thread = a;
  report.other = b;
  report.state = fibers[a].state;
  report.other_state = fibers[b].state;
  report.line = fibers[a].line;
  report.other_line = fibers[b].line;
  report.group = group;
  return true;
}

// Runs one simdgroup until its lanes wait for other simdgroups or have ended. False after a fault.
static bool run_simdgroup(uint first, uint count) {
  Simdgroup& simdgroup = simdgroups[first / LANES];
  for (;;) {
    for (uint i = first; i < first + count; i++) {
      current = i;
      to_fiber(fibers[i]);
      if (dispatch->report.fault) return false;
    }
    for (uint i = first + 1; i < first + count; i++)
      if (differ(first, i, fibers[first].state == BARRIER || fibers[i].state == BARRIER ? DIVERGENT_BARRIER : DIVERGENT_LANES)) return false;
    uint state = fibers[first].state;
    if (state == BARRIER || state == ENDED) return true;
    if (state == SIMDGROUP_BARRIER) {
      simdgroup.epoch++;
      continue;
    }
    if (count < LANES) {
      dispatch->report.fault = PARTIAL_SIMDGROUP;
      dispatch->report.thread = first;
      dispatch->report.size = count;
      dispatch->report.line = fibers[first].line;
      dispatch->report.group = group;
      return false;
    }
    simdgroup.parity ^= 1;
  }
}

static bool run_with_fibers() {
  if (!stacks) {
    ulong size = (ulong)MAX_THREADS * (STACK_BYTES + GUARD_BYTES);
    stacks = (char*)mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (uint i = 0; i < MAX_THREADS; i++) mprotect(stacks + (ulong)i * (STACK_BYTES + GUARD_BYTES), GUARD_BYTES, PROT_NONE);
  }
  uint3 size = dispatch->threads;
  for (uint i = 0; i < num_threads; i++) {
    fibers[i].state = RUNNING;
    fibers[i].place = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    prepare(fibers[i], stacks + (ulong)i * (STACK_BYTES + GUARD_BYTES) + GUARD_BYTES, fiber_main);
  }
  for (;;) {
    for (uint first = 0; first < num_threads; first += LANES)
      if (!run_simdgroup(first, num_threads - first < LANES ? num_threads - first : LANES)) return false;
    for (uint first = LANES; first < num_threads; first += LANES)
      if (differ(0, first, DIVERGENT_BARRIER)) return false;
    if (unwritten.fault) return false;
    if (fibers[0].state == ENDED) return true;
    epoch++;
  }
}

static bool run_plainly() {
  char here;
  plain_high = &here + 4096;  // frames below lie under it
  plain_low = &here - (4 << 20);
  if (setjmp(plain)) return false;
  uint3 size = dispatch->threads;
  for (current = 0; current < num_threads; current++)
    dispatch->entry(dispatch->arguments, group, {current % size.x, current / size.x % size.y, current / (size.x * size.y)});
  return !unwritten.fault;
}

extern "C" void sim_dispatch(Dispatch* wanted) {
  static const Binding nothing = {nullptr, nullptr, nullptr};
  dispatch = wanted;
  last_binding = &nothing;
  dispatch_number = (dispatch_number + 1) & 0xffffff;
  if (!dispatch_number) dispatch_number = 1;
  uint3 grid = wanted->grid;
  num_threads = wanted->threads.x * wanted->threads.y * wanted->threads.z;
  is_plain = !wanted->meets;
  ulong count = (ulong)grid.x * grid.y * grid.z;
  for (ulong i = 0; i < count; i++) {
    group_number = wanted->reversed ? count - 1 - i : i;
    group = {(uint)(group_number % grid.x), (uint)(group_number / grid.x % grid.y), (uint)(group_number / grid.x / grid.y)};
    first_epoch = ++epoch;
    memset(sim_threadgroup, POISON, wanted->threadgroup_bytes);
    unwritten.fault = NONE;
    if (is_plain ? run_plainly() : run_with_fibers()) continue;
    if (!wanted->report.fault) wanted->report = unwritten;
    return;
  }
}
