// Block-sparse attention for CPUs: forward, backward and decode handlers for XLA's FFI, float32.
//
// Matrix products run on panels that are kPanel columns wide, with GCC vector extensions, in pieces of at most kTile queries and
// kTile keys, whose scores stay in the second-level cache. Work is dealt out to XLA's own thread pool. What a task computes and in which
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
#include <thread>

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
constexpr int64_t kTile = 128;          // most queries, and most keys, of a piece of a tile
constexpr int64_t kStrip = 32;          // keys whose scores stay in the first-level cache
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
// Sum and largest of all lanes, by halves; half of the lanes of a and b in turn.
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
inline Vec Interleave(Vec a, Vec b, int from) {
  Vec r;
  for (int i = 0; i < kLanes; i++) r[i] = i % 2 ? b[from + i / 2] : a[from + i / 2];
  return r;
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
inline Vec Interleave(Vec a, Vec b, int from) {
  return __builtin_shuffle(a, b, (Ints)((Lane() & 1) * kLanes + (Lane() >> 1) + from));
}
#endif
// The transpose of kLanes vectors: interleaving the two halves of the rows does one bit of the index at a time.
inline void Transpose(Vec* x) {
#pragma GCC unroll 4
  for (int bit = 1; bit < kLanes; bit *= 2) {
    Vec y[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; i++) {
      y[2 * i] = Interleave(x[i], x[i + kLanes / 2], 0);
      y[2 * i + 1] = Interleave(x[i], x[i + kLanes / 2], kLanes / 2);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) x[i] = y[i];
  }
}
inline float Dot(const float* a, const float* b, int64_t n) {
  Vec sum = Vec{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += Load(a + i) * Load(b + i);
  float s = Sum(sum);
  for (; i < n; i++) s += a[i] * b[i];
  return s;
}
inline int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// 2^x for x <= 127, within 2 units in the last place; exactly 0 below -126.
inline Vec Exp2(Vec x) {
  const Vec z = x + 12582912.f;  // rounds to a whole number, which the lowest bits then hold
  const Vec f = x - (z - 12582912.f);
  Vec p = All(1.326472578e-03f);
  p = p * f + 9.671512740e-03f;
  p = p * f + 5.550733748e-02f;
  p = p * f + 2.402224208e-01f;
  p = p * f + 6.931469776e-01f;
  p = p * f + 1.f;
  const Ints bits = (Ints)p + ((Ints)z << 23);
  return x < -126.f ? Vec{} : (Vec)bits;
}
inline Vec Exp(Vec x) { return Exp2(x * kLog2e); }

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

// Floats that a thread keeps between calls at most, for either use.
constexpr int64_t kKept = int64_t{1} << 24;

// Scratch of a thread, kept between calls; one for each kUse.
template <int kUse>
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

// R rows of one panel of C (+)= A B. A(r, p) is a[r * lda + p], or a[p * lda + r] if transposed. The loops over r are unrolled
// so that the sums stay in registers.
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
    for (; i + kRows <= rows; i += kRows) {
      Micro<kRows, kTransposed>(depth, a + i * down, lda, b.data, b.ld, c + i * ldc + j, ldc, add);
    }
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

  // What queries are multiplied by before `Scores`: options beyond the scale need scores in natural units.
  float Units() const { return Plain() ? scale * kLog2e : scale; }

  // Soft cap, biases and masks on scores with queries down and keys across, rows of bk_p floats. What no query may see becomes
  // -inf.
  void Finish(const Place& at, float* s) const {
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
      const int64_t owner = (bits_b == 1 ? 0 : at.batch) * bits_h + at.head * bits_h / heads;
      const int64_t tile = (owner * nq + at.i) * bits_p + at.slot;
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

// ---- tiles ---------------------------------------------------------------------------------------------------------------

// Forward and backward hold the scores of a tile with keys down and queries across the lanes: keys and values are then read
// where they lie, only queries are rearranged, once for a whole row of tiles, and the softmax needs no sums across lanes.

// Up to kTile queries of one head.
struct Queries {
  int64_t batch, head, i, row0, rows, rows_p, ld;  // row0: within the query block; ld: floats of a row of scores
  int64_t list;

  int64_t First(const Call& c) const { return i * c.bq + row0; }
};

Queries MakeQueries(const Call& c, int64_t batch, int64_t head, int64_t i, int64_t row0) {
  const int64_t rows = std::min({kTile, c.bq - row0, c.q_len - i * c.bq - row0}), rows_p = RoundUp(rows, kPanel);
  // The odd number of cache lines spreads a column of scores over the whole cache.
  return {batch, head, i, row0, rows, rows_p, rows_p + kLanes, c.ListRow(batch, head, i)};
}
constexpr int64_t kTileLd = kTile + kLanes;

// Keys [x0, x0 + keys) of the key block in a slot.
struct Keys {
  int64_t slot, j, x0, keys;
  bool partial;

  int64_t First(const Call& c) const { return j * c.bk + x0; }
};

// The panels of the transpose of `rows` rows, times `scale`; missing rows become 0.
void PackQueries(const float* from, int64_t stride, int64_t rows, int64_t rows_p, int64_t depth, float scale, float* to) {
  for (int64_t j = 0; j < rows_p; j += kPanel, to += depth * kPanel) {
    for (int64_t half = 0; half < kPanel; half += kLanes) {
      const int64_t count = std::clamp<int64_t>(rows - j - half, 0, kLanes);
      const float* line = from + (j + half) * stride;
      int64_t p = 0;
      for (; p + kLanes <= depth; p += kLanes) {
        Vec x[kLanes];
        for (int64_t c = 0; c < kLanes; c++) x[c] = c < count ? Load(line + c * stride + p) * scale : Vec{};
        Transpose(x);
        for (int64_t c = 0; c < kLanes; c++) Store(to + (p + c) * kPanel + half, x[c]);
      }
      for (; p < depth; p++) {
        for (int64_t c = 0; c < kLanes; c++) to[p * kPanel + half + c] = c < count ? line[c * stride + p] * scale : 0.f;
      }
    }
  }
}

// Rows of `depth_p` floats, times `scale`; what is past `depth` becomes 0.
void CopyRows(const float* from, int64_t stride, int64_t rows, int64_t depth, int64_t depth_p, float scale, float* to) {
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t d = 0; d < depth_p; d++) to[r * depth_p + d] = d < depth ? from[r * stride + d] * scale : 0.f;
  }
}

// Asks for rows that are needed soon: lists jump about, which the hardware cannot foresee.
inline void Fetch(const float* from, int64_t stride, int64_t rows, int64_t depth) {
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t d = 0; d < depth; d += 16) __builtin_prefetch(from + r * stride + d, 0, 2);
  }
}

// The keys of the slot after `slot`.
void FetchNext(const Call& c, const Queries& at, int64_t slot) {
  if (slot + 1 >= c.n_tot[at.list]) return;
  const int64_t next = c.idx[at.list * c.width + slot + 1] * c.bk;
  Fetch(c.K(at.batch, next, at.head / c.group), c.kv_heads * c.dim, std::min({kTile, c.bk, c.kv_len - next}), c.dim);
}

// Rows as the right operand of a product: where they lie if they are whole panels, else copied to `room`.
Panels AsPanels(const float* from, int64_t stride, int64_t rows, int64_t depth, int64_t depth_p, float* room) {
  if (depth == depth_p) return RowMajor(from, stride);
  CopyRows(from, stride, rows, depth, depth_p, 1.f, room);
  return RowMajor(room, depth_p);
}

// What the options need to know of each query.
struct Lanes {
  int32_t here[kTile];    // positions
  uint32_t lines[kTile];  // hashes for dropout

  Lanes(const Call& c, const Queries& at) {
    const uint32_t head = c.threshold ? Mix(c.seed[0] + static_cast<uint32_t>(at.batch * c.heads + at.head) * 0x9E3779B9u) : 0;
    const int32_t* q_pos = c.q_pos + (c.pos_b == 1 ? 0 : at.batch) * c.q_len + at.First(c);
    for (int64_t r = 0; r < at.rows_p; r++) {
      here[r] = (c.flags & kAlibi) && r < at.rows ? q_pos[r] : 0;
      lines[r] = c.threshold ? Mix(head ^ (c.seed[1] + static_cast<uint32_t>(at.First(c) + r) * 0x85EBCA6Bu)) : 0;
    }
  }
  Vec Distance(int64_t r, int32_t key) const {
    const Ints d = *reinterpret_cast<const Ints*>(here + r) - key;
    return __builtin_convertvector(d < 0 ? -d : d, Vec);
  }
  // Dropout of one vector of weights or of their gradients: scales what is kept.
  Vec Drop(const Call& c, int64_t r, int64_t key, Vec x) const {
    const Words line = *reinterpret_cast<const Words*>(lines + r);
    const Words hash = Mix(line + static_cast<uint32_t>(key) * 0xC2B2AE35u) >> 8;
    return hash >= c.threshold ? x * c.keep_scale : Vec{};
  }
};

// Scores, in units of log 2, of keys [first, first + count) of `k`: products with the packed queries, then soft cap, biases and
// masks. `cap`, where not null, receives the derivative of the soft cap. What no query may see becomes -inf.
void Scores(const Call& c, const Queries& at, const Lanes& lanes, const Keys& k, int64_t first, int64_t count, const float* qt,
            float* s, float* cap) {
  const int64_t key0 = k.First(c) + first;
  const float* keys = c.K(at.batch, key0, at.head / c.group);
  Multiply<false>(count, at.rows_p, c.dim, keys, c.kv_heads * c.dim, Packed(qt, c.dim), s, at.ld, false);
  if (!c.Plain()) {
    const float tile_bias = (c.flags & kBlockBias) ? c.block_bias[at.list * c.width + k.slot] : 0.f;
    const float steep = (c.flags & kAlibi) ? c.alibi[at.head] : 0.f, inverse = 1.f / c.soft_cap;
    const int32_t* positions = c.kv_pos + (c.kv_pos_b == 1 ? 0 : at.batch) * c.kv_len + key0;
    for (int64_t x = 0; x < count; x++) {
      for (int64_t r = 0; r < at.rows_p; r += kLanes) {
        Vec score = Load(s + x * at.ld + r);
        if (c.soft_cap != 0) {
          const Vec t = Tanh(score * inverse);
          score = t * c.soft_cap;
          if (cap) Store(cap + x * at.ld + r, 1.f - t * t);
        }
        if (c.flags & kAlibi) score -= lanes.Distance(r, positions[x]) * steep;
        Store(s + x * at.ld + r, (score + tile_bias) * kLog2e);
      }
    }
  }
  if (k.partial) {
    const int64_t owner = (c.bits_b == 1 ? 0 : at.batch) * c.bits_h + at.head * c.bits_h / c.heads;
    const int64_t tile = (owner * c.nq + at.i) * c.bits_p + k.slot;
    const uint8_t* tile_bits = c.bits + (tile * c.bq + at.row0) * c.bits_bytes;
    for (int64_t r = 0; r < at.rows_p; r += kLanes) {
      for (int64_t x = 0; x < count; x += 32) {  // first and x0 are multiples of 32
        const int64_t byte = (k.x0 + first + x) / 8, bytes = std::min<int64_t>(4, c.bits_bytes - byte);
        Words words = AllWords(0);
        for (int64_t lane = 0; lane < std::min<int64_t>(kLanes, at.rows - r); lane++) {
          uint32_t word = 0;
          const uint8_t* from = tile_bits + (r + lane) * c.bits_bytes + byte;
          for (int64_t n = 0; n < bytes; n++) word |= static_cast<uint32_t>(from[n]) << (8 * n);
          words[lane] = word;
        }
        for (int64_t n = 0; n < std::min<int64_t>(32, count - x); n++) {
          float* to = s + (x + n) * at.ld + r;
          Store(to, (words & (1u << n)) != 0 ? Load(to) : All(kNothing));
        }
      }
    }
  }
}

// ---- forward -------------------------------------------------------------------------------------------------------------

// Scores become weights 2^(s - top); `top` and `total` are brought up to date. Whether earlier sums have to be multiplied by
// `shrink`.
bool Weights(const Call& c, const Queries& at, const Lanes& lanes, const Keys& k, float* s, float* top, float* total,
             float* shrink) {
  bool grown = false;
  for (int64_t r = 0; r < at.rows_p; r += kPanel) {
    const Vec before0 = Load(top + r), before1 = Load(top + r + kLanes);
    Vec now0 = before0, now1 = before1;
    for (int64_t x = 0; x < k.keys; x++) {
      const Vec a = Load(s + x * at.ld + r), b = Load(s + x * at.ld + r + kLanes);
      now0 = a > now0 ? a : now0;
      now1 = b > now1 ? b : now1;
    }
    // A query that has seen nothing yet: 2^(-inf - 0) = 0.
    const Vec from0 = now0 > kNothing ? now0 : Vec{}, from1 = now1 > kNothing ? now1 : Vec{};
    Vec sum0 = Vec{}, sum1 = Vec{};
    for (int64_t x = 0; x < k.keys; x++) {
      float* row = s + x * at.ld + r;
      const Vec a = Exp2(Load(row) - from0), b = Exp2(Load(row + kLanes) - from1);
      sum0 += a;
      sum1 += b;
      Store(row, a);
      Store(row + kLanes, b);
    }
    const Vec shrink0 = Exp2(before0 - from0), shrink1 = Exp2(before1 - from1);
    Store(top + r, now0);
    Store(top + r + kLanes, now1);
    Store(total + r, Load(total + r) * shrink0 + sum0);
    Store(total + r + kLanes, Load(total + r + kLanes) * shrink1 + sum1);
    Store(shrink + r, shrink0);
    Store(shrink + r + kLanes, shrink1);
    for (int64_t x = 0; x < kPanel; x++) grown |= shrink[r + x] != 1.f;
  }
  if (c.threshold) {
    for (int64_t x = 0; x < k.keys; x++) {
      for (int64_t r = 0; r < at.rows_p; r += kLanes) {
        float* w = s + x * at.ld + r;
        Store(w, lanes.Drop(c, r, k.First(c) + x, Load(w)));
      }
    }
  }
  return grown;
}

ffi::Error Forward(ffi::ThreadPool pool, int64_t bq, int64_t bk, float scale, float soft_cap, float keep_scale,
                   int64_t threshold, int64_t flags, F32 q, F32 k, F32 v, S32 idx, S32 n_part, S32 n_tot, U8 bits, F32 alibi,
                   S32 q_pos, S32 kv_pos, F32 block_bias, U32 seed, S32 limits, OutF32 o, OutF32 lse) {
  const Call c = MakeCall(bq, bk, scale, soft_cap, keep_scale, threshold, flags, q, k, v, idx, n_part, n_tot, bits, alibi,
                          q_pos, kv_pos, block_bias, seed, limits);
  const int64_t cuts = (c.bq + kTile - 1) / kTile;
  ParallelFor(pool, c.batch * c.heads * c.nq * cuts, [&](int64_t t) {
    const int64_t i = t / cuts % c.nq, h = t / cuts / c.nq % c.heads, b = t / cuts / c.nq / c.heads;
    const Queries at = MakeQueries(c, b, h, i, t % cuts * kTile);
    if (at.rows <= 0) return;
    const Lanes lanes(c, at);
    float* qt = Scratch<0>(kTile * (c.dim + 2 * c.v_dim_p + kTileLd + 3) + 64);
    float *out = qt + kTile * c.dim, *room = out + kTile * c.v_dim_p, *s = room + kTile * c.v_dim_p;
    float *top = s + kTile * kTileLd, *total = top + kTile, *shrink = total + kTile;
    PackQueries(c.Q(b, at.First(c), h), c.heads * c.dim, at.rows, at.rows_p, c.dim, c.Units(), qt);
    for (int64_t r = 0; r < at.rows_p; r++) top[r] = kNothing, total[r] = 0;
    bool first = true;
    for (int64_t slot = 0; slot < c.n_tot[at.list]; slot++) {
      Keys k{slot, c.idx[at.list * c.width + slot], 0, 0, (c.flags & kBits) && slot < c.n_part[at.list]};
      const int64_t columns = std::min(c.bk, c.limits[b] - k.j * c.bk);
      for (; k.x0 < columns; k.x0 += kTile) {
        k.keys = std::min(kTile, columns - k.x0);
        Fetch(c.V(b, k.First(c), h / c.group), c.kv_heads * c.v_dim, k.keys, c.v_dim);
        Scores(c, at, lanes, k, 0, k.keys, qt, s, nullptr);
        FetchNext(c, at, slot);
        if (Weights(c, at, lanes, k, s, top, total, shrink) && !first) {
          for (int64_t r = 0; r < at.rows; r++) {
            float* row = out + r * c.v_dim_p;
            if (shrink[r] == 1.f) continue;
            for (int64_t d = 0; d < c.v_dim_p; d += kLanes) Store(row + d, Load(row + d) * shrink[r]);
          }
        }
        const Panels values =
            AsPanels(c.V(b, k.First(c), h / c.group), c.kv_heads * c.v_dim, k.keys, c.v_dim, c.v_dim_p, room);
        Multiply<true>(at.rows, c.v_dim_p, k.keys, s, at.ld, values, out, c.v_dim_p, !first);
        first = false;
      }
    }
    for (int64_t r = 0; r < at.rows; r++) {
      float* to = o->typed_data() + ((b * c.q_len + at.First(c) + r) * c.heads + h) * c.v_dim;
      const bool some = !first && total[r] > 0;
      const float share = some ? 1.f / total[r] : 0.f;
      for (int64_t d = 0; d < c.v_dim; d++) to[d] = some ? out[r * c.v_dim_p + d] * share : 0.f;
      lse->typed_data()[(b * c.heads + h) * c.q_len + at.First(c) + r] =
          some ? top[r] / kLog2e + std::log(total[r]) : kNothing;
    }
  });
  return ffi::Error::Success();
}

// ---- backward ------------------------------------------------------------------------------------------------------------

// to (+)= from, or 0 where there is nothing.
inline void Add(const float* from, int64_t n, bool add, float* to) {
  for (int64_t d = 0; d < n; d++) to[d] = (add ? to[d] : 0.f) + (from ? from[d] : 0.f);
}

// One pass over the tiles gives all gradients. A task owns the rows of some query blocks for all query heads of a key head and
// sums dk and dv into memory of its own, which the tasks of a key head then add to the result in their order.
ffi::Error Backward(ffi::ThreadPool pool, int64_t bq, int64_t bk, float scale, float soft_cap, float keep_scale,
                    int64_t threshold, int64_t flags, int64_t parts, F32 q, F32 k, F32 v, S32 idx, S32 n_part, S32 n_tot,
                    U8 bits, F32 alibi, S32 q_pos, S32 kv_pos, F32 block_bias, U32 seed, S32 limits, F32 o, F32 lse, F32 go,
                    F32 dlse, OutF32 dq, OutF32 dk, OutF32 dv, OutF32 dblock, OutF32 dalibi) {
  const Call c = MakeCall(bq, bk, scale, soft_cap, keep_scale, threshold, flags, q, k, v, idx, n_part, n_tot, bits, alibi,
                          q_pos, kv_pos, block_bias, seed, limits);
  const int64_t kv_total = c.batch * c.kv_heads;

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

  const int64_t k_tile = c.bk * c.dim_p, v_tile = c.bk * c.v_dim_p, sum_size = c.nk * (k_tile + v_tile);
  std::unique_ptr<std::atomic<int64_t>[]> turn(new std::atomic<int64_t>[kv_total]());  // parts of a key head that are done
  std::unique_ptr<uint8_t[]> written(new uint8_t[kv_total * c.nk]());
  ParallelFor(pool, kv_total * parts, [&](int64_t t) {
    const int64_t n = t / parts, part = t % parts, b = n / c.kv_heads, kv_h = n % c.kv_heads;
    const int64_t begin = cuts[n * (parts + 1) + part], end = cuts[n * (parts + 1) + part + 1];
    std::unique_ptr<Buffer> large(sum_size > kKept ? new Buffer(sum_size) : nullptr);
    float* dk_sum = large ? large->get() : Scratch<1>(sum_size);
    float* dv_sum = dk_sum + c.nk * k_tile;
    std::unique_ptr<uint8_t[]> mark(new uint8_t[c.nk]());
    float* qt = Scratch<0>(kTile * (c.dim + c.v_dim + 3 * c.dim_p + c.v_dim_p + kTileLd + 2) + 3 * kStrip * kTileLd + 64);
    float *gt = qt + kTile * c.dim, *qs = gt + kTile * c.v_dim, *gq = qs + kTile * c.dim_p, *room = gq + kTile * c.dim_p;
    float *gs = room + kTile * c.dim_p, *ds = gs + kTile * c.v_dim_p, *s = ds + kTile * kTileLd;
    float *dp = s + kStrip * kTileLd, *cap = dp + kStrip * kTileLd, *delta = cap + kStrip * kTileLd, *base = delta + kTile;
    // Queries [row0, row0 + kTile) of one block and head against everything in their list.
    auto visit = [&](int64_t h, int64_t i, int64_t row0) {
      const Queries at = MakeQueries(c, b, h, i, row0);
      if (at.rows <= 0) return;
      const Lanes lanes(c, at);
      const int64_t query = b * c.q_len + at.First(c), stat = (b * c.heads + h) * c.q_len + at.First(c);
      const float* grads = go.typed_data() + (query * c.heads + h) * c.v_dim;
      const float* from = c.Q(b, at.First(c), h);
      PackQueries(from, c.heads * c.dim, at.rows, at.rows_p, c.dim, c.Units(), qt);
      PackQueries(grads, c.heads * c.v_dim, at.rows, at.rows_p, c.v_dim, 1.f, gt);
      CopyRows(from, c.heads * c.dim, at.rows, c.dim, c.dim_p, c.scale, qs);
      CopyRows(grads, c.heads * c.v_dim, at.rows, c.v_dim, c.v_dim_p, 1.f, gs);
      for (int64_t r = 0; r < at.rows_p; r++) {
        // A query that sees nothing, or does not exist: 2^(s - inf) = 0 keeps all its gradients 0.
        const bool real = r < at.rows && lse.typed_data()[stat + r] != kNothing;
        base[r] = real ? lse.typed_data()[stat + r] * kLog2e : -kNothing;
        delta[r] = 0;
        if (!real) continue;
        const float* out = o.typed_data() + ((query + r) * c.heads + h) * c.v_dim;
        delta[r] = Dot(out, grads + r * c.heads * c.v_dim, c.v_dim) - dlse.typed_data()[stat + r];
      }
      bool first = true;
      double alibi_sum = 0;
      for (int64_t slot = 0; slot < c.n_tot[at.list]; slot++) {
        Keys k{slot, c.idx[at.list * c.width + slot], 0, 0, (c.flags & kBits) && slot < c.n_part[at.list]};
        const int64_t columns = std::min(c.bk, c.limits[b] - k.j * c.bk);
        const int32_t* positions = c.kv_pos + (c.kv_pos_b == 1 ? 0 : b) * c.kv_len + k.j * c.bk;
        float *to_k = dk_sum + k.j * k_tile, *to_v = dv_sum + k.j * v_tile;
        if (columns > 0 && columns < c.bk && !mark[k.j]) {
          std::memset(to_k + columns * c.dim_p, 0, (c.bk - columns) * c.dim_p * 4);
          std::memset(to_v + columns * c.v_dim_p, 0, (c.bk - columns) * c.v_dim_p * 4);
        }
        double tile_sum = 0;
        for (; k.x0 < columns; k.x0 += kTile) {
          k.keys = std::min(kTile, columns - k.x0);
          Fetch(c.V(b, k.First(c), kv_h), c.kv_heads * c.v_dim, k.keys, c.v_dim);
          for (int64_t x0 = 0; x0 < k.keys; x0 += kStrip) {
            const int64_t count = std::min(kStrip, k.keys - x0), key0 = k.First(c) + x0;
            float* dz = ds + x0 * at.ld;
            Scores(c, at, lanes, k, x0, count, qt, s, cap);
            Multiply<false>(count, at.rows_p, c.v_dim, c.V(b, key0, kv_h), c.kv_heads * c.v_dim, Packed(gt, c.v_dim), dp, at.ld,
                            false);
            Vec sum = Vec{}, far_sum = Vec{};
            for (int64_t x = 0; x < count; x++) {
              for (int64_t r = 0; r < at.rows_p; r += kLanes) {
                const int64_t e = x * at.ld + r;
                Vec weight = Exp2(Load(s + e) - Load(base + r)), back = Load(dp + e);
                if (c.threshold) back = lanes.Drop(c, r, key0 + x, back);
                Vec z = weight * (back - Load(delta + r));
                if (c.threshold) weight = lanes.Drop(c, r, key0 + x, weight);
                if (!c.Plain()) {
                  sum += z;
                  if (c.flags & kAlibi) far_sum += z * lanes.Distance(r, positions[k.x0 + x0 + x]);
                  if (c.soft_cap != 0) z *= Load(cap + e);
                }
                Store(s + e, weight);
                Store(dz + e, z);
              }
            }
            tile_sum += Sum(sum);
            alibi_sum -= Sum(far_sum);
            Multiply<false>(count, c.dim_p, at.rows, dz, at.ld, RowMajor(qs, c.dim_p), to_k + (k.x0 + x0) * c.dim_p, c.dim_p,
                            mark[k.j]);
            Multiply<false>(count, c.v_dim_p, at.rows, s, at.ld, RowMajor(gs, c.v_dim_p), to_v + (k.x0 + x0) * c.v_dim_p,
                            c.v_dim_p, mark[k.j]);
          }
          FetchNext(c, at, slot);
          const Panels keys = AsPanels(c.K(b, k.First(c), kv_h), c.kv_heads * c.dim, k.keys, c.dim, c.dim_p, room);
          Multiply<true>(at.rows, c.dim_p, k.keys, ds, at.ld, keys, gq, c.dim_p, !first);
          first = false;
        }
        mark[k.j] |= columns > 0;
        if (c.flags & kBlockBias) {
          float* to = dblock->typed_data() + ((b * c.heads + h) * c.nq + i) * c.width + slot;
          *to = static_cast<float>(tile_sum + (row0 ? *to : 0.f));
        }
      }
      if (c.flags & kAlibi) {
        float* to = dalibi->typed_data() + (b * c.heads + h) * c.nq + i;
        *to = static_cast<float>(alibi_sum + (row0 ? *to : 0.f));
      }
      for (int64_t r = 0; r < at.rows; r++) {
        float* to = dq->typed_data() + ((query + r) * c.heads + h) * c.dim;
        for (int64_t d = 0; d < c.dim; d++) to[d] = first ? 0.f : gq[r * c.dim_p + d] * c.scale;
      }
    };
    for (int64_t i = begin; i < end; i++) {
      for (int64_t h = kv_h * c.group; h < (kv_h + 1) * c.group; h++) {
        for (int64_t row0 = 0; row0 < c.bq; row0 += kTile) visit(h, i, row0);
      }
    }

    // Parts are begun in their order, so whoever is waited for is at work.
    while (turn[n].load(std::memory_order_acquire) != part) std::this_thread::yield();
    for (int64_t j = 0; j < c.nk; j++) {
      uint8_t& seen = written[n * c.nk + j];
      if (!mark[j] && (seen || part < parts - 1)) continue;
      for (int64_t r = 0; r < std::min(c.bk, c.kv_len - j * c.bk); r++) {
        const int64_t row = (b * c.kv_len + j * c.bk + r) * c.kv_heads + kv_h;
        Add(mark[j] ? dk_sum + j * k_tile + r * c.dim_p : nullptr, c.dim, seen, dk->typed_data() + row * c.dim);
        Add(mark[j] ? dv_sum + j * v_tile + r * c.v_dim_p : nullptr, c.v_dim, seen, dv->typed_data() + row * c.v_dim);
      }
      seen = 1;
    }
    turn[n].store(part + 1, std::memory_order_release);
  });
  return ffi::Error::Success();
}

// ---- decode --------------------------------------------------------------------------------------------------------------

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
    float* s = Scratch<0>(rows * (c.bk_p + c.dim) + c.bk_p * c.dim + c.bk * c.v_dim_p + 64);
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
        c.Finish(at, s + r * c.bk_p);
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(bsa_forward, Forward, COMMON_ATTRIBUTES.COMMON_ARGUMENTS.Ret<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(bsa_backward, Backward,
                              COMMON_ATTRIBUTES.Attr<int64_t>("parts")
                                  .COMMON_ARGUMENTS.Arg<F32>().Arg<F32>().Arg<F32>().Arg<F32>()
                                  .Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(bsa_decode, Decode,
                              COMMON_ATTRIBUTES.Attr<int64_t>("parts").Attr<int64_t>("kv_len")
                                  .COMMON_ARGUMENTS.Arg<S32>().Ret<F32>().Ret<F32>().Ret<F32>());
