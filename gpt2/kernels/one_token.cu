// A token of one sequence of GPT-2, from its embedding to the choice of the next, in one kernel.
//
// With one sequence a token waits for the beginnings of kernels, not for arithmetic. Here all
// kernels are phases of one, which has as many blocks as the GPU has multiprocessors. In a phase
// each block computes some rows of a matrix times the vector that all blocks computed before.
//
// How a number gets to the other blocks: as a word of 8 bytes, the number and an epoch, which
// counts the halves of layers. A reader reads until it finds the epoch that it waits for (NCCL's
// protocol LL), so that a phase costs one way through the second-level cache and no barrier. No
// word is overwritten too early: who writes a number of the next layer has read numbers that
// needed those of all blocks, which they computed after they read the word.
//
// How weights get to a block: a warp of its own copies the pieces of all matrices, in the order in
// which they are used, to a ring in shared memory, as far ahead as there is room.
//
// How a block multiplies: a warp has some channels of the vector and all rows of the block. Tensor
// cores multiply bf16 by bf16, so the vector is split into a sum of two, x = high + low, which are
// two rows of one matrix. The gain and shift of LayerNorm are two more: with g the gain, s the
// shift, w · LayerNorm(x) = (w · gx - mean (w · g)) / std + w · s, and only the end waits for mean
// and std.
//
// Compiled for a network of C channels, HEADS, LAYERS and LONGEST positions, with BLOCKS of
// THREADS, and STAGES pieces of STAGE bytes. Weights are bf16, or float16 with FLOAT16.

constexpr int WARPS = THREADS / 32;
constexpr int D = C / HEADS;
constexpr int SHARES = 4;  // blocks that attend for a head
constexpr int RING = STAGES * STAGE;  // bytes
constexpr int PART = 2048;  // bytes that are copied at once
static_assert(STAGE <= 32 * PART);

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int rows_of_piece(int width) { return STAGE / (2 * width); }
__host__ __device__ constexpr int tiles_of(int outputs) { return ceil_div(ceil_div(outputs, BLOCKS), 8); }

constexpr int WINDOWS = C / (32 * WARPS);  // of 32 channels, of a warp
constexpr int PAIRS = WINDOWS / 2;  // of channels of a thread
constexpr int SETS = ceil_div(D, 64);  // of channels, by which attention is computed
constexpr int SUMMED = 8 * (tiles_of(4 * C) | 1);  // rows; the number is odd for the sake of memory banks
constexpr int SPLIT = 2 * 16 * (4 * WINDOWS | 1);  // words of two numbers of a warp
static_assert(C % (64 * WARPS) == 0 && D % 32 == 0 && D <= 128);

struct Layer {
  const u16 *gain_1, *shift_1, *qkv, *qkv_bias, *proj, *proj_bias;
  const u16 *gain_2, *shift_2, *fc, *fc_bias, *out, *out_bias;
  u16 *keys, *values;  // (HEADS, capacity, D)
};

struct Network {
  const Layer* layers;
  const u16 *wte, *wpe, *gain, *shift;  // of the last norm
  long long *token, *length;
  long long* told;  // by position, in memory of the CPU: the tokens that were chosen
  u16* logits;
  u64 *x, *qkv, *hidden, *best;  // words
  uint4* mixed;  // (SHARES, C / 2) of epoch, log of a sum, two numbers
  u32* passes;  // counted
  int vocabulary, capacity, chooses;
  float eps;
};

struct Shared {
  alignas(128) unsigned char ring[RING];
  u64 arrived[STAGES], read[STAGES];  // barriers
  Layer layers[LAYERS];
  alignas(16) u32 split[WARPS][SPLIT];
  alignas(16) float vector[C];
  float2 moments[WARPS];
  float sums[WARPS][4][SUMMED], added[WARPS][2][SUMMED], x[8 * tiles_of(C)];
  alignas(16) u32 q[2][D / 2];  // high and low
  uint4 key[D / 8], value[D / 8];  // of the new position
  alignas(8) float mix[WARPS][D];
  float top[WARPS], total[WARPS];
  int place[WARPS];
};
static_assert(sizeof(Shared) <= 227 << 10, "the ring is too large");

struct Rows {
  int first, count;
};

// What a block computes of a matrix.
__device__ Rows rows_of(int outputs) {
  u32 first = (u32)outputs * blockIdx.x / BLOCKS;
  return {(int)first, (int)((u32)outputs * (blockIdx.x + 1) / BLOCKS - first)};
}

struct Share {  // what a block attends to: some positions of a head
  int head, number, begin, end;

  __device__ Share(long long length) : head(blockIdx.x / SHARES), number(blockIdx.x % SHARES) {
    int size = ceil_div((int)length, SHARES);
    begin = number * size, end = min((int)length, begin + size);
  }
  __device__ bool exists() const { return head < HEADS; }
  __device__ int count() const { return max(end - begin, 0); }
};

// ---- weights

// By a warp whose lanes copy PART bytes each: one copy of all would take longer.
__device__ int send(Shared& s, const u16* weight, Rows rows, int width, int n) {
  int lane = threadIdx.x % 32;
  for (int row = 0; row < rows.count; row += rows_of_piece(width), n++) {
    int stage = n % STAGES, bytes = 2 * width * min(rows_of_piece(width), rows.count - row);
    u64* arrived = &s.arrived[stage];
    if (lane == 0) {
      if (n >= STAGES) barrier_wait(&s.read[stage], (n / STAGES - 1) & 1);
      barrier_expect(arrived, bytes);
    }
    __syncwarp();
    const unsigned char* from = (const unsigned char*)(weight + (long long)(rows.first + row) * width);
    int at = lane * PART;
    if (at < bytes) copy_begin(s.ring + stage * STAGE + at, from + at, min(PART, bytes - at), arrived);
  }
  return n;
}

__device__ void send_weights(const Network& net, Shared& s) {
  int n = 0;
  Share share(*net.length);
  Rows past = {0, share.exists() ? share.count() : 0};
  long long begin = ((long long)share.head * net.capacity + share.begin) * D;
  for (int i = 0; i < LAYERS; i++) {
    const Layer& l = s.layers[i];
    n = send(s, l.qkv, rows_of(3 * C), C, n);
    n = send(s, l.keys + begin, past, D, n);
    n = send(s, l.values + begin, past, D, n);
    n = send(s, l.proj, rows_of(C), C, n);
    n = send(s, l.fc, rows_of(4 * C), C, n);
    n = send(s, l.out, rows_of(C), 4 * C, n);
  }
  send(s, net.wte, rows_of(net.vocabulary), C, n);
}

// A thread that computes.
struct Thread {
  const Network& net;
  Shared& s;
  int index, warp, lane;
  u32 epoch;  // of the words that this half of a layer writes
  int stage;  // of the next piece
  u32 turn;  // parity of the times that the ring was read

  // Waits for the next pieces.
  __device__ void wait(int count) const {
    if (lane < count) barrier_wait(&s.arrived[stage_of(lane)], turn ^ (stage + lane >= STAGES));
    __syncwarp();
  }
  __device__ int stage_of(int piece) const {
    int at = stage + piece;
    return at >= STAGES ? at - STAGES : at;
  }
  // Byte `at` of the next pieces.
  __device__ const unsigned char* byte(int at) const {
    at += stage * STAGE;
    return s.ring + (at >= RING ? at - RING : at);
  }
  // Gives the room of the next pieces back, for which the warp has waited.
  __device__ void has_read(int count) {
    __syncwarp();
    if (lane < count) barrier_arrive(&s.read[stage_of(lane)]);
    turn ^= stage + count >= STAGES;
    stage = stage_of(count);
  }

  // The number of a thread's pair of C channels.
  __device__ int pair(int i) const { return warp * 16 * WINDOWS + i * 32 + lane; }
};

// ---- numbers

__device__ u64 word(float value, u32 epoch) { return (u64)epoch << 32 | __float_as_uint(value); }
__device__ float value_of(u64 word) { return __uint_as_float((u32)word); }

__device__ float2 two_floats(u32 pair) { return make_float2(to_float((u16)pair), to_float((u16)(pair >> 16))); }

__device__ u32 lower_halves(u32 x, u32 y) { return (x & 0xffff) | y << 16; }
__device__ u32 upper_halves(u32 x, u32 y) { return x >> 16 | (y & 0xffff0000); }

// The numbers of N pairs of neighbouring words, pair i at `at(i)`, once all are of the epoch.
template <int N, class At>
__device__ void receive(float2 (&v)[N], u32 epoch, At at) {
  ulonglong2 got[N];
  u32 tries = 0;
  bool ready;
  do {
    for (int i = 0; i < N; i++) got[i] = load_two_words(at(i));
    u32 wrong = 0;
    for (int i = 0; i < N; i++) wrong |= ((u32)(got[i].x >> 32) ^ epoch) | ((u32)(got[i].y >> 32) ^ epoch);
    ready = !wrong;
    if (++tries == FOREVER) __trap();
  } while (!ready);
  for (int i = 0; i < N; i++) v[i] = make_float2(value_of(got[i].x), value_of(got[i].y));
}

__device__ float warp_sum(float y) {
  for (int step = 16; step; step /= 2) y += __shfl_xor_sync(~0u, y, step);
  return y;
}

// ---- products
//
// Loops over what the warps left in shared memory are unrolled by order: the compiler would wait for
// one number after the other.

// A warp's numbers as rows of mma's matrix A. In a window of 32 channels, lane 4 g + n has
// channels 8 n to 8 n + 7 of row g, in the order that `Weights` has too. Two windows are one A: the
// rows of the first are its rows 0 to 3, those of the second 4 to 7.
template <int N>
struct Split {
  static constexpr int STRIDE = 16 * (N | 1);
  u32* words;
  int lane;

  __device__ Split(const Thread& t) : words(t.s.split[t.warp]), lane(t.lane) {}
  __device__ void write(int row, int pair, u32 bits) { words[row * STRIDE + pair] = bits; }
  // Rows 0 and 1: high and low.
  __device__ void write(int pair, float2 v) {
    v.x *= SMALLER, v.y *= SMALLER;
    u32 bits = two_halves(v.x, v.y);
    float2 high = two_floats(bits);
    write(0, pair, bits), write(1, pair, two_halves(v.x - high.x, v.y - high.y));
  }
  template <int ROWS>
  __device__ uint4 read(int windows) const {
    int row = lane / 4 % 4, window = 2 * windows + lane / 16;
    if (row >= ROWS) return make_uint4(0, 0, 0, 0);
    return *(const uint4*)(words + row * STRIDE + 16 * window + lane % 4 * 4);
  }
};

// Two windows of the sums of products: C of the B whose even rows have the first window and whose
// odd rows have the second, and of the B that has them the other way round. A row of a matrix
// begins at the same bank of shared memory as any other; so neighbours read other banks.
struct Sums {
  float c[2][4] = {};

  __device__ void add(const uint4& a, const uint4& b, int turn) {
    mma(c[turn], a.x, a.y, b.x, b.y);
    mma(c[turn], a.z, a.w, b.z, b.w);
  }
  __device__ static int window(int turn, int lane) { return turn ^ (lane / 4 & 1); }
  // Lane 4 g + n, g < 4: row g of A times rows 2 n and 2 n + 1 of B, over both windows.
  __device__ float2 both(int lane) const {
    float2 y = lane < 16 ? make_float2(c[0][0], c[1][1]) : make_float2(c[1][0], c[0][1]);
    y.x += __shfl_xor_sync(~0u, y.x, 16), y.y += __shfl_xor_sync(~0u, y.y, 16);
    return y;
  }
};

// A block's rows of a matrix, as mma's matrices B: lane 4 g + n has row g of a tile of eight.
template <int OUTPUTS, int N>
struct Weights {
  static constexpr int WIDTH = N * 32 * WARPS, TILES = tiles_of(OUTPUTS);
  static constexpr int ALL = TILES * N, AHEAD = ALL < 16 ? ALL : 16;  // as many as there are registers for
  static constexpr int CHAINS = TILES == 1 && N > 2 ? 2 : 1;  // of sums: an mma waits for the one before
  Thread& t;
  int count;
  const unsigned char* rows[TILES];
  uint4 ahead[AHEAD];

  __device__ Weights(Thread& t) : t(t), count(rows_of(OUTPUTS).count) {
    t.wait(pieces());
    for (int i = 0; i < TILES; i++)
      rows[i] = t.byte(min(8 * i + t.lane / 4, count - 1) * 2 * WIDTH) + t.warp * N * 64 + t.lane % 4 * 16;
    for (int i = 0; i < AHEAD; i++) ahead[i] = load(i);
    if (AHEAD == ALL) t.has_read(pieces());
  }
  __device__ int pieces() const { return ceil_div(count, rows_of_piece(WIDTH)); }
  __device__ uint4 load(int i) const {
    int step = i / TILES;
    return *(const uint4*)(rows[i % TILES] + step / 2 * 128 + 64 * Sums::window(step % 2, t.lane));
  }

  // Sums over the warp's channels, to `sums` of ROWS rows.
  template <int ROWS>
  __device__ void multiply(const Split<N>& split, float (*sums)[SUMMED]) {
    Sums c[TILES][CHAINS];
    for (int step = 0; step < N; step++) {
      uint4 a = split.template read<ROWS>(step / 2);
      for (int tile = 0; tile < TILES; tile++) {
        int i = step * TILES + tile;
        c[tile][step / 2 % CHAINS].add(a, i < AHEAD ? ahead[i < AHEAD ? i : 0] : load(i), step % 2);
      }
    }
    if (AHEAD < ALL) t.has_read(pieces());
    for (int tile = 0; tile < TILES; tile++) {
      float2 y = c[tile][0].both(t.lane);
      if (CHAINS == 2) {
        float2 more = c[tile][CHAINS - 1].both(t.lane);
        y.x += more.x, y.y += more.y;
      }
      if (t.lane < 4 * ROWS) *(float2*)&sums[t.lane / 4][8 * tile + t.lane % 4 * 2] = y;
    }
  }
};

// What a half of a layer needs of memory besides matrices, loaded a half before.
struct Small {
  u32 gain[PAIRS], shift[PAIRS];  // bits
  u16 bias, added;

  __device__ void load(const Thread& t, int half) {
    const Layer& l = t.s.layers[half / 2];
    bool mlp = half % 2;
    const u32 *gains = (const u32*)(mlp ? l.gain_2 : l.gain_1), *shifts = (const u32*)(mlp ? l.shift_2 : l.shift_1);
    for (int i = 0; i < PAIRS; i++) gain[i] = gains[t.pair(i)], shift[i] = shifts[t.pair(i)];
    bias = mlp ? bias_of<4 * C>(t, l.fc_bias) : bias_of<3 * C>(t, l.qkv_bias);
    added = bias_of<C>(t, mlp ? l.out_bias : l.proj_bias);
  }
  // Of the row that lane i % 8 ends, of the first tile of its warp.
  template <int OUTPUTS>
  __device__ static u16 bias_of(const Thread& t, const u16* bias) {
    return bias[min(rows_of(OUTPUTS).first + 8 * t.warp + t.lane % 8, OUTPUTS - 1)];
  }
};

__device__ void receive_x(const Thread& t, float2 (&x)[PAIRS]) {
  receive(x, t.epoch, [&](int i) { return t.net.x + 2 * t.pair(i); });
}

struct Moments {
  float mean, rstd;

  __device__ Moments(const Thread& t) {
    float total = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) total += t.s.moments[i].x, squares += t.s.moments[i].y;
    mean = total * (1.0f / C);
    rstd = rsqrtf(fmaxf(squares * (1.0f / C) - mean * mean, 0.0f) + t.net.eps);
  }
};

// The sums of a warp; read after the threads have met.
__device__ void write_moments(const Thread& t, const float2 (&x)[PAIRS]) {
  float2 y = make_float2(0, 0);
  for (int i = 0; i < PAIRS; i++)
    y.x += x[i].x + x[i].y, y.y += x[i].x * x[i].x + x[i].y * x[i].y;
  // the lower half of the lanes goes on with the one, the upper with the other
  bool upper = t.lane & 16;
  float kept = (upper ? y.y : y.x) + __shfl_xor_sync(~0u, upper ? y.x : y.y, 16);
  for (int step = 8; step; step /= 2) kept += __shfl_xor_sync(~0u, kept, step);
  if (t.lane % 16 == 0) ((float*)&t.s.moments[t.warp])[upper] = kept;
}

// words = gelu(weight · LayerNorm(x) + bias); gelu where MLP.
template <bool MLP>
__device__ void norm_and_multiply(Thread& t, float2 (&x)[PAIRS], const Small& small, u64* words, const u16* biases, bool waits) {
  constexpr int OUTPUTS = MLP ? 4 * C : 3 * C;
  Weights<OUTPUTS, WINDOWS> weights(t);
  Split<WINDOWS> split(t);
  for (int i = 0; i < PAIRS; i++)
    split.write(2, i * 32 + t.lane, small.gain[i]), split.write(3, i * 32 + t.lane, small.shift[i]);
  if (waits) receive_x(t, x);
  t.epoch++;
  for (int i = 0; i < PAIRS; i++) {
    float2 gain = two_floats(small.gain[i]);
    split.write(i * 32 + t.lane, make_float2(x[i].x * gain.x, x[i].y * gain.y));
  }
  __syncwarp();
  write_moments(t, x);
  weights.template multiply<4>(split, t.s.sums[t.warp]);
  meet();
  Rows rows = rows_of(OUTPUTS);
  for (int tile = t.warp; tile < weights.TILES; tile += WARPS) {
    Moments moments(t);
    int row = 8 * tile + t.lane % 8, kind = t.lane / 8;
    float y = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) y += t.s.sums[i][kind][row];
    y *= kind == 3 ? 1 : kind == 2 ? -moments.mean * moments.rstd : moments.rstd * (1 / SMALLER);
    y += __shfl_xor_sync(~0u, y, 8);
    y += __shfl_xor_sync(~0u, y, 16);
    y += to_float(tile == t.warp ? small.bias : biases[rows.first + min(row, rows.count - 1)]);
    // ½ (1 + tanh u) = σ(2u), see `linear.gelu`
    if (MLP) y = __fdividef(y, 1 + __expf(-1.5957691216057308f * (y + 0.044715f * y * y * y)));
    if (t.lane < 8 && row < rows.count) store_word(words + rows.first + row, word(y, t.epoch));
  }
}

// x += weight · v + bias, with v in `split`.
template <int N>
__device__ void multiply_and_add(Thread& t, Weights<C, N>& weights, const Split<N>& split, u16 bias, const u16* biases) {
  __syncwarp();
  weights.template multiply<2>(split, t.s.added[t.warp]);
  meet();
  Rows rows = rows_of(C);
  for (int tile = t.warp; tile < weights.TILES; tile += WARPS) {
    int row = 8 * tile + t.lane % 8;
    float x = t.s.x[row], y = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i += 2)
      if (WARPS % 2 == 0 || i + t.lane / 16 < WARPS) y += t.s.added[i + t.lane / 16][t.lane / 8 % 2][row];
    y += __shfl_xor_sync(~0u, y, 8);
    y += __shfl_xor_sync(~0u, y, 16);
    x += y * (1 / SMALLER) + to_float(tile == t.warp ? bias : biases[rows.first + min(row, rows.count - 1)]);
    t.s.x[row] = x;
    if (t.lane < 8 && row < rows.count) store_word(t.net.x + rows.first + row, word(x, t.epoch));
  }
}

// ---- attention

// By the first warp: the query, times 1/√D, and the new key and value where the share takes them.
__device__ void receive_qkv(const Thread& t, const Layer& l, const Share& share, long long length, bool adds) {
  for (int pair = t.lane; pair < D / 2; pair += 32) {
    const u64* words = t.net.qkv + share.head * D + 2 * pair;
    float2 qkv[3];
    if (adds) {
      receive(qkv, t.epoch, [&](int i) { return words + i * C; });
      u32 key = two_halves(qkv[1].x, qkv[1].y), value = two_halves(qkv[2].x, qkv[2].y);
      ((u32*)t.s.key)[pair] = key, ((u32*)t.s.value)[pair] = value;
      long long place = ((long long)share.head * t.net.capacity + length) * (D / 2) + pair;
      ((u32*)l.keys)[place] = key, ((u32*)l.values)[place] = value;
    } else {
      float2 q[1];
      receive(q, t.epoch, [&](int) { return words; });
      qkv[0] = q[0];
    }
    float2 q = make_float2(qkv[0].x * rsqrtf((float)D), qkv[0].y * rsqrtf((float)D));
    u32 bits = two_halves(q.x, q.y);
    float2 high = two_floats(bits);
    t.s.q[0][pair] = bits, t.s.q[1][pair] = two_halves(q.x - high.x, q.y - high.y);
  }
}

// A share's positions: those of the cache, which are in the ring, and where it `adds` the new one.
struct Positions {
  const Thread& t;
  int past, all;

  // A row of the cache that begins at piece `piece`; of positions behind the last, the last.
  __device__ const uint4* row(int piece, const uint4* added, int position) const {
    position = min(position, all - 1);
    return position == past ? added : (const uint4*)t.byte(piece * STAGE + position * 2 * D);
  }
};

// Softmax and its weighted mean of values, for the positions that a warp has seen. What counts is
// row 0 of mma's matrix C: lane n < 4 has the channels 16 n + j and 16 n + 8 + j.
struct Mix {
  float top = -1e30f, total = 0, sums[SETS][8][4] = {};  // finite: -inf - -inf would be NaN

  // Sixteen positions, of which lane n < 4 has the scores of 2 n, 2 n + 1, 2 n + 8 and 2 n + 9.
  __device__ void add(const float (&scores)[4], const uint4* const (&rows)[4], int lane) {
    float higher = fmaxf(fmaxf(fmaxf(scores[0], scores[1]), fmaxf(scores[2], scores[3])), top);
    higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 1));
    higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 2));
    float kept = __expf(top - higher), weights[4];
    for (int i = 0; i < 4; i++) weights[i] = __expf(scores[i] - higher);  // NaN stays NaN
    u32 a0 = two_halves(weights[0], weights[1]), a2 = two_halves(weights[2], weights[3]);
    float2 first = two_floats(a0), second = two_floats(a2);
    top = higher, total = kept * total + (first.x + first.y) + (second.x + second.y);
    if (lane >= 4) a0 = a2 = 0;
    for (int set = 0; set < SETS; set++) {
      uint4 v[4];
      for (int i = 0; i < 4; i++) v[i] = rows[i][(lane / 4 + 8 * set) % (D / 8)];
      const u32 *v0 = &v[0].x, *v1 = &v[1].x, *v2 = &v[2].x, *v3 = &v[3].x;
      for (int j = 0; j < 8; j++) {
        float(&c)[4] = sums[set][j];
        c[0] *= kept, c[1] *= kept;
        if (j % 2) mma(c, a0, a2, upper_halves(v0[j / 2], v1[j / 2]), upper_halves(v2[j / 2], v3[j / 2]));
        else mma(c, a0, a2, lower_halves(v0[j / 2], v1[j / 2]), lower_halves(v2[j / 2], v3[j / 2]));
      }
    }
  }

  __device__ void write(Shared& s, int warp, int lane) {
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    if (lane == 0) s.top[warp] = top, s.total[warp] = total;
    if (lane >= 4) return;
    for (int set = 0; set < SETS; set++)
      for (int i = 0; i < 2; i++) {
        int at = 64 * set + 16 * lane + 8 * i;
        for (int j = 0; j < 8 && at < D; j++) s.mix[warp][at + j] = sums[set][j][i];
      }
  }
};

// mixed = the mean of a share's values by the softmax of its scores, and log Σ e^score.
__device__ void attend(Thread& t, const Layer& l, const Share& share, long long length) {
  bool adds = share.number == 0;  // the first share takes the new position too
  Positions positions = {t, share.count(), share.count() + adds};
  int pieces = ceil_div(positions.past, rows_of_piece(D)), g = t.lane / 4, n = t.lane % 4;
  t.wait(2 * pieces);
  if (t.warp == 0) receive_qkv(t, l, share, length, adds);
  meet();
  uint4 q[SETS];  // as in `Split`
  for (int i = 0; i < SETS; i++) {
    int window = 2 * i + t.lane / 16;
    q[i] = make_uint4(0, 0, 0, 0);
    if (g % 4 < 2 && window < D / 32) q[i] = ((const uint4*)t.s.q[g % 4])[4 * window + n];
  }
  Mix mix;
#pragma unroll 1
  for (int first = 16 * t.warp; first < positions.all; first += 16 * WARPS) {
    float scores[4];
    const uint4* rows[4];
    for (int half = 0; half < 2; half++) {
      const uint4* key = positions.row(0, t.s.key, first + 8 * half + g);
      Sums c;
      for (int i = 0; i < D / 32; i++) {  // a row of one window alone is no multiple of all banks
        int window = D == 32 ? 0 : i / 2 * 2 + Sums::window(i % 2, t.lane);
        c.add(q[i / 2], key[4 * window + n], i % 2);
      }
      float2 y = D == 32 ? make_float2(c.c[0][0], c.c[0][1]) : c.both(t.lane);
      y.x += __shfl_xor_sync(~0u, y.x, 4), y.y += __shfl_xor_sync(~0u, y.y, 4);  // high and low
      for (int i = 0; i < 2; i++) {
        int position = first + 8 * half + 2 * n + i;
        scores[2 * half + i] = position < positions.all ? (i ? y.y : y.x) : -1e30f;
        rows[2 * half + i] = positions.row(pieces, t.s.value, position);
      }
    }
    mix.add(scores, rows, t.lane);
  }
  t.has_read(2 * pieces);
  mix.write(t.s, t.warp, t.lane);
  meet();
  if (t.index < D / 2) {
    float top = -1e30f, total = 0;
    float2 mixed = make_float2(0, 0);
#pragma unroll
    for (int i = 0; i < WARPS; i++) top = fmaxf(top, t.s.top[i]);
#pragma unroll
    for (int i = 0; i < WARPS; i++) {
      float weight = __expf(t.s.top[i] - top);
      float2 part = ((const float2*)t.s.mix[i])[t.index];
      total += weight * t.s.total[i], mixed.x += weight * part.x, mixed.y += weight * part.y;
    }
    float log_sum = -1e30f, scale = 0;
    if (total != 0) log_sum = top + __logf(total), scale = __fdividef(1, total);
    uint4 packet = make_uint4(t.epoch, __float_as_uint(log_sum), __float_as_uint(mixed.x * scale), __float_as_uint(mixed.y * scale));
    store_packet(t.net.mixed + (share.number * C + share.head * D) / 2 + t.index, packet);
  }
}

// v = attention, of which a thread has pairs of channels.
__device__ void receive_attention(const Thread& t, float2 (&v)[PAIRS]) {
  for (int i = 0; i < PAIRS; i++) {
    uint4 got[SHARES];
    u32 tries = 0;
    bool ready;
    do {
      ready = true;
      for (int share = 0; share < SHARES; share++) got[share] = load_packet(t.net.mixed + share * (C / 2) + t.pair(i));
      for (int share = 0; share < SHARES; share++) ready &= got[share].x == t.epoch;
      if (++tries == FOREVER) __trap();
    } while (!ready);
    float top = -1e30f, total = 0;
    v[i] = make_float2(0, 0);
    for (int share = 0; share < SHARES; share++) top = fmaxf(top, __uint_as_float(got[share].y));
    for (int share = 0; share < SHARES; share++) {
      float weight = __expf(__uint_as_float(got[share].y) - top);
      total += weight;
      v[i].x += weight * __uint_as_float(got[share].z), v[i].y += weight * __uint_as_float(got[share].w);
    }
    float part = __fdividef(1, total);
    v[i].x *= part, v[i].y *= part;
  }
}

// ---- the last token

// vector = LayerNorm(x), in shared memory.
__device__ void layer_norm(Thread& t, const float2 (&x)[PAIRS], const u32 (&gains)[PAIRS], const u32 (&shifts)[PAIRS]) {
  write_moments(t, x);
  meet();
  Moments moments(t);
  for (int i = 0; i < PAIRS; i++) {
    float2 gain = two_floats(gains[i]), shift = two_floats(shifts[i]);
    ((float2*)t.s.vector)[t.pair(i)] = make_float2((x[i].x - moments.mean) * moments.rstd * gain.x + shift.x,
                                                     (x[i].y - moments.mean) * moments.rstd * gain.y + shift.y);
  }
  meet();
}

constexpr int QUADS = ceil_div(C, 128);  // of channels that a lane multiplies

struct Vector {
  float4 v[QUADS];

  __device__ Vector(const Thread& t) {
    for (int i = 0; i < QUADS; i++) {
      int k = i * 32 + t.lane;
      v[i] = k < C / 4 ? ((const float4*)t.s.vector)[k] : make_float4(0, 0, 0, 0);
    }
  }

  // A lane's share of the product with a row.
  __device__ float operator*(const u16* row) const {
    float4 y = make_float4(0, 0, 0, 0);
    for (int i = 0; i < QUADS; i++) {
      int k = min(i * 32 + (int)threadIdx.x % 32, C / 4 - 1);
      uint2 w = ((const uint2*)row)[k];
      float2 low = two_floats(w.x), high = two_floats(w.y);
      y.x += low.x * v[i].x, y.y += low.y * v[i].y, y.z += high.x * v[i].z, y.w += high.y * v[i].w;
    }
    return y.x + y.y + (y.z + y.w);
  }
};

struct Best {
  float logit;
  int place;

  // The first place of the greatest logit; NaN is never greater.
  __device__ void take(float other, int at) {
    if (other > logit || (other == logit && at < place)) logit = other, place = at;
  }
};

// logits = wte · vector; the block's best as two words.
__device__ void head(Thread& t) {
  constexpr int PIECE = rows_of_piece(C);
  Rows rows = rows_of(t.net.vocabulary);
  Vector vector(t);
  Best best = {-3.402823e38f, t.net.vocabulary - 1};
  for (int begin = 0; begin < rows.count; begin += PIECE) {
    t.wait(1);
    const u16* weight = (const u16*)t.byte(0);
    for (int row = t.warp; row < min(PIECE, rows.count - begin); row += WARPS) {
      u16 logit = to_half(warp_sum(vector * (weight + row * C)));
      int at = rows.first + begin + row;
      if (t.lane == 0) t.net.logits[at] = logit;
      best.take(to_float(logit), at);  // compared as it is stored
    }
    t.has_read(1);
  }
  if (t.lane == 0) t.s.top[t.warp] = best.logit, t.s.place[t.warp] = best.place;
  meet();
  if (t.index == 0) {
    for (int i = 1; i < WARPS; i++) best.take(t.s.top[i], t.s.place[i]);
    store_word(t.net.best + 2 * blockIdx.x, word(best.logit, t.epoch));
    store_word(t.net.best + 2 * blockIdx.x + 1, word(__int_as_float(best.place), t.epoch));
  }
}

// By the first warp of the first block.
__device__ void choose(const Thread& t, long long length, u32 passes) {
  Best best = {-3.402823e38f, t.net.vocabulary - 1};
  for (int i = t.lane; i < BLOCKS; i += 32) {
    float2 of_block[1];
    receive(of_block, t.epoch, [&](int) { return t.net.best + 2 * i; });
    best.take(of_block[0].x, __float_as_int(of_block[0].y));
  }
  for (int step = 16; step; step /= 2) {
    float logit = __shfl_xor_sync(~0u, best.logit, step);
    best.take(logit, __shfl_xor_sync(~0u, best.place, step));
  }
  if (t.lane == 0) {  // all blocks have read these, as the last has sent its best
    if (t.net.chooses) *t.net.token = t.net.told[length] = best.place;
    *t.net.length = length + 1;
    *t.net.passes = passes + 1;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) one_token(Network net) {
  Shared& s = *(Shared*)shared_memory;
  int index = threadIdx.x;
  for (int i = index; i < (int)(sizeof(s.layers) / 8); i += THREADS + 32) ((u64*)s.layers)[i] = ((const u64*)net.layers)[i];
  if (index < STAGES) barrier_begin(&s.arrived[index], 1), barrier_begin(&s.read[index], WARPS);
  barriers_begun();
  __syncthreads();
  if (index >= THREADS) {
    send_weights(net, s);
    return;
  }
  u32 passes = *net.passes;
  long long length = *net.length, token = *net.token;
  Thread t = {net, s, index, index / 32, index % 32, passes * (2 * LAYERS + 2), 0, 0};
  Rows rows = rows_of(C);
  Share share(length);
  const u16 *of_token = net.wte + token * C, *of_place = net.wpe + length * C;
  if (index < rows.count) s.x[index] = to_float(of_token[rows.first + index]) + to_float(of_place[rows.first + index]);
  float2 x[PAIRS];
  for (int i = 0; i < PAIRS; i++) {
    float2 a = two_floats(((const u32*)of_token)[t.pair(i)]), b = two_floats(((const u32*)of_place)[t.pair(i)]);
    x[i] = make_float2(a.x + b.x, a.y + b.y);
  }
  Small small;
  small.load(t, 0);
#pragma unroll 1
  for (int half = 0; half < 2 * LAYERS; half++) {
    const Layer& l = s.layers[half / 2];
    Small next;
    if (half % 2) {
      norm_and_multiply<true>(t, x, small, net.hidden, l.fc_bias, true);
      Weights<C, 4 * WINDOWS> weights(t);
      Split<4 * WINDOWS> split(t);
      next.load(t, min(half + 1, 2 * LAYERS - 1));
      float2 v[2 * WINDOWS];
      receive(v, t.epoch, [&](int i) { return net.hidden + 2 * (t.warp * 64 * WINDOWS + i * 32 + t.lane); });
      for (int i = 0; i < 2 * WINDOWS; i++) split.write(i * 32 + t.lane, v[i]);
      multiply_and_add(t, weights, split, small.added, l.out_bias);
    } else {
      norm_and_multiply<false>(t, x, small, net.qkv, l.qkv_bias, half > 0);
      if (share.exists()) attend(t, l, share, length);
      Weights<C, WINDOWS> weights(t);
      Split<WINDOWS> split(t);
      next.load(t, half + 1);
      float2 v[PAIRS];
      receive_attention(t, v);
      for (int i = 0; i < PAIRS; i++)
        split.write(i * 32 + t.lane, v[i]);
      multiply_and_add(t, weights, split, small.added, l.proj_bias);
    }
    small = next;
  }
  u32 gain[PAIRS], shift[PAIRS];
  for (int i = 0; i < PAIRS; i++) gain[i] = ((const u32*)net.gain)[t.pair(i)], shift[i] = ((const u32*)net.shift)[t.pair(i)];
  receive_x(t, x);
  t.epoch++;
  layer_norm(t, x, gain, shift);
  head(t);
  if (blockIdx.x == 0 && t.warp == 0) choose(t, length, passes);
}
