// Runs one_token.cu on a CPU, for tests: every thread of every block is a fiber of one thread of the
// operating system, which gives way to the others where it waits for them.
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <vector>

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
using std::max;
using std::min;

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)
#define __expf expf
#define __logf logf
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct ulonglong2 { u64 x, y; };
float2 make_float2(float x, float y) { return {x, y}; }
float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
template <class To, class From> To bits(From value) {
  To to;
  static_assert(sizeof to == sizeof value);
  memcpy(&to, &value, sizeof to);
  return to;
}
u32 __float_as_uint(float y) { return bits<u32>(y); }
float __uint_as_float(u32 y) { return bits<float>(y); }
int __float_as_int(float y) { return bits<int>(y); }
float __int_as_float(int y) { return bits<float>(y); }
float __fdividef(float a, float b) { return a / b; }
float rsqrtf(float y) { return 1 / sqrtf(y); }

// ---- threads

constexpr int IN_BLOCK = THREADS + 32;
struct Meeting { int arrived = 0; long round = 0; };
struct Fiber {
  ucontext_t context;  // of its beginning; to return to it would take a call of the system
  jmp_buf place;
  std::vector<char> stack;
  int thread, block;
  bool begun = false, ended = false;
};
std::vector<Fiber> fibers;
Fiber* now;
jmp_buf scheduler;
std::vector<Meeting> of_block, of_computing, of_warp;
std::vector<u64> given;  // by the lanes of all warps to one another
std::vector<std::vector<unsigned char>> memories;

void give_way() {
  if (!_setjmp(now->place)) _longjmp(scheduler, 1);
}
void __trap() {
  fprintf(stderr, "block %d, thread %d waited in vain\n", now->block, now->thread);
  abort();
}
void meet(Meeting& meeting, int count) {
  long round = meeting.round;
  if (++meeting.arrived == count) meeting.arrived = 0, meeting.round++;
  while (meeting.round == round) give_way();
}
int place() { return now->block * IN_BLOCK + now->thread; }
void __syncthreads() { meet(of_block[now->block], IN_BLOCK); }
void meet() { meet(of_computing[now->block], THREADS); }
void __syncwarp() { meet(of_warp[place() / 32], 32); }
template <class T> T __shfl_xor_sync(u32, T value, int step) {
  memcpy(&given[place()], &value, sizeof value);
  __syncwarp();
  T other;
  memcpy(&other, &given[place() ^ step], sizeof other);
  __syncwarp();
  return other;
}
struct { struct { operator int() const { return now->thread; } } x; } threadIdx;
struct { struct { operator int() const { return now->block; } } x; } blockIdx;
#define shared_memory ((unsigned char*)(((u64)memories[now->block].data() + 127) / 128 * 128))

// ---- what ptx.cu has

constexpr u32 FOREVER = 1u << 16;
void store_word(u64* word, u64 value) { *word = value; }
ulonglong2 load_two_words(const u64* words) {
  give_way();
  return {words[0], words[1]};
}
void store_packet(uint4* packet, const uint4& v) { *packet = v; }
uint4 load_packet(const uint4* packet) {
  give_way();
  return *packet;
}
struct Barrier { unsigned char count, missing; u16 phase; int bytes; };
void barrier_begin(u64* barrier, u32 count) { *(Barrier*)barrier = {(unsigned char)count, (unsigned char)count, 0, 0}; }
void barriers_begun() {}
void barrier_change(u64* barrier, int arrivals, int bytes) {
  Barrier& b = *(Barrier*)barrier;
  b.missing -= arrivals, b.bytes += bytes;
  if (!b.missing && !b.bytes) b.missing = b.count, b.phase++;
}
void barrier_arrive(u64* barrier) { barrier_change(barrier, 1, 0); }
void barrier_expect(u64* barrier, u32 bytes) { barrier_change(barrier, 1, bytes); }
void barrier_wait(u64* barrier, u32 parity) {
  for (u32 tries = 0; (((Barrier*)barrier)->phase & 1) == parity; give_way())
    if (++tries == FOREVER) __trap();
}
void copy_begin(void* to, const void* from, u32 bytes, u64* barrier) {
  if (bytes % 16 || (u64)to % 16 || (u64)from % 16) __trap();
  memcpy(to, from, bytes);
  barrier_change(barrier, 0, -(int)bytes);
}
#ifdef FLOAT16
constexpr float SMALLER = 1.0f / 64;
float to_float(u16 y) { return bits<_Float16>(y); }
u16 to_half(float y) { return bits<u16>((_Float16)y); }
#else
constexpr float SMALLER = 1;
float to_float(u16 y) { return __uint_as_float((u32)y << 16); }
u16 to_half(float y) {  // bf16, to the nearest, halves to even
  u32 b = __float_as_uint(y);
  return y != y ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
#endif
u32 two_halves(float x, float y) { return to_half(x) | (u32)to_half(y) << 16; }
struct Fragments { u32 a0, a2, b0, b1; };
std::vector<Fragments> fragments(BLOCKS* IN_BLOCK);
void mma(float (&c)[4], u32 a0, u32 a2, u32 b0, u32 b1) {
  int lane = now->thread % 32;
  Fragments* of_lane = &fragments[place() - lane];
  of_lane[lane] = {a0, a2, b0, b1};
  __syncwarp();
  auto product = [](u32 a, u32 b) {
    return to_float((u16)a) * to_float((u16)b) + to_float((u16)(a >> 16)) * to_float((u16)(b >> 16));
  };
  for (int i = 0; i < 2; i++)
    for (int k = 0; k < 4; k++) {
      const Fragments &a = of_lane[lane / 4 * 4 + k], &b = of_lane[(lane % 4 * 2 + i) * 4 + k];
      c[i] += product(a.a0, b.b0) + product(a.a2, b.b1);
    }
  __syncwarp();
}
