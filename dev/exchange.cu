// Exchange of WORDS numbers among BLOCKS blocks, ITERATIONS times; MODE says how.
constexpr int WARPS = THREADS / 32;
constexpr int OWN = (WORDS + BLOCKS - 1) / BLOCKS;
struct Args { u64* words; float* numbers; u32* counter; long long* out; const unsigned char* stream; long long streamed; int iterations; u32 epoch; };
__device__ u64 word(float value, u32 epoch) { return (u64)epoch << 32 | __float_as_uint(value); }
__device__ long long now_ns() { long long t; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t) :: "memory"); return t; }
struct Shared { alignas(128) unsigned char ring[8][16384]; u64 arrived[8], read[8]; float v[WORDS]; float sums[WARPS]; };
__device__ uint4 load4(const u32* p) { uint4 v; asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory"); return v; }
__device__ void store4(u32* p, u32 v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) exchange(Args a) {
  Shared& s = *(Shared*)shared_memory;
  int index = threadIdx.x, lane = index % 32, warp = index / 32;
  if (index < 8) barrier_begin(&s.arrived[index], 1), barrier_begin(&s.read[index], 1);
  barriers_begun();
  __syncthreads();
  if (index >= THREADS) {
    if (index == THREADS && STREAM)
      for (int n = 0; n < STREAM * a.iterations; n++) {
        if (n >= 8) barrier_wait(&s.read[n % 8], (n / 8 - 1) & 1);
        copy_begin(s.ring[n % 8], a.stream + ((long long)n * BLOCKS + blockIdx.x) * 16384 % a.streamed, 16384, &s.arrived[n % 8]);
      }
    return;
  }
  int first = (int)((long long)WORDS * blockIdx.x / BLOCKS), count = (int)((long long)WORDS * (blockIdx.x + 1) / BLOCKS) - first;
  float value = index;
  int piece = 0;
  long long start = now_ns();
  for (int it = 0; it < a.iterations; it++) {
    u32 epoch = a.epoch + it;
    u64* words = a.words + (it & 1) * WORDS * 2;
    u32* shorts = (u32*)words;
    float sum = 0;
    if (MODE == 0 || MODE == 3) {
      if (index < count) store_word(words + first + index, word(value, epoch));
      constexpr int N = (WORDS / 2 + THREADS - 1) / THREADS;
      ulonglong2 got[N]; u32 wrong;
      do {
        wrong = 0;
        for (int i = 0; i < N; i++) got[i] = load_two_words(words + 2 * min(i * THREADS + index, WORDS / 2 - 1));
        for (int i = 0; i < N; i++) wrong |= ((u32)(got[i].x >> 32) ^ epoch) | ((u32)(got[i].y >> 32) ^ epoch);
        if (MODE == 3 && wrong) __nanosleep(32);
      } while (wrong);
      for (int i = 0; i < N; i++) sum += __uint_as_float((u32)got[i].x) + __uint_as_float((u32)got[i].y);
    } else if (MODE == 1) {  // words of four bytes, 4 of a thread at a time
      if (index < count) store4(shorts + first + index, (__float_as_uint(value) & ~15u) | (epoch & 15));
      constexpr int N = (WORDS / 4 + THREADS - 1) / THREADS;
      if (index < WORDS / 4) {
        uint4 got[N]; u32 wrong;
        do {
          wrong = 0;
          for (int i = 0; i < N; i++) got[i] = load4(shorts + 4 * min(i * THREADS + index, WORDS / 4 - 1));
          for (int i = 0; i < N; i++) wrong |= ((got[i].x ^ epoch) | (got[i].y ^ epoch) | (got[i].z ^ epoch) | (got[i].w ^ epoch)) & 15;
        } while (wrong);
        for (int i = 0; i < N; i++) sum += __uint_as_float(got[i].x) + __uint_as_float(got[i].y) + __uint_as_float(got[i].z) + __uint_as_float(got[i].w);
      }
    } else if (MODE == 2) {  // a counter of blocks
      float* numbers = a.numbers + (it & 1) * WORDS;
      if (index < count) asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(numbers + first + index), "f"(value) : "memory");
      meet();
      if (index == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(a.counter) : "memory");
        u32 got, wanted = (epoch + 1) * BLOCKS;
        do { asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(got) : "l"(a.counter) : "memory"); } while ((int)(got - wanted) < 0);
      }
      meet();
      for (int k = index; k < WORDS / 2; k += THREADS) {
        float x, y;
        asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "l"(numbers + 2 * k) : "memory");
        sum += x + y;
      }
    } else if (MODE == 4) {  // one warp polls for all, numbers by shared memory
      if (index < count) store_word(words + first + index, word(value, epoch));
      constexpr int N = WORDS / 2 / 32;
      if (warp == 0) {
        for (int i = 0; i < N; i += 4) {
          ulonglong2 got[4]; u32 wrong;
          do {
            wrong = 0;
            for (int j = 0; j < 4; j++) got[j] = load_two_words(words + 2 * ((i + j) * 32 + lane));
            for (int j = 0; j < 4; j++) wrong |= ((u32)(got[j].x >> 32) ^ epoch) | ((u32)(got[j].y >> 32) ^ epoch);
          } while (wrong);
          for (int j = 0; j < 4; j++) s.v[2 * ((i + j) * 32 + lane)] = __uint_as_float((u32)got[j].x), s.v[2 * ((i + j) * 32 + lane) + 1] = __uint_as_float((u32)got[j].y);
        }
      }
      meet();
      for (int k = index; k < WORDS; k += THREADS) sum += s.v[k];
    } else if (MODE == 5) {  // four copies of the words, each for a quarter of the blocks
      u64* all = a.words + (it & 1) * WORDS * 4;
      if (index < count * 4) store_word(all + index / count * WORDS + first + index % count, word(value, epoch));
      u64* mine = all + blockIdx.x % 4 * WORDS;
      constexpr int N = (WORDS / 2 + THREADS - 1) / THREADS;
      ulonglong2 got[N]; u32 wrong;
      do {
        wrong = 0;
        for (int i = 0; i < N; i++) got[i] = load_two_words(mine + 2 * min(i * THREADS + index, WORDS / 2 - 1));
        for (int i = 0; i < N; i++) wrong |= ((u32)(got[i].x >> 32) ^ epoch) | ((u32)(got[i].y >> 32) ^ epoch);
      } while (wrong);
      for (int i = 0; i < N; i++) sum += __uint_as_float((u32)got[i].x) + __uint_as_float((u32)got[i].y);
    }
    value = sum * 1e-3f;
    if (STREAM) {
      for (int i = 0; i < STREAM; i++) { int n = piece + i; barrier_wait(&s.arrived[n % 8], n / 8 & 1); }
    }
    meet();
    if (STREAM && index == 0) for (int i = 0; i < STREAM; i++) barrier_arrive(&s.read[(piece + i) % 8]);
    piece += STREAM;
  }
  if (index == 0) a.out[blockIdx.x] = now_ns() - start;
}
