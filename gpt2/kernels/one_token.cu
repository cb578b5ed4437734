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
// Compiled for a network of C channels, HEADS, LAYERS and LONGEST positions, with BLOCKS of
// THREADS, and STAGES pieces of STAGE bytes. Weights are bf16, or float16 with FLOAT16.

constexpr int WARPS = THREADS / 32;
constexpr int D = C / HEADS;
constexpr int SHARES = 4;  // blocks that attend for a head

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }
__host__ __device__ constexpr int rows_of_piece(int width) { return STAGE / (2 * width); }

constexpr int OWNED = ceil_div(C, BLOCKS);  // channels of x that a block adds to
constexpr int PAIRS = ceil_div(C / 2, THREADS);  // of channels of a thread
constexpr int LANES = D / 8;  // that read a position of the cache, 16 bytes each
constexpr int AT_ONCE = THREADS / LANES, TURNS = ceil_div(ceil_div(LONGEST, SHARES), AT_ONCE);

struct Layer {
  const u16 *gain_1, *shift_1, *qkv, *qkv_bias, *proj, *proj_bias;
  const u16 *gain_2, *shift_2, *fc, *fc_bias, *out, *out_bias;
  u16 *keys, *values;  // (HEADS, capacity, D)
};

struct Network {
  const Layer* layers;
  const u16 *wte, *wpe, *gain, *shift;  // of the last norm
  long long *token, *length;
  u16* logits;
  u64 *x, *qkv, *mixed, *sums, *hidden, *best;  // words
  u32* passes;  // counted
  int vocabulary, capacity, chooses;
  float eps;
};

struct Shared {
  alignas(128) unsigned char ring[STAGES][STAGE];
  u64 arrived[STAGES], read[STAGES];  // barriers
  Layer layers[LAYERS];
  alignas(16) float vector[C];
  float moments[WARPS][2], partial[WARPS][power_of_two(OWNED)], x[OWNED];
  float mix[WARPS][D], top[WARPS], total[WARPS];
  int place[WARPS];
};
static_assert(sizeof(Shared) <= 227 << 10, "the ring is too large");

struct Rows {
  int first, count;
};

// What a block computes of a matrix.
__device__ Rows rows_of(int outputs) {
  int first = (int)((long long)outputs * blockIdx.x / BLOCKS);
  return {first, (int)((long long)outputs * (blockIdx.x + 1) / BLOCKS) - first};
}

struct Share {  // what a block attends to: some positions of a head
  int head, number, begin, end;

  __device__ Share(long long length) : head(blockIdx.x / SHARES), number(blockIdx.x % SHARES) {
    int size = ceil_div((int)length, SHARES);
    begin = number * size, end = min((int)length, begin + size);
  }
  __device__ bool exists() const { return head < HEADS; }
  __device__ long long place(const Network& net, int position, int lane) const {
    return ((long long)head * net.capacity + position) * LANES + lane % LANES;
  }
};

// ---- weights

__device__ int send(Shared& s, const u16* weight, Rows rows, int width, int n) {
  for (int row = 0; row < rows.count; row += rows_of_piece(width), n++) {
    int stage = n % STAGES, count = min(rows_of_piece(width), rows.count - row);
    if (n >= STAGES) barrier_wait(&s.read[stage], (n / STAGES - 1) & 1);
    copy_begin(s.ring[stage], weight + (long long)(rows.first + row) * width, 2 * width * count, &s.arrived[stage]);
  }
  return n;
}

__device__ void send_weights(const Network& net, Shared& s) {
  int n = 0;
  Share share(*net.length);
  Rows past = {0, share.exists() ? max(share.end - share.begin, 0) : 0};
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
  int pieces;  // that were read

  // A piece of weights, once it is there.
  __device__ const u16* piece(int i) {
    int n = pieces + i, stage = n % STAGES;
    barrier_wait(&s.arrived[stage], n / STAGES & 1);
    return (const u16*)s.ring[stage];
  }

  // Gives the room of the next pieces back, when all are there: who skipped a phase of a barrier
  // would take the next one for it.
  __device__ void has_read(int count) {
    if (lane < count) piece(lane);
    __syncwarp();
    if (lane < count) barrier_arrive(&s.read[(pieces + lane) % STAGES]);
    pieces += count;
  }
};

// ---- numbers

__device__ u64 word(float value, u32 epoch) { return (u64)epoch << 32 | __float_as_uint(value); }
__device__ float value_of(u64 word) { return __uint_as_float((u32)word); }

__device__ float2 two_floats(u32 pair) { return make_float2(to_float((u16)pair), to_float((u16)(pair >> 16))); }

__device__ void eight_floats(const uint4& bits, float (&y)[8]) {
  float2 pairs[4] = {two_floats(bits.x), two_floats(bits.y), two_floats(bits.z), two_floats(bits.w)};
  for (int i = 0; i < 4; i++) y[2 * i] = pairs[i].x, y[2 * i + 1] = pairs[i].y;
}

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

// Sums of N numbers over a warp, N a power of two; lane i gets that of number i % N.
template <int N>
__device__ float warp_sums(float (&y)[N], int lane) {
  for (int half = N / 2; half; half /= 2)
    for (int i = 0; i < half; i++) {
      bool upper = lane & half;
      float kept = upper ? y[i + half] : y[i], given = upper ? y[i] : y[i + half];
      y[i] = kept + __shfl_xor_sync(~0u, given, half);
    }
  for (int step = N; step < 32; step *= 2) y[0] += __shfl_xor_sync(~0u, y[0], step);
  return y[0];
}

// ---- LayerNorm and what follows it

struct Norm {  // the bits of a thread's gains and shifts: to use them is to wait for them
  u32 gain[PAIRS], shift[PAIRS];
};

__device__ Norm load_norm(const Thread& t, const u16* gain, const u16* shift) {
  Norm norm;
  for (int i = 0; i < PAIRS; i++) {
    int k = min(i * THREADS + t.index, C / 2 - 1);
    norm.gain[i] = ((const u32*)gain)[k], norm.shift[i] = ((const u32*)shift)[k];
  }
  return norm;
}

__device__ void receive_x(const Thread& t, float2 (&x)[PAIRS]) {
  receive(x, t.epoch, [&](int i) { return t.net.x + 2 * min(i * THREADS + t.index, C / 2 - 1); });
}

// vector = LayerNorm(x), in shared memory.
__device__ void layer_norm(Thread& t, const float2 (&x)[PAIRS], const Norm& norm) {
  float sums[2] = {0, 0};
  for (int i = 0; i < PAIRS; i++)
    if (i * THREADS + t.index < C / 2) {
      sums[0] += x[i].x + x[i].y;
      sums[1] += x[i].x * x[i].x + x[i].y * x[i].y;
    }
  float sum = warp_sums(sums, t.lane);
  if (t.lane < 2) t.s.moments[t.warp][t.lane] = sum;
  meet();
  float total = 0, squares = 0;
  for (int i = 0; i < WARPS; i++) total += t.s.moments[i][0], squares += t.s.moments[i][1];
  float mean = total * (1.0f / C), rstd = rsqrtf(fmaxf(squares * (1.0f / C) - mean * mean, 0.0f) + t.net.eps);
  for (int i = 0; i < PAIRS; i++) {
    int k = i * THREADS + t.index;
    float2 gain = two_floats(norm.gain[i]), shift = two_floats(norm.shift[i]);
    if (k < C / 2)
      ((float2*)t.s.vector)[k] =
          make_float2((x[i].x - mean) * rstd * gain.x + shift.x, (x[i].y - mean) * rstd * gain.y + shift.y);
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

template <int OUTPUTS>
struct Biases {  // the bits of those of a warp's rows, of which lane i % 2 writes row i
  static constexpr int TURNS = ceil_div(ceil_div(OUTPUTS, BLOCKS), 2 * WARPS);
  u16 bits[TURNS];

  __device__ Biases(const Thread& t, const u16* bias) {
    Rows rows = rows_of(OUTPUTS);
    for (int i = 0; i < TURNS; i++) bits[i] = bias[min(rows.first + row(t, i) + t.lane % 2, OUTPUTS - 1)];
  }
  __device__ static int row(const Thread& t, int turn) { return 2 * (turn * WARPS + t.warp); }
};

// words = gelu(weight · vector + bias); a warp computes two rows at a time.
template <bool GELU, int OUTPUTS>
__device__ void products(Thread& t, const Biases<OUTPUTS>& bias, u64* words) {
  constexpr int PIECE = rows_of_piece(C);
  Rows rows = rows_of(OUTPUTS);
  Vector vector(t);
  for (int i = 0; i < bias.TURNS; i++) {
    int row = bias.row(t, i);
    if (row >= rows.count) break;
    int next = min(row + 1, rows.count - 1);
    float y[2] = {vector * (t.piece(row / PIECE) + row % PIECE * C), vector * (t.piece(next / PIECE) + next % PIECE * C)};
    float sum = warp_sums(y, t.lane) + to_float(bias.bits[i]);
    // ½ (1 + tanh u) = σ(2u), see `linear.gelu`
    if (GELU) sum = __fdividef(sum, 1 + __expf(-1.5957691216057308f * (sum + 0.044715f * sum * sum * sum)));
    if (t.lane < 2 && row + t.lane < rows.count) store_word(words + rows.first + row + t.lane, word(sum, t.epoch));
  }
  t.has_read(ceil_div(rows.count, PIECE));
}

// ---- additions to x

// x += weight · v + bias; a thread has pairs of v, and its products with all rows of the block.
template <int WIDTH, int N>
__device__ void load_rows(Thread& t, u32 (&w)[OWNED][N]) {
  constexpr int PIECE = rows_of_piece(WIDTH);
  int pieces = ceil_div(rows_of(C).count, PIECE);
  for (int i = 0; i < pieces; i++) t.piece(i);
  for (int row = 0; row < OWNED; row++) {
    const u32* from = (const u32*)t.s.ring[(t.pieces + min(row / PIECE, pieces - 1)) % STAGES] + row % PIECE * WIDTH / 2;
    for (int i = 0; i < N; i++) {
      int k = i * THREADS + t.index;
      w[row][i] = WIDTH / 2 % THREADS && k >= WIDTH / 2 ? 0 : from[k];
    }
  }
  t.has_read(pieces);
}
template <int N>
__device__ void add_products(Thread& t, const u32 (&w)[OWNED][N], const float2 (&v)[N], u16 bias) {
  constexpr int SUMS = power_of_two(OWNED);
  Rows rows = rows_of(C);
  float y[SUMS] = {};
  for (int row = 0; row < OWNED; row++)
    for (int i = 0; i < N; i++) {
      float2 pair = two_floats(w[row][i]);
      y[row] += pair.x * v[i].x + pair.y * v[i].y;
    }
  float sum = warp_sums(y, t.lane);
  if (t.lane < SUMS) t.s.partial[t.warp][t.lane] = sum;
  meet();
  if (t.index < rows.count) {
    float x = t.s.x[t.index] + to_float(bias);
    for (int i = 0; i < WARPS; i++) x += t.s.partial[i][t.index];
    t.s.x[t.index] = x;
    store_word(t.net.x + rows.first + t.index, word(x, t.epoch));
  }
}

__device__ u16 load_bias(const Thread& t, const u16* bias) { return bias[min(rows_of(C).first + t.index, C - 1)]; }

// ---- attention

// Eight channels of q · key, summed over the lanes of a position.
__device__ float score_of(const uint4& key, const float2 (&q)[4]) {
  float k[8], y = 0;
  eight_floats(key, k);
  for (int i = 0; i < 4; i++) y += k[2 * i] * q[i].x + k[2 * i + 1] * q[i].y;
  for (int step = 1; step < LANES; step *= 2) y += __shfl_xor_sync(~0u, y, step);
  return y;
}

__device__ uint4 rounded(const float2* y) {
  u32 bits[4];
  for (int i = 0; i < 4; i++) bits[i] = to_half(y[i].x) | (u32)to_half(y[i].y) << 16;
  return make_uint4(bits[0], bits[1], bits[2], bits[3]);
}

// mixed, sums = Σ e^(score - top) value of a share, and top and Σ e^(score - top).
__device__ void attend(Thread& t, const Layer& l, const Share& share, long long length) {
  constexpr int PIECE = rows_of_piece(D);
  int count = max(share.end - share.begin, 0), pieces = ceil_div(count, PIECE);
  for (int i = 0; i < 2 * pieces; i++) t.piece(i);

  const u64* words = t.net.qkv + share.head * D + t.index % LANES * 8;
  // the first warp of the first share takes the new position too
  bool adds = share.number == 0 && t.warp == 0;
  float2 q[4];
  uint4 key = make_uint4(0, 0, 0, 0), value = key;
  if (adds) {
    float2 qkv[12];
    receive(qkv, t.epoch, [&](int i) { return words + i / 4 * C + i % 4 * 2; });
    for (int i = 0; i < 4; i++) q[i] = qkv[i];
    key = rounded(qkv + 4), value = rounded(qkv + 8);
    if (t.lane < LANES) {
      long long place = share.place(t.net, (int)length, t.lane);
      ((uint4*)l.keys)[place] = key;
      ((uint4*)l.values)[place] = value;
    }
  } else {
    receive(q, t.epoch, [&](int i) { return words + i * 2; });
  }
  for (int i = 0; i < 4; i++) q[i].x *= rsqrtf((float)D), q[i].y *= rsqrtf((float)D);
  auto past = [&](int first, int turn) {
    int position = max(min(turn * AT_ONCE + t.index / LANES, count - 1), 0);
    int stage = (t.pieces + first + position / PIECE) % STAGES;
    return ((const uint4*)t.s.ring[stage])[position % PIECE * LANES + t.lane % LANES];
  };
  float scores[TURNS + 1], top = -1e30f;  // finite: -inf - -inf would be NaN
  for (int i = 0; i <= TURNS; i++) {
    bool there = i < TURNS ? i * AT_ONCE + t.index / LANES < count : adds && t.lane < LANES;
    scores[i] = score_of(i < TURNS ? past(0, i) : key, q);
    if (!there) scores[i] = -1e30f;
    top = fmaxf(top, scores[i]);
  }
  for (int step = LANES; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  float total = 0, mix[8] = {};
  for (int i = 0; i <= TURNS; i++) {
    float v[8], weight = scores[i] == -1e30f ? 0 : __expf(scores[i] - top);  // NaN stays NaN
    eight_floats(i < TURNS ? past(pieces, i) : value, v);
    total += weight;
    for (int d = 0; d < 8; d++) mix[d] += weight * v[d];
  }
  for (int step = LANES; step < 32; step *= 2) {
    total += __shfl_xor_sync(~0u, total, step);
    for (int d = 0; d < 8; d++) mix[d] += __shfl_xor_sync(~0u, mix[d], step);
  }
  t.has_read(2 * pieces);
  if (t.lane < LANES)
    for (int d = 0; d < 8; d++) t.s.mix[t.warp][t.lane * 8 + d] = mix[d];
  if (t.lane == 0) t.s.top[t.warp] = top, t.s.total[t.warp] = total;
  meet();
  if (t.index < D) {
    float mixed = 0;
    top = -1e30f, total = 0;
    for (int i = 0; i < WARPS; i++) top = fmaxf(top, t.s.top[i]);
    for (int i = 0; i < WARPS; i++) {
      float weight = __expf(t.s.top[i] - top);
      total += weight * t.s.total[i];
      mixed += weight * t.s.mix[i][t.index];
    }
    store_word(t.net.mixed + share.number * C + share.head * D + t.index, word(mixed, t.epoch));
    if (t.index < 2)
      store_word(t.net.sums + 2 * (share.number * HEADS + share.head) + t.index, word(t.index ? total : top, t.epoch));
  }
}

// v = attention, whose shares are joined; a thread has pairs of channels.
__device__ void join_shares(const Thread& t, float2 (&v)[PAIRS]) {
  for (int i = 0; i < PAIRS; i++) {
    int k = min(i * THREADS + t.index, C / 2 - 1);
    float2 got[2 * SHARES];  // mixed, and (top, total)
    receive(got, t.epoch, [&](int j) {
      int share = j / 2;
      return j % 2 ? t.net.sums + 2 * (share * HEADS + 2 * k / D) : t.net.mixed + share * C + 2 * k;
    });
    float top = -1e30f, total = 0;
    v[i] = make_float2(0, 0);
    for (int share = 0; share < SHARES; share++) top = fmaxf(top, got[2 * share + 1].x);
    for (int share = 0; share < SHARES; share++) {
      float2 mixed = got[2 * share], sum = got[2 * share + 1];
      float weight = __expf(sum.x - top);
      total += weight * sum.y;
      v[i].x += weight * mixed.x, v[i].y += weight * mixed.y;
    }
    float part = __fdividef(1, total); v[i].x *= part, v[i].y *= part;
  }
}

// ---- the last token

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
    const u16* weight = t.piece(0);
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
    if (t.net.chooses) *t.net.token = best.place;
    *t.net.length = length + 1;
    *t.net.passes = passes + 1;
  }
}

// Small vectors of the next layer on their way from memory, where they would be waited for.
__device__ void fetch_vectors(const Thread& t, const Layer& l) {
  const u16* norms[4] = {l.gain_1, l.shift_1, l.gain_2, l.shift_2};
  if (blockIdx.x < 4 && t.index * 64 < C) to_second_level_cache(norms[blockIdx.x] + t.index * 64);
  if (t.index == 0) {
    to_second_level_cache(l.qkv_bias + rows_of(3 * C).first);
    to_second_level_cache(l.proj_bias + rows_of(C).first);
    to_second_level_cache(l.fc_bias + rows_of(4 * C).first);
    to_second_level_cache(l.out_bias + rows_of(C).first);
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
    if (index == THREADS) send_weights(net, s);
    return;
  }
  u32 passes = *net.passes;
  long long length = *net.length, token = *net.token;
  Thread t = {net, s, index, index / 32, index % 32, passes * (2 * LAYERS + 2), 0};
  Rows rows = rows_of(C);
  Share share(length);
  const u16 *of_token = net.wte + token * C, *of_place = net.wpe + length * C;
  if (index < rows.count) s.x[index] = to_float(of_token[rows.first + index]) + to_float(of_place[rows.first + index]);
  float2 x[PAIRS];
  for (int i = 0; i < PAIRS; i++) {
    int k = min(i * THREADS + index, C / 2 - 1);
    float2 a = two_floats(((const u32*)of_token)[k]), b = two_floats(((const u32*)of_place)[k]);
    x[i] = make_float2(a.x + b.x, a.y + b.y);
  }
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    const Layer& l = s.layers[layer];
    {
      Norm norm = load_norm(t, l.gain_1, l.shift_1);
      Biases<3 * C> bias(t, l.qkv_bias);
      if (layer) receive_x(t, x);
      t.epoch++;
      layer_norm(t, x, norm);
      products<false>(t, bias, net.qkv);
    }
    if (share.exists()) attend(t, l, share, length);
    {
      u16 bias = load_bias(t, l.proj_bias);
      float2 v[PAIRS];
      u32 w[OWNED][PAIRS];
      load_rows<C>(t, w);
      join_shares(t, v);
      add_products(t, w, v, bias);
    }
    if (layer + 1 < LAYERS) fetch_vectors(t, s.layers[layer + 1]);
    {
      Norm norm = load_norm(t, l.gain_2, l.shift_2);
      Biases<4 * C> bias(t, l.fc_bias);
      receive_x(t, x);
      t.epoch++;
      layer_norm(t, x, norm);
      products<true>(t, bias, net.hidden);
    }
    {
      u16 bias = load_bias(t, l.out_bias);
      float2 v[ceil_div(2 * C, THREADS)];
      u32 w[OWNED][ceil_div(2 * C, THREADS)];
      load_rows<4 * C>(t, w);
      receive(v, t.epoch, [&](int i) { return net.hidden + 2 * min(i * THREADS + index, 2 * C - 1); });
      add_products(t, w, v, bias);
    }
  }
  Norm norm = load_norm(t, net.gain, net.shift);
  receive_x(t, x);
  t.epoch++;
  layer_norm(t, x, norm);
  head(t);
  if (blockIdx.x == 0 && t.warp == 0) choose(t, length, passes);
}
