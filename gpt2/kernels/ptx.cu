// The machine instructions that one_token.cu needs, each as a function (PTX ISA, NVIDIA).

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 FOREVER = 1u << 24;  // tries to read a word: several seconds

extern __shared__ __align__(128) unsigned char shared_memory[];

__device__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Words of 8 bytes, each written and read as a whole, past the first-level caches.
__device__ void store_word(u64* word, u64 value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

__device__ ulonglong2 load_two_words(const u64* words) {
  ulonglong2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(words) : "memory");
  return v;
}

// 16 bytes, written and read as a whole.
__device__ void store_packet(uint4* packet, const uint4& v) {
  u64 low = (u64)v.y << 32 | v.x, high = (u64)v.w << 32 | v.z;
  asm volatile("{ .reg .b128 q; mov.b128 q, {%1, %2}; st.relaxed.gpu.global.b128 [%0], q; }" ::"l"(packet), "l"(low), "l"(high) : "memory");
}

__device__ uint4 load_packet(const uint4* packet) {
  u64 low, high;
  asm volatile("{ .reg .b128 q; ld.relaxed.gpu.global.b128 q, [%2]; mov.b128 {%0, %1}, q; }" : "=l"(low), "=l"(high) : "l"(packet) : "memory");
  return make_uint4((u32)low, (u32)(low >> 32), (u32)high, (u32)(high >> 32));
}

// A barrier in shared memory: its phase ends with `count` arrivals and the bytes they announced.
__device__ void barrier_begin(u64* barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ void barriers_begun() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Waits for the end of a phase of this parity.
__device__ void barrier_wait(u64* barrier, u32 parity) {
  u32 done = 0;
  while (!done)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
}

// Arrives, and announces bytes.
__device__ void barrier_expect(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Copies announced bytes to shared memory.
__device__ void copy_begin(void* to, const void* from, u32 bytes, u64* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

// Waits for the other threads that compute.
__device__ void meet() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }


#ifdef FLOAT16
#define HALF "f16"
constexpr float SMALLER = 1.0f / 64;  // the part of a number that is rounded to 16 bits: float16 ends at 65504
__device__ float to_float(u16 bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}
#else
#define HALF "bf16"
constexpr float SMALLER = 1;
__device__ float to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }
#endif

__device__ u16 to_half(float y) {
  u16 bits;
  asm("cvt.rn." HALF ".f32 %0, %1;" : "=h"(bits) : "f"(y));
  return bits;
}

// x in the lower half.
__device__ u32 two_halves(float x, float y) {
  u32 bits;
  asm("cvt.rn." HALF "x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(y), "f"(x));
  return bits;
}

// c += A B, of which A (16 × 16) has eight rows of zeros at its end, and B is 16 × 8.
__device__ void mma(float (&c)[4], u32 a0, u32 a2, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." HALF "." HALF ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %5}, {%7, %8}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(0), "r"(a2), "r"(b0), "r"(b1));
}
