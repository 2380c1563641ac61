// Block-sparse attention for CPUs: forward, backward and decode handlers for XLA's FFI, float32.
//
// Matrix products run on packed panels that are kPanel columns wide, with GCC vector extensions; a strip of kStrip query rows
// keeps its scores in the first-level cache. Work is dealt out to XLA's own thread pool. What a task computes and in which
// order sums are formed depends on shapes and lists only, never on threads, so results are the same bits in every run.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 4;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 8;
#else
constexpr int kLanes = 4, kRows = 4;
#endif
constexpr int64_t kPanel = 2 * kLanes;  // columns of a panel
constexpr int64_t kStrip = 32;          // query rows whose scores stay in the first-level cache
constexpr int64_t kDeep = 128;          // query rows over which a product for dk and dv sums at a time
constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896f;

typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline Vec Load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void Store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }
// x - 0 is x for every x, so this is a broadcast alone; 0 + x would be an addition.
inline Vec All(float x) { return x - Vec{}; }
inline Ints AllInts(int32_t x) { return Ints{} + x; }
inline Words AllWords(uint32_t x) { return Words{} + x; }
inline Words Lane() {
  Words r;
  for (int i = 0; i < kLanes; i++) r[i] = i;
  return r;
}
// Sum and largest of all lanes, by halves.
#if defined(__clang__)
inline float Sum(Vec x) {
  float s = 0;
  for (int i = 0; i < kLanes; i++) s += x[i];
  return s;
}
inline float Max(Vec x) {
  float s = x[0];
  for (int i = 1; i < kLanes; i++) s = x[i] > s ? x[i] : s;
  return s;
}
#else
inline float Sum(Vec x) {
  for (int half = kLanes / 2; half; half /= 2) x += __builtin_shuffle(x, (Ints)(Lane() ^ half));
  return x[0];
}
inline float Max(Vec x) {
  for (int half = kLanes / 2; half; half /= 2) {
    Vec y = __builtin_shuffle(x, (Ints)(Lane() ^ half));
    x = x > y ? x : y;
  }
  return x[0];
}
#endif
inline float Dot(const float* a, const float* b, int64_t n) {
  Vec sum = Vec{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += Load(a + i) * Load(b + i);
  float s = Sum(sum);
  for (; i < n; i++) s += a[i] * b[i];
  return s;
}
inline int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// exp(x) for x <= 88, within 2 units in the last place; exactly 0 below -87.3.
inline Vec Exp(Vec x) {
  Vec t = x * kLog2e;
  Vec z = t + 12582912.f;
  Vec f = t - (z - 12582912.f);
  Vec p = All(1.534581086e-04f);
  p = p * f + 1.339993121e-03f;
  p = p * f + 9.618488961e-03f;
  p = p * f + 5.550328777e-02f;
  p = p * f + 2.402264689e-01f;
  p = p * f + 6.931472057e-01f;
  p = p * f + 1.f;
  Ints bits = (Ints)p + ((Ints)z << 23);
  return t < -126.f ? Vec{} : (Vec)bits;
}

// tanh: a polynomial near 0 (Cephes tanhf), else 1 - 2 / (exp(2 |x|) + 1).
inline Vec Tanh(Vec x) {
  Vec size = x < 0.f ? -x : x;
  Vec z = x * x;
  Vec p = All(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  p = p * z * x + x;
  Vec capped = size < 40.f ? size : All(40.f);
  Vec q = 1.f - 2.f / (Exp(2.f * capped) + 1.f);
  q = x < 0.f ? -q : q;
  return size < 0.625f ? p : q;
}

inline uint32_t Mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}
inline Words Mix(Words x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Memory aligned to cache lines, not initialised.
class Buffer {
 public:
  explicit Buffer(int64_t floats) : data_(static_cast<float*>(::operator new(floats * 4 + 64, std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
};

// Scratch of a thread, kept between tasks.
float* Scratch(int64_t floats) {
  static thread_local std::unique_ptr<Buffer> buffer;
  static thread_local int64_t size = 0;
  if (size < floats) {
    buffer.reset(new Buffer(floats));
    size = floats;
  }
  return buffer->get();
}

// Runs f(0) ... f(n - 1) on the pool; the calling thread works too, and never waits for work that nobody has begun.
template <class F>
void ParallelFor(ffi::ThreadPool& pool, int64_t n, const F& f) {
  struct State {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable finished;
  };
  int64_t helpers = std::min<int64_t>(pool.num_threads() - 1, n - 1);
  auto state = std::make_shared<State>();
  auto work = [state, n, &f]() {
    int64_t count = 0;
    for (int64_t i; (i = state->next.fetch_add(1)) < n; count++) f(i);
    if (count == 0) return;
    std::lock_guard<std::mutex> guard(state->mutex);
    state->done += count;
    if (state->done == n) state->finished.notify_one();
  };
  for (int64_t t = 0; t < helpers; t++) pool.Schedule(decltype(work)(work));
  work();
  std::unique_lock<std::mutex> guard(state->mutex);
  state->finished.wait(guard, [&] { return state->done == n; });
}

// ---- products ------------------------------------------------------------------------------------------------------------

// The right operand of a product: element (p, panel * kPanel + c) lies at data[panel * step + p * ld + c].
struct Panels {
  const float* data;
  int64_t ld, step;
};
inline Panels Packed(const float* data, int64_t depth) { return {data, kPanel, depth * kPanel}; }
inline Panels RowMajor(const float* data, int64_t ld) { return {data, ld, kPanel}; }

// R rows of one panel of C (+)= A B. A(r, p) is a[r * lda + p], or a[p * lda + r] if transposed. The loops over r are unrolled so
// that the sums stay in registers.
template <int R, bool kTransposed>
inline void Micro(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  Vec x[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) x[r][0] = x[r][1] = Vec{};
  for (int64_t p = 0; p < depth; p++) {
    const Vec b0 = Load(b + p * ldb), b1 = Load(b + p * ldb + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec s = All(kTransposed ? a[p * lda + r] : a[r * lda + p]);
      x[r][0] += s * b0;
      x[r][1] += s * b1;
    }
  }
  if (add) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Store(c + r * ldc, Load(c + r * ldc) + x[r][0]);
      Store(c + r * ldc + kLanes, Load(c + r * ldc + kLanes) + x[r][1]);
    }
  } else {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Store(c + r * ldc, x[r][0]);
      Store(c + r * ldc + kLanes, x[r][1]);
    }
  }
}

// C[rows, columns] (+)= A[rows, depth] B[depth, columns]; columns is a multiple of kPanel.
template <bool kTransposed>
void Multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, Panels b, float* c, int64_t ldc,
              bool add) {
  const int64_t down = kTransposed ? 1 : lda;
  for (int64_t j = 0; j < columns; j += kPanel, b.data += b.step) {
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) Micro<kRows, kTransposed>(depth, a + i * down, lda, b.data, b.ld, c + i * ldc + j, ldc, add);
    for (; i + 4 <= rows; i += 4) Micro<4, kTransposed>(depth, a + i * down, lda, b.data, b.ld, c + i * ldc + j, ldc, add);
    for (; i < rows; i++) Micro<1, kTransposed>(depth, a + i * down, lda, b.data, b.ld, c + i * ldc + j, ldc, add);
  }
}

// ---- one call ------------------------------------------------------------------------------------------------------------

using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using U32 = ffi::Buffer<ffi::U32>;
using U8 = ffi::Buffer<ffi::U8>;
using OutF32 = ffi::ResultBuffer<ffi::F32>;

enum Flags : int64_t { kBits = 1, kAlibi = 2, kBlockBias = 4 };

// Which tile of the score matrix a strip of rows belongs to.
struct Place {
  int64_t batch, head, i, slot, j, row0, rows, columns;  // columns: keys of the tile that exist for this batch element
  bool partial;
};

struct Call {
  int64_t batch, q_len, heads, dim, kv_len, kv_heads, v_dim, bq, bk, nq, nk, width, group;
  int64_t bm, hm, bits_b, bits_h, bits_p, bits_bytes, pos_b, kv_pos_b;
  int64_t dim_p, v_dim_p, bk_p;  // rounded up to panels
  float scale, soft_cap, keep_scale;
  uint32_t threshold;
  int64_t flags;
  const float *q, *k, *v, *alibi, *block_bias;
  const int32_t *idx, *n_part, *n_tot, *q_pos, *kv_pos, *limits;
  const uint32_t* seed;
  const uint8_t* bits;

  const float* Q(int64_t b, int64_t row, int64_t h) const { return q + ((b * q_len + row) * heads + h) * dim; }
  const float* K(int64_t b, int64_t row, int64_t h) const { return k + ((b * kv_len + row) * kv_heads + h) * dim; }
  const float* V(int64_t b, int64_t row, int64_t h) const { return v + ((b * kv_len + row) * kv_heads + h) * v_dim; }
  int64_t ListRow(int64_t b, int64_t h, int64_t i) const {
    return ((bm == 1 ? 0 : b) * hm + h * hm / heads) * nq + i;
  }
  // Anything that changes scores beyond the scale.
  bool Plain() const { return soft_cap == 0 && !(flags & (kAlibi | kBlockBias)); }

  // Soft cap, biases and masks on the scores of a strip, rows of bk_p floats. `slope`, where not null, receives the
  // derivative of the soft cap. What no query may see becomes -inf.
  void Finish(const Place& at, float* s, float* slope) const {
    if (!Plain()) {
      const float tile_bias = (flags & kBlockBias) ? block_bias[ListRow(at.batch, at.head, at.i) * width + at.slot] : 0.f;
      const int32_t* keys = kv_pos + (kv_pos_b == 1 ? 0 : at.batch) * kv_len + at.j * bk;
      for (int64_t r = 0; r < at.rows; r++) {
        float* row = s + r * bk_p;
        if (soft_cap != 0) {
          const float inverse = 1.f / soft_cap;
          for (int64_t c = 0; c < bk_p; c += kLanes) {
            Vec t = Tanh(Load(row + c) * inverse);
            Store(row + c, t * soft_cap);
            if (slope) Store(slope + r * bk_p + c, 1.f - t * t);
          }
        }
        if (flags & kAlibi) {
          const float steep = alibi[at.head];
          const int32_t here = q_pos[(pos_b == 1 ? 0 : at.batch) * q_len + at.i * bq + at.row0 + r];
          int64_t c = 0;
          for (; c + kLanes <= at.columns; c += kLanes) {
            Ints d = *reinterpret_cast<const Ints*>(keys + c) - here;
            d = d < 0 ? -d : d;
            Store(row + c, Load(row + c) - __builtin_convertvector(d, Vec) * steep);
          }
          for (; c < at.columns; c++) row[c] -= std::abs(static_cast<float>(keys[c] - here)) * steep;
        }
        if (flags & kBlockBias) {
          for (int64_t c = 0; c < bk_p; c += kLanes) Store(row + c, Load(row + c) + tile_bias);
        }
      }
    }
    if (at.partial) {
      const int64_t tile = ((((bits_b == 1 ? 0 : at.batch) * bits_h + at.head * bits_h / heads) * nq + at.i) * bits_p + at.slot);
      const Words one = AllWords(1) << Lane();
      for (int64_t r = 0; r < at.rows; r++) {
        const uint8_t* row_bits = bits + (tile * bq + at.row0 + r) * bits_bytes;
        float* row = s + r * bk_p;
        for (int64_t c = 0; c < at.columns; c += kLanes) {
          uint32_t word = 0;
          for (int64_t x = 0; x < std::max(kLanes / 8, 1) && c / 8 + x < bits_bytes; x++) {
            word |= static_cast<uint32_t>(row_bits[c / 8 + x]) << (8 * x);
          }
          if (kLanes < 8) word >>= c % 8;
          Words kept = AllWords(word) & one;
          Store(row + c, kept != 0 ? Load(row + c) : All(kNothing));
        }
      }
    }
    if (at.columns < bk_p) {
      for (int64_t r = 0; r < at.rows; r++) {
        for (int64_t c = at.columns; c < bk_p; c++) s[r * bk_p + c] = kNothing;
      }
    }
  }

  // Dropout: scales the kept values of a row and zeroes the others.
  void Drop(const Place& at, int64_t r, float* row) const {
    const uint32_t head = Mix(seed[0] + static_cast<uint32_t>(at.batch * heads + at.head) * 0x9E3779B9u);
    const uint32_t line = Mix(head ^ (seed[1] + static_cast<uint32_t>(at.i * bq + at.row0 + r) * 0x85EBCA6Bu));
    for (int64_t c = 0; c < bk_p; c += kLanes) {
      Words hash = Mix(line + (Lane() + static_cast<uint32_t>(at.j * bk + c)) * 0xC2B2AE35u) >> 8;
      Store(row + c, hash >= threshold ? Load(row + c) * keep_scale : Vec{});
    }
  }
};

// Copies rows of a [*, stride] matrix into panels [columns / kPanel][depth][kPanel]; missing rows and columns become 0.
void PackRows(const float* from, int64_t stride, int64_t rows, int64_t depth, int64_t columns, float* to) {
  for (int64_t j = 0; j < columns; j += kPanel, to += depth * kPanel) {
    const int64_t n = std::min(kPanel, columns - j);
    for (int64_t p = 0; p < depth; p++) {
      float* line = to + p * kPanel;
      if (p >= rows) {
        std::memset(line, 0, kPanel * 4);
      } else {
        std::memcpy(line, from + p * stride + j, n * 4);
        if (n < kPanel) std::memset(line + n, 0, (kPanel - n) * 4);
      }
    }
  }
}

// The same for the transpose: rows of `from` become columns.
void PackColumns(const float* from, int64_t stride, int64_t rows, int64_t depth, int64_t columns_p, float* to) {
  for (int64_t j = 0; j < columns_p; j += kPanel, to += depth * kPanel) {
    for (int64_t c = 0; c < kPanel; c++) {
      if (j + c < rows) {
        const float* line = from + (j + c) * stride;
        for (int64_t p = 0; p < depth; p++) to[p * kPanel + c] = line[p];
      } else {
        for (int64_t p = 0; p < depth; p++) to[p * kPanel + c] = 0;
      }
    }
  }
}

Call MakeCall(int64_t bq, int64_t bk, float scale, float soft_cap, float keep_scale, int64_t threshold, int64_t flags,
              const F32& q, const F32& k, const F32& v, const S32& idx, const S32& n_part, const S32& n_tot, const U8& bits,
              const F32& alibi, const S32& q_pos, const S32& kv_pos, const F32& block_bias, const U32& seed,
              const S32& limits) {
  Call c;
  auto qd = q.dimensions(), kd = k.dimensions(), id = idx.dimensions(), bd = bits.dimensions();
  c.batch = qd[0], c.q_len = qd[1], c.heads = qd[2], c.dim = qd[3];
  c.kv_len = kd[1], c.kv_heads = kd[2], c.v_dim = v.dimensions()[3];
  c.bq = bq, c.bk = bk, c.bm = id[0], c.hm = id[1], c.nq = id[2], c.width = id[3];
  c.nk = (c.kv_len + bk - 1) / bk, c.group = c.heads / c.kv_heads;
  c.bits_b = bd[0], c.bits_h = bd[1], c.bits_p = bd[3], c.bits_bytes = bd[5];
  c.pos_b = q_pos.dimensions()[0], c.kv_pos_b = kv_pos.dimensions()[0];
  c.dim_p = RoundUp(c.dim, kPanel), c.v_dim_p = RoundUp(c.v_dim, kPanel), c.bk_p = RoundUp(bk, kPanel);
  c.scale = scale, c.soft_cap = soft_cap, c.keep_scale = keep_scale, c.threshold = static_cast<uint32_t>(threshold);
  c.flags = flags;
  c.q = q.typed_data(), c.k = k.typed_data(), c.v = v.typed_data(), c.alibi = alibi.typed_data();
  c.block_bias = block_bias.typed_data(), c.idx = idx.typed_data(), c.n_part = n_part.typed_data();
  c.n_tot = n_tot.typed_data(), c.q_pos = q_pos.typed_data(), c.kv_pos = kv_pos.typed_data();
  c.limits = limits.typed_data(), c.seed = seed.typed_data(), c.bits = bits.typed_data();
  return c;
}

// ---- forward -------------------------------------------------------------------------------------------------------------

// Scores of a strip become weights exp(s - max); earlier sums are rescaled.
void Soften(const Call& c, const Place& at, float* s, float* top, float* total, float* out, bool first) {
  for (int64_t r = 0; r < at.rows; r++) {
    float* row = s + r * c.bk_p;
    Vec m0 = Load(row), m1 = Load(row + kLanes);
    for (int64_t x = kPanel; x < c.bk_p; x += kPanel) {
      Vec a = Load(row + x), b = Load(row + x + kLanes);
      m0 = a > m0 ? a : m0;
      m1 = b > m1 ? b : m1;
    }
    const float before = top[r], now = std::max(before, Max(m0 > m1 ? m0 : m1));
    if (now == kNothing) {
      std::memset(row, 0, c.bk_p * 4);
      continue;
    }
    Vec sum0 = Vec{}, sum1 = Vec{};
    for (int64_t x = 0; x < c.bk_p; x += kPanel) {
      Vec a = Exp(Load(row + x) - now), b = Exp(Load(row + x + kLanes) - now);
      sum0 += a;
      sum1 += b;
      Store(row + x, a);
      Store(row + x + kLanes, b);
    }
    if (now != before) {
      const float shrink = std::exp(before - now);
      total[r] *= shrink;
      top[r] = now;
      if (!first) {
        for (int64_t x = 0; x < c.v_dim_p; x += kLanes) Store(out + r * c.v_dim_p + x, Load(out + r * c.v_dim_p + x) * shrink);
      }
    }
    total[r] += Sum(sum0 + sum1);
    if (c.threshold) c.Drop(at, r, row);
  }
}

// k^T and v of every key block as panels.
void PackForward(ffi::ThreadPool& pool, const Call& c, float* kt, float* vp) {
  ParallelFor(pool, c.batch * c.kv_heads * c.nk, [&](int64_t t) {
    const int64_t j = t % c.nk, h = t / c.nk % c.kv_heads, b = t / c.nk / c.kv_heads;
    const int64_t rows = std::min(c.bk, c.kv_len - j * c.bk);
    PackColumns(c.K(b, j * c.bk, h), c.kv_heads * c.dim, rows, c.dim, c.bk_p, kt + t * c.bk_p * c.dim);
    PackRows(c.V(b, j * c.bk, h), c.kv_heads * c.v_dim, rows, c.bk, c.v_dim, vp + t * c.bk * c.v_dim_p);
  });
}

ffi::Error Forward(ffi::ThreadPool pool, int64_t bq, int64_t bk, float scale, float soft_cap, float keep_scale,
                   int64_t threshold, int64_t flags, F32 q, F32 k, F32 v, S32 idx, S32 n_part, S32 n_tot, U8 bits, F32 alibi,
                   S32 q_pos, S32 kv_pos, F32 block_bias, U32 seed, S32 limits, OutF32 o, OutF32 lse, OutF32 kt, OutF32 vp) {
  const Call c = MakeCall(bq, bk, scale, soft_cap, keep_scale, threshold, flags, q, k, v, idx, n_part, n_tot, bits, alibi,
                          q_pos, kv_pos, block_bias, seed, limits);
  PackForward(pool, c, kt->typed_data(), vp->typed_data());
  ParallelFor(pool, c.batch * c.heads * c.nq, [&](int64_t t) {
    const int64_t i = t % c.nq, h = t / c.nq % c.heads, b = t / c.nq / c.heads;
    const int64_t rows = std::min(c.bq, c.q_len - i * c.bq), kv_h = h / c.group;
    float* scratch = Scratch(c.bq * (c.dim + c.v_dim_p + 2) + kStrip * c.bk_p + 64);
    float *out = scratch, *s = out + c.bq * c.v_dim_p, *qs = s + kStrip * c.bk_p, *top = qs + c.bq * c.dim;
    float* total = top + c.bq;
    for (int64_t r = 0; r < rows; r++) {
      const float* from = c.Q(b, i * c.bq + r, h);
      for (int64_t d = 0; d < c.dim; d++) qs[r * c.dim + d] = from[d] * c.scale;
      top[r] = kNothing;
      total[r] = 0;
    }
    const int64_t list = c.ListRow(b, h, i);
    bool first = true;
    for (int64_t slot = 0; slot < c.n_tot[list]; slot++) {
      const int64_t j = c.idx[list * c.width + slot], block = (b * c.kv_heads + kv_h) * c.nk + j;
      Place at{b, h, i, slot, j, 0, 0, std::min(c.bk, c.limits[b] - j * c.bk), (c.flags & kBits) && slot < c.n_part[list]};
      if (at.columns <= 0) continue;
      for (at.row0 = 0; at.row0 < rows; at.row0 += kStrip) {
        at.rows = std::min(kStrip, rows - at.row0);
        Multiply<false>(at.rows, c.bk_p, c.dim, qs + at.row0 * c.dim, c.dim,
                        Packed(kt->typed_data() + block * c.bk_p * c.dim, c.dim), s, c.bk_p, false);
        c.Finish(at, s, nullptr);
        float* rows_out = out + at.row0 * c.v_dim_p;
        Soften(c, at, s, top + at.row0, total + at.row0, rows_out, first);
        Multiply<false>(at.rows, c.v_dim_p, at.columns, s, c.bk_p,
                        Packed(vp->typed_data() + block * c.bk * c.v_dim_p, c.bk), rows_out, c.v_dim_p, !first);
      }
      first = false;
    }
    for (int64_t r = 0; r < rows; r++) {
      float* to = o->typed_data() + ((b * c.q_len + i * c.bq + r) * c.heads + h) * c.v_dim;
      const bool some = !first && total[r] > 0;
      const float share = some ? 1.f / total[r] : 0.f;
      for (int64_t d = 0; d < c.v_dim; d++) to[d] = some ? out[r * c.v_dim_p + d] * share : 0.f;
      lse->typed_data()[(b * c.heads + h) * c.q_len + i * c.bq + r] = some ? top[r] + std::log(total[r]) : kNothing;
    }
  });
  return ffi::Error::Success();
}

// ---- backward ------------------------------------------------------------------------------------------------------------

// One pass over the tiles gives all gradients. A task owns the rows of some query blocks for all query heads of a key head and
// sums dk and dv into memory of its own; the tasks of a key head are added up in their order afterwards.
ffi::Error Backward(ffi::ThreadPool pool, int64_t bq, int64_t bk, float scale, float soft_cap, float keep_scale,
                    int64_t threshold, int64_t flags, int64_t parts, F32 q, F32 k, F32 v, S32 idx, S32 n_part, S32 n_tot,
                    U8 bits, F32 alibi, S32 q_pos, S32 kv_pos, F32 block_bias, U32 seed, S32 limits, F32 o, F32 lse, F32 go,
                    F32 dlse, OutF32 dq, OutF32 dk, OutF32 dv, OutF32 dblock, OutF32 dalibi, OutF32 kt, OutF32 kp, OutF32 vt) {
  const Call c = MakeCall(bq, bk, scale, soft_cap, keep_scale, threshold, flags, q, k, v, idx, n_part, n_tot, bits, alibi,
                          q_pos, kv_pos, block_bias, seed, limits);
  const int64_t kv_total = c.batch * c.kv_heads;
  ParallelFor(pool, kv_total * c.nk, [&](int64_t t) {
    const int64_t j = t % c.nk, h = t / c.nk % c.kv_heads, b = t / c.nk / c.kv_heads;
    const int64_t rows = std::min(c.bk, c.kv_len - j * c.bk);
    PackColumns(c.K(b, j * c.bk, h), c.kv_heads * c.dim, rows, c.dim, c.bk_p, kt->typed_data() + t * c.bk_p * c.dim);
    PackRows(c.K(b, j * c.bk, h), c.kv_heads * c.dim, rows, c.bk, c.dim, kp->typed_data() + t * c.bk * c.dim_p);
    PackColumns(c.V(b, j * c.bk, h), c.kv_heads * c.v_dim, rows, c.v_dim, c.bk_p, vt->typed_data() + t * c.bk_p * c.v_dim);
  });

  // Query blocks are cut so that the parts of a key head have about equally many tiles.
  std::unique_ptr<int64_t[]> cuts(new int64_t[kv_total * (parts + 1)]);
  for (int64_t n = 0; n < kv_total; n++) {
    const int64_t b = n / c.kv_heads, h0 = n % c.kv_heads * c.group;
    auto weight = [&](int64_t i) {
      int64_t tiles = 1;
      for (int64_t g = 0; g < c.group; g++) tiles += c.n_tot[c.ListRow(b, h0 + g, i)];
      return tiles;
    };
    int64_t all = 0, seen = 0, part = 0;
    for (int64_t i = 0; i < c.nq; i++) all += weight(i);
    for (int64_t i = 0; i < c.nq; i++) {
      while (part <= parts && seen * parts >= all * part) cuts[n * (parts + 1) + part++] = i;
      seen += weight(i);
    }
    while (part <= parts) cuts[n * (parts + 1) + part++] = c.nq;
  }

  const int64_t k_tile = c.bk * c.dim_p, v_tile = c.bk * c.v_dim_p;
  std::unique_ptr<std::unique_ptr<Buffer>[]> sums(new std::unique_ptr<Buffer>[kv_total * parts]);
  std::unique_ptr<uint8_t[]> touched(new uint8_t[kv_total * parts * c.nk]());
  ParallelFor(pool, kv_total * parts, [&](int64_t t) {
    const int64_t n = t / parts, part = t % parts, b = n / c.kv_heads, kv_h = n % c.kv_heads;
    const int64_t begin = cuts[n * (parts + 1) + part], end = cuts[n * (parts + 1) + part + 1];
    if (begin == end) return;
    sums[t].reset(new Buffer(c.nk * (k_tile + v_tile)));
    float* dk_sum = sums[t]->get();
    float* dv_sum = dk_sum + c.nk * k_tile;
    uint8_t* mark = touched.get() + t * c.nk;
    const int64_t deepest = std::min(kDeep, c.bq);
    float* scratch = Scratch(c.bq * (2 * c.dim_p + c.v_dim_p + 2) + (2 * deepest + kStrip) * c.bk_p + 64);
    float *gq = scratch, *qs = gq + c.bq * c.dim_p, *gs = qs + c.bq * c.dim_p, *s = gs + c.bq * c.v_dim_p;
    float *ds = s + deepest * c.bk_p, *cap = ds + deepest * c.bk_p, *delta = cap + kStrip * c.bk_p, *base = delta + c.bq;
    for (int64_t i = begin; i < end; i++) {
      for (int64_t h = kv_h * c.group; h < (kv_h + 1) * c.group; h++) {
        const int64_t rows = std::min(c.bq, c.q_len - i * c.bq), list = c.ListRow(b, h, i);
        for (int64_t r = 0; r < rows; r++) {
          const int64_t row = i * c.bq + r, at_o = ((b * c.q_len + row) * c.heads + h) * c.v_dim;
          const int64_t at_l = (b * c.heads + h) * c.q_len + row;
          const float *from = c.Q(b, row, h), *out = o.typed_data() + at_o, *grad = go.typed_data() + at_o;
          for (int64_t d = 0; d < c.dim_p; d++) qs[r * c.dim_p + d] = d < c.dim ? from[d] * c.scale : 0.f;
          for (int64_t d = 0; d < c.v_dim_p; d++) gs[r * c.v_dim_p + d] = d < c.v_dim ? grad[d] : 0.f;
          delta[r] = Dot(out, grad, c.v_dim) - dlse.typed_data()[at_l];
          // A query that sees nothing: exp(s - inf) = 0 keeps all its gradients 0.
          base[r] = lse.typed_data()[at_l] == kNothing ? -kNothing : lse.typed_data()[at_l];
        }
        bool first = true;
        float alibi_sum = 0;
        for (int64_t slot = 0; slot < c.n_tot[list]; slot++) {
          const int64_t j = c.idx[list * c.width + slot], block = n * c.nk + j;
          Place at{b, h, i, slot, j, 0, 0, std::min(c.bk, c.limits[b] - j * c.bk), (c.flags & kBits) && slot < c.n_part[list]};
          float tile_sum = 0;
          for (int64_t deep0 = 0; deep0 < rows && at.columns > 0; deep0 += kDeep) {
            const int64_t deep = std::min(kDeep, rows - deep0);
            for (at.row0 = deep0; at.row0 < deep0 + deep; at.row0 += kStrip) {
              at.rows = std::min(kStrip, deep0 + deep - at.row0);
              const int64_t skip = (at.row0 - deep0) * c.bk_p;
              float *weights = s + skip, *slopes = ds + skip;
              Multiply<false>(at.rows, c.bk_p, c.dim, qs + at.row0 * c.dim_p, c.dim_p,
                              Packed(kt->typed_data() + block * c.bk_p * c.dim, c.dim), weights, c.bk_p, false);
              Multiply<false>(at.rows, c.bk_p, c.v_dim, gs + at.row0 * c.v_dim_p, c.v_dim_p,
                              Packed(vt->typed_data() + block * c.bk_p * c.v_dim, c.v_dim), slopes, c.bk_p, false);
              c.Finish(at, weights, cap);
              const int32_t* keys = c.kv_pos + (c.kv_pos_b == 1 ? 0 : b) * c.kv_len + j * c.bk;
              for (int64_t r = 0; r < at.rows; r++) {
                float *p = weights + r * c.bk_p, *d = slopes + r * c.bk_p;
                const float lower = base[at.row0 + r], off = delta[at.row0 + r];
                if (c.threshold) c.Drop(at, r, d);
                Vec sum = Vec{};
                for (int64_t x = 0; x < c.bk_p; x += kLanes) {
                  const Vec weight = Exp(Load(p + x) - lower), g = weight * (Load(d + x) - off);
                  sum += g;
                  Store(p + x, weight);
                  Store(d + x, g);
                }
                if (c.threshold) c.Drop(at, r, p);
                if (c.flags & kBlockBias) tile_sum += Sum(sum);
                if (c.flags & kAlibi) {
                  const int32_t here = c.q_pos[(c.pos_b == 1 ? 0 : b) * c.q_len + i * c.bq + at.row0 + r];
                  float part_sum = 0;
                  for (int64_t x = 0; x < at.columns; x++) part_sum -= d[x] * std::abs(static_cast<float>(keys[x] - here));
                  alibi_sum += part_sum;
                }
                if (c.soft_cap != 0) {
                  for (int64_t x = 0; x < c.bk_p; x += kLanes) Store(d + x, Load(d + x) * Load(cap + r * c.bk_p + x));
                }
              }
              Multiply<false>(at.rows, c.dim_p, c.bk, slopes, c.bk_p, Packed(kp->typed_data() + block * k_tile, c.bk),
                              gq + at.row0 * c.dim_p, c.dim_p, !first);
            }
            const bool add = mark[j];
            Multiply<true>(c.bk, c.dim_p, deep, ds, c.bk_p, RowMajor(qs + deep0 * c.dim_p, c.dim_p), dk_sum + j * k_tile,
                           c.dim_p, add);
            Multiply<true>(c.bk, c.v_dim_p, deep, s, c.bk_p, RowMajor(gs + deep0 * c.v_dim_p, c.v_dim_p), dv_sum + j * v_tile,
                           c.v_dim_p, add);
            mark[j] = 1;
          }
          first = first && at.columns <= 0;
          if (c.flags & kBlockBias) dblock->typed_data()[((b * c.heads + h) * c.nq + i) * c.width + slot] = tile_sum;
        }
        if (c.flags & kAlibi) dalibi->typed_data()[(b * c.heads + h) * c.nq + i] = alibi_sum;
        for (int64_t r = 0; r < rows; r++) {
          float* to = dq->typed_data() + ((b * c.q_len + i * c.bq + r) * c.heads + h) * c.dim;
          for (int64_t d = 0; d < c.dim; d++) to[d] = first ? 0.f : gq[r * c.dim_p + d] * c.scale;
        }
      }
    }
  });

  ParallelFor(pool, kv_total * c.nk, [&](int64_t t) {
    const int64_t n = t / c.nk, j = t % c.nk, b = n / c.kv_heads, h = n % c.kv_heads;
    for (int64_t r = 0; r < std::min(c.bk, c.kv_len - j * c.bk); r++) {
      float* to_k = dk->typed_data() + ((b * c.kv_len + j * c.bk + r) * c.kv_heads + h) * c.dim;
      float* to_v = dv->typed_data() + ((b * c.kv_len + j * c.bk + r) * c.kv_heads + h) * c.v_dim;
      std::memset(to_k, 0, c.dim * 4);
      std::memset(to_v, 0, c.v_dim * 4);
      for (int64_t part = n * parts; part < (n + 1) * parts; part++) {
        if (!touched[part * c.nk + j]) continue;
        const float* from_k = sums[part]->get() + j * k_tile + r * c.dim_p;
        const float* from_v = sums[part]->get() + c.nk * k_tile + j * v_tile + r * c.v_dim_p;
        for (int64_t d = 0; d < c.dim; d++) to_k[d] += from_k[d];
        for (int64_t d = 0; d < c.v_dim; d++) to_v[d] += from_v[d];
      }
    }
  });
  return ffi::Error::Success();
}

// ---- decode --------------------------------------------------------------------------------------------------------------

// Few queries against a long cache, contiguous or paged: listed keys are read where they lie, once for all query heads of a
// list, and nothing else of the cache is touched. The list of an owner (a key head, or a query head where each has its own
// list) is cut into `parts`, whose results are merged in their order.
ffi::Error Decode(ffi::ThreadPool pool, int64_t bq, int64_t bk, float scale, float soft_cap, float keep_scale,
                  int64_t threshold, int64_t flags, int64_t parts, int64_t kv_len, F32 q, F32 k, F32 v, S32 idx, S32 n_part,
                  S32 n_tot, U8 bits, F32 alibi, S32 q_pos, S32 kv_pos, F32 block_bias, U32 seed, S32 limits, S32 pages,
                  OutF32 o, OutF32 lse, OutF32 partial) {
  Call c = MakeCall(bq, bk, scale, soft_cap, keep_scale, threshold, flags, q, k, v, idx, n_part, n_tot, bits, alibi, q_pos,
                    kv_pos, block_bias, seed, limits);
  const int64_t stored = c.kv_len, blocks = (kv_len + bk - 1) / bk;
  const bool paged = pages.element_count() > 0;
  c.kv_len = kv_len;
  const int64_t split = c.hm == c.heads ? c.group : 1, owned = c.group / split, owners = c.batch * c.kv_heads * split;
  const int64_t rows = owned * c.q_len, record = rows * (c.v_dim_p + 2);
  ParallelFor(pool, owners * parts, [&](int64_t t) {
    const int64_t owner = t / parts, part = t % parts, b = owner / (c.kv_heads * split);
    const int64_t h0 = owner % (c.kv_heads * split) * owned, kv_h = h0 / c.group, list = c.ListRow(b, h0, 0);
    float *out = partial->typed_data() + t * record, *top = out + rows * c.v_dim_p, *total = top + rows;
    float* s = Scratch(rows * (c.bk_p + c.dim) + c.bk_p * c.dim + c.bk * c.v_dim_p + 64);
    float *qs = s + rows * c.bk_p, *kt = qs + rows * c.dim, *vp = kt + c.bk_p * c.dim;
    std::memset(out, 0, rows * c.v_dim_p * 4);
    for (int64_t r = 0; r < rows; r++) {
      const float* from = c.Q(b, r % c.q_len, h0 + r / c.q_len);
      for (int64_t d = 0; d < c.dim; d++) qs[r * c.dim + d] = from[d] * c.scale;
      top[r] = kNothing;
      total[r] = 0;
    }
    const int64_t count = c.n_tot[list], begin = count * part / parts, end = count * (part + 1) / parts;
    for (int64_t slot = begin; slot < end; slot++) {
      const int64_t j = c.idx[list * c.width + slot], columns = std::min(c.bk, c.limits[b] - j * c.bk);
      if (columns <= 0) continue;
      const int64_t row0 = paged ? pages.typed_data()[b * blocks + j] * c.bk : b * stored + j * c.bk;
      const float* keys = c.k + (row0 * c.kv_heads + kv_h) * c.dim;
      const float* values = c.v + (row0 * c.kv_heads + kv_h) * c.v_dim;
      if (rows >= 4) {
        PackColumns(keys, c.kv_heads * c.dim, columns, c.dim, c.bk_p, kt);
        Multiply<false>(rows, c.bk_p, c.dim, qs, c.dim, Packed(kt, c.dim), s, c.bk_p, false);
      } else {
        for (int64_t x = 0; x < columns; x++) {
          for (int64_t r = 0; r < rows; r++) s[r * c.bk_p + x] = Dot(qs + r * c.dim, keys + x * c.kv_heads * c.dim, c.dim);
        }
      }
      for (int64_t g = 0; g < owned; g++) {
        const int64_t r = g * c.q_len;
        const Place at{b, h0 + g, 0, slot, j, 0, c.q_len, columns, (c.flags & kBits) && slot < c.n_part[list]};
        c.Finish(at, s + r * c.bk_p, nullptr);
        Soften(c, at, s + r * c.bk_p, top + r, total + r, out + r * c.v_dim_p, false);
      }
      Panels right = RowMajor(values, c.kv_heads * c.v_dim);
      if (c.v_dim % kPanel) {
        PackRows(values, c.kv_heads * c.v_dim, columns, c.bk, c.v_dim, vp);
        right = Packed(vp, c.bk);
      }
      Multiply<false>(rows, c.v_dim_p, columns, s, c.bk_p, right, out, c.v_dim_p, true);
    }
  });
  ParallelFor(pool, owners, [&](int64_t owner) {
    const int64_t b = owner / (c.kv_heads * split), h0 = owner % (c.kv_heads * split) * owned;
    const float* first = partial->typed_data() + owner * parts * record;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = r % c.q_len, h = h0 + r / c.q_len;
      float top = kNothing, total = 0;
      for (int64_t part = 0; part < parts; part++) top = std::max(top, first[part * record + rows * c.v_dim_p + r]);
      float* to = o->typed_data() + ((b * c.q_len + row) * c.heads + h) * c.v_dim;
      std::memset(to, 0, c.v_dim * 4);
      if (top != kNothing) {
        for (int64_t part = 0; part < parts; part++) {
          const float* from = first + part * record;
          const float share = std::exp(from[rows * c.v_dim_p + r] - top);
          total += share * from[rows * (c.v_dim_p + 1) + r];
          for (int64_t d = 0; d < c.v_dim; d++) to[d] += share * from[r * c.v_dim_p + d];
        }
        for (int64_t d = 0; d < c.v_dim; d++) to[d] /= total;
      }
      lse->typed_data()[(b * c.heads + h) * c.q_len + row] = top == kNothing ? kNothing : top + std::log(total);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

#define COMMON_ATTRIBUTES            \
  ffi::Ffi::Bind()                   \
      .Ctx<ffi::ThreadPool>()        \
      .Attr<int64_t>("bq")           \
      .Attr<int64_t>("bk")           \
      .Attr<float>("scale")          \
      .Attr<float>("soft_cap")       \
      .Attr<float>("keep_scale")     \
      .Attr<int64_t>("threshold")    \
      .Attr<int64_t>("flags")
#define COMMON_ARGUMENTS                                                                              \
  Arg<F32>().Arg<F32>().Arg<F32>().Arg<S32>().Arg<S32>().Arg<S32>().Arg<U8>().Arg<F32>().Arg<S32>()   \
      .Arg<S32>().Arg<F32>().Arg<U32>().Arg<S32>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(bsa_forward, Forward,
                              COMMON_ATTRIBUTES.COMMON_ARGUMENTS.Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(bsa_backward, Backward,
                              COMMON_ATTRIBUTES.Attr<int64_t>("parts")
                                  .COMMON_ARGUMENTS.Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>()
                                  .Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(bsa_decode, Decode,
                              COMMON_ATTRIBUTES.Attr<int64_t>("parts").Attr<int64_t>("kv_len")
                                  .COMMON_ARGUMENTS.Arg<S32>().Ret<F32>().Ret<F32>().Ret<F32>());
