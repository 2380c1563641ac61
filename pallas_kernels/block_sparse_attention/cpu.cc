// Block-sparse attention for CPUs: forward, backward and decode handlers for XLA's FFI, float32.
//
// Matrix products run on panels that are kPanel columns wide, with sums in registers, in pieces of at most kTile queries and
// kTile keys, whose scores stay in the second-level cache. Work is dealt out to XLA's own thread pool. What a task computes and
// in which order sums are formed depends on shapes and lists only, never on threads, so results are the same bits in every run.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#include "cpu.h"

using namespace pallas;

namespace {

using Real = Vec<float>;
constexpr int kWide = kLanes<float>;
constexpr int kTall = kWide == 8 ? 4 : 8;  // rows of a tile of sums in registers
constexpr int64_t kPanel = 2 * kWide;      // columns of a panel
constexpr int64_t kTile = 128;             // most queries, and most keys, of a piece of a tile
constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896f;

typedef int32_t Ints __attribute__((vector_size(kBytes), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(kBytes), aligned(4), may_alias));

inline Words AllWords(uint32_t x) { return Words{} + x; }
inline Words Lane() {
  Words r;
  for (int i = 0; i < kWide; i++) r[i] = i;
  return r;
}
inline Real Larger(Real a, Real b) { return a > b ? a : b; }
// Largest of all lanes, by halves; half of the lanes of a and b in turn.
#if defined(__clang__)
inline float Max(Real x) {
  float s = x[0];
  for (int i = 1; i < kWide; i++) s = x[i] > s ? x[i] : s;
  return s;
}
inline Real Interleave(Real a, Real b, int from) {
  Real r;
  for (int i = 0; i < kWide; i++) r[i] = i % 2 ? b[from + i / 2] : a[from + i / 2];
  return r;
}
#else
inline float Max(Real x) {
  for (int half = kWide / 2; half; half /= 2) x = Larger(x, __builtin_shuffle(x, (Ints)(Lane() ^ half)));
  return x[0];
}
inline Real Interleave(Real a, Real b, int from) {
  return __builtin_shuffle(a, b, (Ints)((Lane() & 1) * kWide + (Lane() >> 1) + from));
}
#endif
// The transpose of kWide vectors: interleaving the two halves of the rows does one bit of the index at a time.
inline void Transpose(Real* x) {
#pragma GCC unroll 4
  for (int bit = 1; bit < kWide; bit *= 2) {
    Real y[kWide];
#pragma GCC unroll 8
    for (int i = 0; i < kWide / 2; i++) {
      y[2 * i] = Interleave(x[i], x[i + kWide / 2], 0);
      y[2 * i + 1] = Interleave(x[i], x[i + kWide / 2], kWide / 2);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWide; i++) x[i] = y[i];
  }
}
inline float Dot(const float* a, const float* b, int64_t n) {
  Real sum = Real{};
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) sum += Load(a + i) * Load(b + i);
  float s = Sum<float>(sum);
  for (; i < n; i++) s += a[i] * b[i];
  return s;
}

// 2^x for x <= 127, within 2 units in the last place; exactly 0 below -126.
inline Real Exp2(Real x) {
  const Real z = x + 12582912.f;  // rounds to a whole number, which the lowest bits then hold
  const Real f = x - (z - 12582912.f);
  Real p = All(1.326472578e-03f);
  p = p * f + 9.671512740e-03f;
  p = p * f + 5.550733748e-02f;
  p = p * f + 2.402224208e-01f;
  p = p * f + 6.931469776e-01f;
  p = p * f + 1.f;
  const Ints bits = (Ints)p + ((Ints)z << 23);
  return x < -126.f ? Real{} : (Real)bits;
}
inline Real Exp(Real x) { return Exp2(x * kLog2e); }

// tanh: a polynomial near 0 (Cephes tanhf), else 1 - 2 / (exp(2 |x|) + 1).
inline Real Tanh(Real x) {
  Real size = x < 0.f ? -x : x;
  Real z = x * x;
  Real p = All(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  p = p * z * x + x;
  Real capped = size < 40.f ? size : All(40.f);
  Real q = 1.f - 2.f / (Exp(2.f * capped) + 1.f);
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

// ---- products ------------------------------------------------------------------------------------------------------------

// Asks for rows that are needed soon: lists jump about, which the hardware cannot foresee.
inline void Fetch(const float* from, int64_t stride, int64_t rows, int64_t depth) {
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t d = 0; d < depth; d += 16) __builtin_prefetch(from + r * stride + d, 0, 2);
  }
}
// The same a few rows at a time, one Step after each tile of sums: many requests at once would hold up the loads of products.
// What was added last comes first.
struct Ahead {
  struct Rows {
    const float* from;
    int64_t stride, count, depth;
  };
  Rows spans[3];
  int64_t some = 0, total = 0, each = 0;

  void Add(const float* from, int64_t stride, int64_t count, int64_t depth) {
    spans[some++] = {from, stride, count, depth};
    total += count;
  }
  // Divides the rows among `steps`.
  void Spread(int64_t steps) { each = (total + steps - 1) / std::max<int64_t>(steps, 1); }
  void Step() {
    for (int64_t rows = each; rows > 0 && some > 0;) {
      Rows& x = spans[some - 1];
      const int64_t n = std::min(rows, x.count);
      Fetch(x.from, x.stride, n, x.depth);
      x.from += n * x.stride, x.count -= n, rows -= n;
      if (x.count <= 0) some--;
    }
  }
};

// The right operand of a product: element (p, panel * kPanel + c) lies at data[panel * step + p * ld + c].
struct Panels {
  const float* data;
  int64_t ld, step;
};
inline Panels Packed(const float* data, int64_t depth) { return {data, kPanel, depth * kPanel}; }
inline Panels RowMajor(const float* data, int64_t ld) { return {data, ld, kPanel}; }

// x = R rows of one panel of A B. A(r, p) is a[r * lda + p], or a[p * lda + r] if transposed. The loops over r are unrolled so
// that the sums stay in registers.
template <int R, bool kTransposed>
inline void Sums(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, Real (&x)[R][2]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) x[r][0] = x[r][1] = Real{};
  for (int64_t p = 0; p < depth; p++) {
    const Real b0 = Load(b + p * ldb), b1 = Load(b + p * ldb + kWide);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Real s = All(kTransposed ? a[p * lda + r] : a[r * lda + p]);
      x[r][0] += s * b0;
      x[r][1] += s * b1;
    }
  }
}
template <int R>
inline void LoadRows(const float* from, int64_t ld, Real (&x)[R][2]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) x[r][0] = Load(from + r * ld), x[r][1] = Load(from + r * ld + kWide);
}
template <int R>
inline void StoreRows(float* to, int64_t ld, const Real (&x)[R][2]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) Store(to + r * ld, x[r][0]), Store(to + r * ld + kWide, x[r][1]);
}

// Those rows of C (+)= A B.
template <int R, bool kTransposed>
inline void Micro(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  Real x[R][2];
  Sums<R, kTransposed>(depth, a, lda, b, ldb, x);
  if (add) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) x[r][0] += Load(c + r * ldc), x[r][1] += Load(c + r * ldc + kWide);
  }
  StoreRows<R>(c, ldc, x);
}

// C[rows, columns] (+)= A[rows, depth] B[depth, columns]; columns is a multiple of kPanel.
template <bool kTransposed>
void Multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, Panels b, float* c, int64_t ldc,
              bool add, Ahead* ahead = nullptr) {
  const int64_t down = kTransposed ? 1 : lda;
  for (int64_t j = 0; j < columns; j += kPanel, b.data += b.step) {
    int64_t i = 0;
    for (; i + kTall <= rows; i += kTall) {
      Micro<kTall, kTransposed>(depth, a + i * down, lda, b.data, b.ld, c + i * ldc + j, ldc, add);
      if (ahead) ahead->Step();
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

// Queries [row0, row0 + rows) of block i of a head against keys [key0, key0 + keys) of block j, which is in a slot of the list.
struct Place {
  int64_t batch, head, i, row0, rows, slot, j, key0, keys;
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
  // Queries that a piece of a block has from row0 on; keys of block j that exist for this batch element.
  int64_t Rows(int64_t i, int64_t row0) const { return std::min({kTile, bq - row0, q_len - i * bq - row0}); }
  int64_t Keys(int64_t b, int64_t j) const { return std::clamp<int64_t>(limits[b] - j * bk, 0, bk); }
  bool Partial(int64_t list, int64_t slot) const { return (flags & kBits) && slot < n_part[list]; }
  const uint8_t* Bits(int64_t b, int64_t h, int64_t i, int64_t slot) const {
    const int64_t owner = (bits_b == 1 ? 0 : b) * bits_h + h * bits_h / heads;
    return bits + ((owner * nq + i) * bits_p + slot) * bq * bits_bytes;
  }
  const int32_t* QueryPositions(int64_t b, int64_t row) const { return q_pos + (pos_b == 1 ? 0 : b) * q_len + row; }
  const int32_t* KeyPositions(int64_t b, int64_t row) const { return kv_pos + (kv_pos_b == 1 ? 0 : b) * kv_len + row; }
  float TileBias(int64_t list, int64_t slot) const { return (flags & kBlockBias) ? block_bias[list * width + slot] : 0.f; }
  // Hash for dropout of a query's row.
  uint32_t Line(int64_t b, int64_t h, int64_t row) const {
    const uint32_t head = Mix(seed[0] + static_cast<uint32_t>(b * heads + h) * 0x9E3779B9u);
    return Mix(head ^ (seed[1] + static_cast<uint32_t>(row) * 0x85EBCA6Bu));
  }
  // Dropout: what is kept is scaled, all else is 0.
  Real Drop(Words line, Words key, Real x) const {
    return (Mix(line + key * 0xC2B2AE35u) >> 8) >= threshold ? x * keep_scale : Real{};
  }

  // Anything that changes scores beyond the scale.
  bool Plain() const { return soft_cap == 0 && !(flags & (kAlibi | kBlockBias)); }
  // What one operand is multiplied by before the product that gives scores: natural units if there are such options, else
  // units of log 2, in which scores are after `Bend` in any case.
  float Units() const { return Plain() ? scale * kLog2e : scale; }
  // Soft cap and biases. `slope`, where not null, receives the derivative of the soft cap.
  Real Bend(Real score, float tile_bias, float steep, Real distance, float* slope) const {
    if (soft_cap != 0) {
      const Real t = Tanh(score * (1.f / soft_cap));
      score = t * soft_cap;
      if (slope) Store(slope, 1.f - t * t);
    }
    return (score - distance * steep + tile_bias) * kLog2e;
  }
  float Steep(int64_t head) const { return (flags & kAlibi) ? alibi[head] : 0.f; }
};

inline Real Distance(Ints a, Ints b) {
  const Ints d = a - b;
  return __builtin_convertvector(d < 0 ? -d : d, Real);
}
// The first N bytes, of which `left` exist.
template <class T, int N>
inline T LoadBytes(const void* from, int64_t left) {
  T x = {};
  if (left >= N) {
    std::memcpy(&x, from, N);
  } else if (left > 0) {
    std::memcpy(&x, from, left);
  }
  return x;
}
inline Ints LoadInts(const int32_t* from, int64_t count) { return LoadBytes<Ints, kBytes>(from, count * 4); }

// Options and masks on scores with queries down and keys across, in rows of `ld` floats that are whole panels. What no query may
// see becomes -inf.
void Finish(const Call& c, const Place& at, float* s, int64_t ld, float* slope) {
  const int64_t list = c.ListRow(at.batch, at.head, at.i), row0 = at.i * c.bq + at.row0, key0 = at.j * c.bk + at.key0;
  if (!c.Plain()) {
    const float tile_bias = c.TileBias(list, at.slot), steep = c.Steep(at.head);
    const int32_t *there = c.KeyPositions(at.batch, key0), *here = c.QueryPositions(at.batch, row0);
    for (int64_t r = 0; r < at.rows; r++) {
      for (int64_t x = 0; x < at.keys; x += kWide) {
        float* to = s + r * ld + x;
        const Real distance = steep != 0 ? Distance(LoadInts(there + x, at.keys - x), Ints{} + here[r]) : Real{};
        Store(to, c.Bend(Load(to), tile_bias, steep, distance, slope ? slope + r * ld + x : nullptr));
      }
    }
  }
  if (at.partial) {
    const uint8_t* tile_bits = c.Bits(at.batch, at.head, at.i, at.slot) + at.row0 * c.bits_bytes;
    const Words one = AllWords(1) << Lane();
    for (int64_t r = 0; r < at.rows; r++) {
      for (int64_t x = 0; x < at.keys; x += kWide) {
        const int64_t byte = (at.key0 + x) / 8;  // key0 is a multiple of 8
        const auto word = LoadBytes<uint32_t, std::max(kWide / 8, 1)>(tile_bits + r * c.bits_bytes + byte, c.bits_bytes - byte);
        const Words kept = AllWords(word >> x % 8) & one;
        float* to = s + r * ld + x;
        Store(to, kept != 0 ? Load(to) : All(kNothing));
      }
    }
  }
  for (int64_t r = 0; at.keys % kPanel && r < at.rows; r++) {
    for (int64_t x = at.keys; x < RoundUp(at.keys, kPanel); x++) s[r * ld + x] = kNothing;
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

// The panels of the transpose of `rows` rows, times `scale`; missing rows become 0.
void PackTransposed(const float* from, int64_t stride, int64_t rows, int64_t depth, float scale, float* to) {
  for (int64_t j = 0; j < rows; j += kPanel, to += depth * kPanel) {
    for (int64_t half = 0; half < kPanel; half += kWide) {
      const int64_t count = std::clamp<int64_t>(rows - j - half, 0, kWide);
      const float* line = from + (j + half) * stride;
      int64_t p = 0;
      for (; p + kWide <= depth; p += kWide) {
        Real x[kWide];
        for (int64_t c = 0; c < kWide; c++) x[c] = c < count ? Load(line + c * stride + p) * scale : Real{};
        Transpose(x);
        for (int64_t c = 0; c < kWide; c++) Store(to + (p + c) * kPanel + half, x[c]);
      }
      for (; p < depth; p++) {
        for (int64_t c = 0; c < kWide; c++) to[p * kPanel + half + c] = c < count ? line[c * stride + p] * scale : 0.f;
      }
    }
  }
}

// Rows as the right operand of a product: where they lie if they are whole panels, else copied to `room` and filled up with 0.
Panels AsPanels(const float* from, int64_t stride, int64_t rows, int64_t depth, float* room) {
  const int64_t depth_p = RoundUp(depth, kPanel);
  if (depth == depth_p) return RowMajor(from, stride);
  for (int64_t r = 0; r < rows; r++) {
    std::memcpy(room + r * depth_p, from + r * stride, depth * 4);
    std::memset(room + r * depth_p + depth, 0, (depth_p - depth) * 4);
  }
  return RowMajor(room, depth_p);
}

// to = from * scale.
inline void CopyScaled(const float* from, int64_t n, float scale, float* to) {
  int64_t d = 0;
  for (; d + kWide <= n; d += kWide) Store(to + d, Load(from + d) * scale);
  for (; d < n; d++) to[d] = from[d] * scale;
}
inline void AddTo(const float* from, int64_t n, float* to) {
  int64_t d = 0;
  for (; d + kWide <= n; d += kWide) Store(to + d, Load(to + d) + Load(from + d));
  for (; d < n; d++) to[d] += from[d];
}

// ---- forward -------------------------------------------------------------------------------------------------------------

// Scores lie with keys down and queries across the lanes: keys and values are read where they lie, only queries are rearranged,
// once for a whole row of tiles, and the softmax needs no sums across lanes.

constexpr int64_t kTileLd = kTile + kWide;  // the odd number of cache lines spreads a column over the whole cache

// What the options need to know of each query.
struct Lanes {
  int32_t here[kTile];    // positions
  uint32_t lines[kTile];  // hashes for dropout

  Lanes(const Call& c, int64_t b, int64_t h, int64_t row0, int64_t rows) {
    for (int64_t r = 0; (c.flags & kAlibi) && r < kTile; r++) here[r] = r < rows ? c.QueryPositions(b, row0)[r] : 0;
    for (int64_t r = 0; c.threshold && r < kTile; r++) lines[r] = c.Line(b, h, row0 + r);
  }
};

// Options and masks on such scores, in rows of kTileLd floats.
void FinishAcross(const Call& c, const Place& at, const Lanes& lanes, float* s) {
  const int64_t list = c.ListRow(at.batch, at.head, at.i), rows_p = RoundUp(at.rows, kPanel);
  if (!c.Plain()) {
    const float tile_bias = c.TileBias(list, at.slot), steep = c.Steep(at.head);
    const int32_t* there = c.KeyPositions(at.batch, at.j * c.bk + at.key0);
    for (int64_t x = 0; x < at.keys; x++) {
      for (int64_t r = 0; r < rows_p; r += kWide) {
        float* to = s + x * kTileLd + r;
        const Real distance = steep != 0 ? Distance(*reinterpret_cast<const Ints*>(lanes.here + r), Ints{} + there[x]) : Real{};
        Store(to, c.Bend(Load(to), tile_bias, steep, distance, nullptr));
      }
    }
  }
  if (!at.partial) return;
  const uint8_t* tile_bits = c.Bits(at.batch, at.head, at.i, at.slot) + at.row0 * c.bits_bytes;
  for (int64_t r = 0; r < rows_p; r += kWide) {
    for (int64_t x = 0; x < at.keys; x += 32) {  // key0 is a multiple of 32
      const int64_t byte = (at.key0 + x) / 8;
      Words words = {};
      for (int64_t lane = 0; lane < std::min<int64_t>(kWide, at.rows - r); lane++) {
        words[lane] = LoadBytes<uint32_t, 4>(tile_bits + (r + lane) * c.bits_bytes + byte, c.bits_bytes - byte);
      }
      for (int64_t n = 0; n < std::min<int64_t>(32, at.keys - x); n++) {
        float* to = s + (x + n) * kTileLd + r;
        Store(to, (words & (1u << n)) != 0 ? Load(to) : All(kNothing));
      }
    }
  }
}

// Weights of a row of tiles are 2^(s - base), where a query's base is a score that no later one exceeds by more than kSlack: a
// larger score takes its place, and what has been summed by then is multiplied by `shrink`. So bases move rarely, and scores
// become weights while they are in registers.
constexpr float kSlack = 8.f;
constexpr float kNoBase = std::numeric_limits<float>::lowest();  // a query that has seen nothing yet

struct Softmax {
  float *base, *total, *shrink;
  bool moved;
};

// Moves the bases of kPanel queries of which some scores are too large, and rescales the weights of the `above` keys before.
__attribute__((noinline)) void MoveBases(const Real (&most)[2], int64_t r, int64_t above, float* s, Softmax& soft) {
  for (int64_t half = 0; half < 2; half++, r += kWide) {
    const Real old = Load(soft.base + r), now = most[half] > old + kSlack ? most[half] : old, less = Exp2(old - now);
    Store(soft.base + r, now);
    Store(soft.total + r, Load(soft.total + r) * less);
    Store(soft.shrink + r, Load(soft.shrink + r) * less);
    for (int64_t x = 0; x < above; x++) Store(s + x * kTileLd + r, Load(s + x * kTileLd + r) * less);
  }
  soft.moved = true;
}

// Weights of R keys from key x on for the kPanel queries from r on: their scores are in `s`, or else are products of `k` and
// the packed queries `qt`.
template <int R, bool kStored>
inline void Weigh(int64_t depth, const float* k, int64_t k_stride, const float* qt, int64_t r, int64_t x, float* s,
                  Softmax& soft) {
  float* rows = s + x * kTileLd + r;
  Real score[R][2];
  if (kStored) {
    LoadRows<R>(rows, kTileLd, score);
  } else {
    Sums<R, false>(depth, k + x * k_stride, k_stride, qt + r * depth, kPanel, score);
  }
  Real base[2] = {Load(soft.base + r), Load(soft.base + r + kWide)}, most[2] = {base[0], base[1]};
#pragma GCC unroll 8
  for (int n = 0; n < R; n++) most[0] = Larger(score[n][0], most[0]), most[1] = Larger(score[n][1], most[1]);
  if (__builtin_expect(Max(Larger(most[0] - base[0], most[1] - base[1])) > kSlack, 0)) {
    StoreRows<R>(rows, kTileLd, score);
    MoveBases(most, r, x, s, soft);
    LoadRows<R>(rows, kTileLd, score);
    base[0] = Load(soft.base + r), base[1] = Load(soft.base + r + kWide);
  }
  Real total[2] = {Load(soft.total + r), Load(soft.total + r + kWide)};
#pragma GCC unroll 8
  for (int n = 0; n < R; n++) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      score[n][half] = Exp2(score[n][half] - base[half]);
      total[half] += score[n][half];
    }
  }
  StoreRows<R>(rows, kTileLd, score);
  Store(soft.total + r, total[0]);
  Store(soft.total + r + kWide, total[1]);
}

// The same for all keys and queries of a piece.
template <bool kStored>
void Weights(int64_t rows_p, int64_t keys, int64_t depth, const float* k, int64_t k_stride, const float* qt, float* s,
             Softmax& soft, Ahead& ahead) {
  for (int64_t r = 0; r < rows_p; r += kPanel) {
    int64_t x = 0;
    for (; x + kTall <= keys; x += kTall) {
      Weigh<kTall, kStored>(depth, k, k_stride, qt, r, x, s, soft);
      ahead.Step();
    }
    for (; x < keys; x++) Weigh<1, kStored>(depth, k, k_stride, qt, r, x, s, soft);
  }
}

ffi::Error Forward(ffi::ThreadPool pool, int64_t bq, int64_t bk, float scale, float soft_cap, float keep_scale,
                   int64_t threshold, int64_t flags, F32 q, F32 k, F32 v, S32 idx, S32 n_part, S32 n_tot, U8 bits, F32 alibi,
                   S32 q_pos, S32 kv_pos, F32 block_bias, U32 seed, S32 limits, OutF32 o, OutF32 lse) {
  const Call c = MakeCall(bq, bk, scale, soft_cap, keep_scale, threshold, flags, q, k, v, idx, n_part, n_tot, bits, alibi,
                          q_pos, kv_pos, block_bias, seed, limits);
  const int64_t cuts = (c.bq + kTile - 1) / kTile;
  ParallelFor(pool, c.batch * c.heads * c.nq * cuts, [&](int64_t t) {
    const int64_t i = t / cuts % c.nq, h = t / cuts / c.nq % c.heads, b = t / cuts / c.nq / c.heads, kv_h = h / c.group;
    Place at{b, h, i, t % cuts * kTile, c.Rows(i, t % cuts * kTile), 0, 0, 0, 0, false};
    if (at.rows <= 0) return;
    const int64_t row0 = i * c.bq + at.row0, rows_p = RoundUp(at.rows, kPanel), list = c.ListRow(b, h, i);
    const int64_t k_stride = c.kv_heads * c.dim, v_stride = c.kv_heads * c.v_dim;
    const Lanes lanes(c, b, h, row0, at.rows);
    const Lease lease(kTile * (c.dim + 2 * c.v_dim_p + kTileLd + 3) * 4);
    float *qt = lease.As<float>(), *out = qt + kTile * c.dim, *room = out + kTile * c.v_dim_p, *s = room + kTile * c.v_dim_p;
    float* base = s + kTile * kTileLd;
    Softmax soft{base, base + kTile, base + 2 * kTile, false};
    auto block = [&](int64_t slot) { return c.idx[list * c.width + slot]; };
    auto result = [&](int64_t r) { return o->typed_data() + ((b * c.q_len + row0 + r) * c.heads + h) * c.v_dim; };
    Fetch(c.Q(b, row0, h), c.heads * c.dim, at.rows, c.dim);
    if (c.n_tot[list] > 0) Fetch(c.K(b, block(0) * c.bk, kv_h), k_stride, std::min(kTile, c.Keys(b, block(0))), c.dim);
    PackTransposed(c.Q(b, row0, h), c.heads * c.dim, at.rows, c.dim, c.Units(), qt);
    std::fill_n(soft.base, rows_p, kNoBase), std::fill_n(soft.total, rows_p, 0.f), std::fill_n(soft.shrink, rows_p, 1.f);
    bool first = true;
    for (; at.slot < c.n_tot[list]; at.slot++) {
      at.j = block(at.slot), at.partial = c.Partial(list, at.slot);
      const int64_t count = c.Keys(b, at.j);
      for (at.key0 = 0; at.key0 < count; at.key0 += kTile) {
        at.keys = std::min(kTile, count - at.key0);
        const int64_t key = at.j * c.bk + at.key0;
        if (first) Fetch(c.V(b, key, kv_h), v_stride, at.keys, c.v_dim);
        Ahead ahead;
        const bool more = at.key0 + kTile < count;
        if (more || at.slot + 1 < c.n_tot[list]) {
          const int64_t j = more ? at.j : block(at.slot + 1), key0 = more ? at.key0 + kTile : 0;
          const int64_t next = j * c.bk + key0, next_keys = std::min(kTile, c.Keys(b, j) - key0);
          ahead.Add(c.V(b, next, kv_h), v_stride, next_keys, c.v_dim);
          ahead.Add(c.K(b, next, kv_h), k_stride, next_keys, c.dim);
        } else {
          ahead.Add(result(0), c.heads * c.v_dim, at.rows, c.v_dim);
        }
        ahead.Spread((at.keys * rows_p + at.rows * c.v_dim_p) / (kTall * kPanel));
        const float* keys = c.K(b, key, kv_h);
        if (c.Plain() && !at.partial) {
          Weights<false>(rows_p, at.keys, c.dim, keys, k_stride, qt, s, soft, ahead);
        } else {
          Multiply<false>(at.keys, rows_p, c.dim, keys, k_stride, Packed(qt, c.dim), s, kTileLd, false);
          FinishAcross(c, at, lanes, s);
          Weights<true>(rows_p, at.keys, c.dim, keys, k_stride, qt, s, soft, ahead);
        }
        if (soft.moved) {
          for (int64_t r = 0; !first && r < at.rows; r++) {
            float* sums = out + r * c.v_dim_p;
            if (soft.shrink[r] != 1.f) CopyScaled(sums, c.v_dim_p, soft.shrink[r], sums);
          }
          std::fill_n(soft.shrink, rows_p, 1.f);
          soft.moved = false;
        }
        for (int64_t x = 0; c.threshold && x < at.keys; x++) {
          for (int64_t r = 0; r < rows_p; r += kWide) {
            float* w = s + x * kTileLd + r;
            Store(w, c.Drop(*reinterpret_cast<const Words*>(lanes.lines + r), AllWords(key + x), Load(w)));
          }
        }
        const Panels values = AsPanels(c.V(b, key, kv_h), v_stride, at.keys, c.v_dim, room);
        Multiply<true>(at.rows, c.v_dim_p, at.keys, s, kTileLd, values, out, c.v_dim_p, !first, &ahead);
        first = false;
      }
    }
    for (int64_t r = 0; r < at.rows; r++) {
      float* to = result(r);
      const float total = soft.total[r];
      const bool some = !(total <= 0);  // NaN is shown, not hidden
      if (some) {
        CopyScaled(out + r * c.v_dim_p, c.v_dim, 1.f / total, to);
      } else {
        std::memset(to, 0, c.v_dim * 4);
      }
      lse->typed_data()[(b * c.heads + h) * c.q_len + row0 + r] = some ? soft.base[r] / kLog2e + std::log(total) : kNothing;
    }
  });
  return ffi::Error::Success();
}

// ---- backward ------------------------------------------------------------------------------------------------------------

// Who sees each key block, for all query heads of a key head: blocks in the order of (head, query block).
struct Seen {
  int32_t row, slot;  // row: head in the group * nq + query block
};

// One pass over the tiles gives all gradients. A task owns some key blocks of a key head and goes through the queries that see
// them, so dk and dv stay in the cache; dq is summed by each of the `parts` of a key head in memory of its own (the first one,
// if it can, in the result), and then over the parts in their order. Scores lie with queries down and keys across.
ffi::Error Backward(ffi::ThreadPool pool, int64_t bq, int64_t bk, float scale, float soft_cap, float keep_scale,
                    int64_t threshold, int64_t flags, int64_t parts, F32 q, F32 k, F32 v, S32 idx, S32 n_part, S32 n_tot,
                    U8 bits, F32 alibi, S32 q_pos, S32 kv_pos, F32 block_bias, U32 seed, S32 limits, F32 o, F32 lse, F32 go,
                    F32 dlse, OutF32 dq, OutF32 dk, OutF32 dv, OutF32 dblock, OutF32 dalibi) {
  const Call c = MakeCall(bq, bk, scale, soft_cap, keep_scale, threshold, flags, q, k, v, idx, n_part, n_tot, bits, alibi,
                          q_pos, kv_pos, block_bias, seed, limits);
  const int64_t kv_total = c.batch * c.kv_heads, queries = c.batch * c.heads * c.q_len, blocks = c.batch * c.heads * c.nq;
  const int64_t q_stride = c.heads * c.dim, g_stride = c.heads * c.v_dim, rows_of_group = c.group * c.nq;
  const int64_t direct = c.dim == c.dim_p;  // whether the first part writes to dq itself
  const Lease stats(queries * 8), sums((parts - direct) * queries * c.dim_p * 4);
  float *base = stats.As<float>(), *delta = base + queries;
  std::unique_ptr<uint8_t[]> mark(new uint8_t[parts * blocks]());  // query blocks to whose dq a part has added
  std::unique_ptr<int64_t[]> starts(new int64_t[kv_total * (c.nk + 1)]());
  std::unique_ptr<std::unique_ptr<Seen[]>[]> seen(new std::unique_ptr<Seen[]>[kv_total]);

  ParallelFor(pool, kv_total + blocks, [&](int64_t t) {
    if (t < kv_total) {
      const int64_t b = t / c.kv_heads, h0 = t % c.kv_heads * c.group;
      int64_t* start = starts.get() + t * (c.nk + 1);
      auto every = [&](auto visit) {
        for (int64_t row = 0; row < rows_of_group; row++) {
          const int64_t list = c.ListRow(b, h0 + row / c.nq, row % c.nq);
          for (int64_t slot = 0; slot < c.n_tot[list]; slot++) visit(row, slot, c.idx[list * c.width + slot]);
        }
      };
      every([&](int64_t, int64_t, int64_t j) { start[j + 1]++; });
      for (int64_t j = 0; j < c.nk; j++) start[j + 1] += start[j];
      seen[t].reset(new Seen[start[c.nk]]);
      std::unique_ptr<int64_t[]> next(new int64_t[c.nk]);
      std::copy(start, start + c.nk, next.get());
      every([&](int32_t row, int32_t slot, int64_t j) { seen[t][next[j]++] = {row, slot}; });
      return;
    }
    const int64_t owner = (t - kv_total) / c.nq, row0 = (t - kv_total) % c.nq * c.bq, b = owner / c.heads, h = owner % c.heads;
    for (int64_t row = row0; row < std::min(row0 + c.bq, c.q_len); row++) {
      const int64_t n = owner * c.q_len + row, from = ((b * c.q_len + row) * c.heads + h) * c.v_dim;
      // A query that sees nothing: 2^(s - inf) = 0 keeps all its gradients 0.
      const bool some = lse.typed_data()[n] != kNothing;
      base[n] = some ? lse.typed_data()[n] * kLog2e : -kNothing;
      delta[n] = some ? Dot(o.typed_data() + from, go.typed_data() + from, c.v_dim) - dlse.typed_data()[n] : 0.f;
    }
  });

  // Where a part sums the gradient of a query, and how many floats are from one query to the next.
  const int64_t dq_ld[] = {c.dim_p, direct ? q_stride : c.dim_p};
  auto grad = [&](int64_t part, int64_t b, int64_t h, int64_t row) {
    if (direct && part == 0) return dq->typed_data() + ((b * c.q_len + row) * c.heads + h) * c.dim;
    return sums.As<float>() + ((part - direct) * queries + (b * c.heads + h) * c.q_len + row) * c.dim_p;
  };

  ParallelFor(pool, kv_total * parts, [&](int64_t t) {
    const int64_t n = t / parts, part = t % parts, b = n / c.kv_heads, kv_h = n % c.kv_heads, h0 = kv_h * c.group;
    const int64_t* start = starts.get() + n * (c.nk + 1);
    // The parts of a key head have about equally many tiles.
    auto cut = [&](int64_t p) {
      const int64_t all = start[c.nk] + c.nk;
      int64_t j = p == parts ? c.nk : 0;
      while (j < c.nk && (start[j] + j) * parts < all * p) j++;
      return j;
    };
    const int64_t k_stride = c.kv_heads * c.dim, v_stride = c.kv_heads * c.v_dim;
    const Lease lease((kTile * (3 * c.dim_p + 3 * c.v_dim_p + kTileLd + 3 * kPanel + c.dim_p)) * 4);
    float *kt = lease.As<float>(), *vt = kt + kTile * c.dim_p, *k_sum = vt + kTile * c.v_dim_p;
    float *v_sum = k_sum + kTile * c.dim_p, *room = v_sum + kTile * c.v_dim_p, *g_room = room + kTile * c.dim_p;
    float *k_room = g_room + kTile * c.v_dim_p, *ds = k_room + kTile * c.dim_p, *s = ds + kTile * kTileLd;
    float *dp = s + kTile * kPanel, *slope = dp + kTile * kPanel;
    std::unique_ptr<double[]> alibi_sums(new double[c.group]());

    // A piece of a tile; `add` says whether it adds to dk and dv, `add_q` to dq.
    auto visit = [&](Place at, bool add, bool add_q, Panels keys, Ahead& ahead) {
      const int64_t row0 = at.i * c.bq + at.row0, key0 = at.key0, columns = at.keys;
      const int64_t stat = (b * c.heads + at.head) * c.q_len + row0;
      const float* g = go.typed_data() + ((b * c.q_len + row0) * c.heads + at.head) * c.v_dim;
      const Panels q_rows = AsPanels(c.Q(b, row0, at.head), q_stride, at.rows, c.dim, room);
      const Panels g_rows = AsPanels(g, g_stride, at.rows, c.v_dim, g_room);
      double tile_sum = 0, far_sum = 0;
      for (int64_t x0 = 0; x0 < columns; x0 += kPanel) {
        at.key0 = key0 + x0, at.keys = std::min(kPanel, columns - x0);
        const Panels k_columns = Packed(kt + x0 * c.dim, c.dim), v_columns = Packed(vt + x0 * c.v_dim, c.v_dim);
        Multiply<false>(at.rows, kPanel, c.dim, c.Q(b, row0, at.head), q_stride, k_columns, s, kPanel, false, &ahead);
        Finish(c, at, s, kPanel, slope);
        Multiply<false>(at.rows, kPanel, c.v_dim, g, g_stride, v_columns, dp, kPanel, false, &ahead);
        Real sum = Real{}, far = Real{};
        const int64_t key = at.j * c.bk + at.key0;
        for (int64_t r = 0; r < at.rows; r++) {
          const uint32_t line = c.threshold ? c.Line(b, at.head, row0 + r) : 0;
          const Real from = All(base[stat + r]), less = All(delta[stat + r]);
#pragma GCC unroll 2
          for (int64_t x = 0; x < kPanel; x += kWide) {
            const int64_t e = r * kPanel + x;
            const Real weight = Exp2(Load(s + e) - from);
            Real kept = weight, back = Load(dp + e);
            if (c.threshold) {
              const Words words = Lane() + static_cast<uint32_t>(key + x);
              back = c.Drop(AllWords(line), words, back);
              kept = c.Drop(AllWords(line), words, weight);
            }
            Real z = weight * (back - less);
            if (!c.Plain()) {
              sum += z;
              if (c.flags & kAlibi) {
                const Ints there = LoadInts(c.KeyPositions(b, key + x), std::max<int64_t>(at.keys - x, 0));
                far += z * Distance(there, Ints{} + c.QueryPositions(b, row0)[r]);
              }
              if (c.soft_cap != 0) z *= Load(slope + e);
            }
            Store(s + e, kept);
            Store(ds + r * kTileLd + x0 + x, z * c.scale);
          }
        }
        tile_sum += Sum<float>(sum);
        far_sum += Sum<float>(far);
        Multiply<true>(at.keys, c.v_dim_p, at.rows, s, kPanel, g_rows, v_sum + x0 * c.v_dim_p, c.v_dim_p, add);
        Multiply<true>(at.keys, c.dim_p, at.rows, ds + x0, kTileLd, q_rows, k_sum + x0 * c.dim_p, c.dim_p, add);
      }
      Multiply<false>(at.rows, c.dim_p, columns, ds, kTileLd, keys, grad(part, b, at.head, row0), dq_ld[part == 0], add_q);
      if (c.flags & kBlockBias) {
        dblock->typed_data()[((b * c.heads + at.head) * c.nq + at.i) * c.width + at.slot] += static_cast<float>(tile_sum);
      }
      alibi_sums[at.head - h0] -= far_sum;
    };

    for (int64_t j = cut(part), end = cut(part + 1); j < end; j++) {
      const int64_t columns = c.Keys(b, j);
      const Seen *from = seen[n].get() + start[j], *to = seen[n].get() + start[j + 1];
      for (const Seen* x = from; (c.flags & kBlockBias) && x < to; x++) {
        dblock->typed_data()[((b * c.heads + h0) * c.nq + x->row) * c.width + x->slot] = 0;
      }
      for (int64_t key0 = 0; from < to && key0 < columns; key0 += kTile) {
        const int64_t count = std::min(kTile, columns - key0), key = j * c.bk + key0;
        PackTransposed(c.K(b, key, kv_h), k_stride, count, c.dim, c.Units(), kt);
        PackTransposed(c.V(b, key, kv_h), v_stride, count, c.v_dim, 1.f, vt);
        const Panels keys = AsPanels(c.K(b, key, kv_h), k_stride, count, c.dim, k_room);
        bool add = false;
        for (const Seen* x = from; x < to; x++) {
          const int64_t h = h0 + x->row / c.nq, i = x->row % c.nq;
          Ahead ahead;
          if (x + 1 < to) {
            const int64_t next_h = h0 + x[1].row / c.nq, next = x[1].row % c.nq, rows = c.Rows(next, 0), row = next * c.bq;
            ahead.Add(grad(part, b, next_h, row), dq_ld[part == 0], rows, c.dim);
            ahead.Add(go.typed_data() + ((b * c.q_len + row) * c.heads + next_h) * c.v_dim, g_stride, rows, c.v_dim);
            ahead.Add(c.Q(b, row, next_h), q_stride, rows, c.dim);
          } else if (key0 + count == columns && j + 1 < end) {
            const int64_t rows = std::min(kTile, c.Keys(b, j + 1));
            ahead.Add(c.V(b, (j + 1) * c.bk, kv_h), v_stride, rows, c.v_dim);
            ahead.Add(c.K(b, (j + 1) * c.bk, kv_h), k_stride, rows, c.dim);
          }
          ahead.Spread(2 * count * c.Rows(i, 0) / (kTall * kPanel));
          uint8_t& marked = mark[part * blocks + (b * c.heads + h0) * c.nq + x->row];
          for (int64_t row0 = 0; c.Rows(i, row0) > 0; row0 += kTile) {
            const bool partial = c.Partial(c.ListRow(b, h, i), x->slot);
            visit({b, h, i, row0, c.Rows(i, row0), x->slot, j, key0, count, partial}, add, marked, keys, ahead);
            add = true;
          }
          marked = 1;
        }
        for (int64_t r = 0; r < count; r++) {
          const int64_t row = (b * c.kv_len + key + r) * c.kv_heads + kv_h;
          CopyScaled(k_sum + r * c.dim_p, c.dim, 1.f, dk->typed_data() + row * c.dim);
          CopyScaled(v_sum + r * c.v_dim_p, c.v_dim, 1.f, dv->typed_data() + row * c.v_dim);
        }
      }
      for (int64_t r = from == to ? 0 : columns; r < std::min(c.bk, c.kv_len - j * c.bk); r++) {
        const int64_t row = (b * c.kv_len + j * c.bk + r) * c.kv_heads + kv_h;
        std::memset(dk->typed_data() + row * c.dim, 0, c.dim * 4);
        std::memset(dv->typed_data() + row * c.v_dim, 0, c.v_dim * 4);
      }
    }
    for (int64_t g = 0; (c.flags & kAlibi) && g < c.group; g++) dalibi->typed_data()[t * c.group + g] = alibi_sums[g];
  });

  ParallelFor(pool, blocks, [&](int64_t t) {
    const int64_t b = t / c.nq / c.heads, h = t / c.nq % c.heads, row0 = t % c.nq * c.bq;
    for (int64_t row = row0; row < std::min(row0 + c.bq, c.q_len); row++) {
      float* to = dq->typed_data() + ((b * c.q_len + row) * c.heads + h) * c.dim;
      bool some = direct && mark[t];
      for (int64_t part = direct; part < parts; part++) {
        if (!mark[part * blocks + t]) continue;
        if (some) {
          AddTo(grad(part, b, h, row), c.dim, to);
        } else {
          CopyScaled(grad(part, b, h, row), c.dim, 1.f, to);
        }
        some = true;
      }
      if (!some) std::memset(to, 0, c.dim * 4);
    }
  });
  return ffi::Error::Success();
}

// ---- decode --------------------------------------------------------------------------------------------------------------

// Scores become weights 2^(s - top); earlier sums are rescaled.
void Soften(const Call& c, int64_t rows, int64_t columns, float* s, float* top, float* total, float* out) {
  for (int64_t r = 0; r < rows; r++) {
    float* row = s + r * c.bk_p;
    Real m0 = Load(row), m1 = Load(row + kWide);
    for (int64_t x = kPanel; x < columns; x += kPanel) {
      m0 = Larger(Load(row + x), m0);
      m1 = Larger(Load(row + x + kWide), m1);
    }
    const float before = top[r], now = std::max(before, Max(Larger(m0, m1))), from = now == kNothing ? 0.f : now;
    Real sum0 = Real{}, sum1 = Real{};
    for (int64_t x = 0; x < columns; x += kPanel) {
      const Real a = Exp2(Load(row + x) - from), b = Exp2(Load(row + x + kWide) - from);
      sum0 += a;
      sum1 += b;
      Store(row + x, a);
      Store(row + x + kWide, b);
    }
    if (now != before) {
      const float shrink = std::exp2(before - now);
      total[r] *= shrink;
      top[r] = now;
      CopyScaled(out + r * c.v_dim_p, c.v_dim_p, shrink, out + r * c.v_dim_p);
    }
    total[r] += Sum<float>(sum0 + sum1);
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
    const Lease lease((rows * (c.bk_p + c.dim) + c.bk_p * c.dim + c.bk * c.v_dim_p) * 4);
    float *s = lease.As<float>(), *qs = s + rows * c.bk_p, *kt = qs + rows * c.dim, *vp = kt + c.bk_p * c.dim;
    std::memset(out, 0, rows * c.v_dim_p * 4);
    for (int64_t r = 0; r < rows; r++) {
      const float* from = c.Q(b, r % c.q_len, h0 + r / c.q_len);
      CopyScaled(from, c.dim, c.Units(), qs + r * c.dim);
      top[r] = kNothing;
      total[r] = 0;
    }
    const int64_t count = c.n_tot[list], begin = count * part / parts, end = count * (part + 1) / parts;
    for (int64_t slot = begin; slot < end; slot++) {
      const int64_t j = c.idx[list * c.width + slot], columns = c.Keys(b, j);
      if (columns == 0) continue;
      const int64_t row0 = paged ? pages.typed_data()[b * blocks + j] * c.bk : b * stored + j * c.bk;
      const float* keys = c.k + (row0 * c.kv_heads + kv_h) * c.dim;
      const float* values = c.v + (row0 * c.kv_heads + kv_h) * c.v_dim;
      if (rows >= 4) {
        PackTransposed(keys, c.kv_heads * c.dim, columns, c.dim, 1.f, kt);
        Multiply<false>(rows, RoundUp(columns, kPanel), c.dim, qs, c.dim, Packed(kt, c.dim), s, c.bk_p, false);
      } else {
        for (int64_t x = 0; x < columns; x++) {
          for (int64_t r = 0; r < rows; r++) s[r * c.bk_p + x] = Dot(qs + r * c.dim, keys + x * c.kv_heads * c.dim, c.dim);
        }
      }
      for (int64_t g = 0; g < owned; g++) {
        const int64_t r = g * c.q_len;
        Finish(c, {b, h0 + g, 0, 0, c.q_len, slot, j, 0, columns, c.Partial(list, slot)}, s + r * c.bk_p, c.bk_p, nullptr);
      }
      Soften(c, rows, RoundUp(columns, kPanel), s, top, total, out);
      for (int64_t r = 0; c.threshold && r < rows; r++) {
        const Words line = AllWords(c.Line(b, h0 + r / c.q_len, r % c.q_len));
        for (int64_t x = 0; x < columns; x += kWide) {
          float* w = s + r * c.bk_p + x;
          Store(w, c.Drop(line, Lane() + static_cast<uint32_t>(j * c.bk + x), Load(w)));
        }
      }
      const Panels right = AsPanels(values, c.kv_heads * c.v_dim, columns, c.v_dim, vp);
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
      if (top == kNothing) top = 0;
      for (int64_t part = 0; part < parts; part++) {
        const float* from = first + part * record;
        const float share = std::exp2(from[rows * c.v_dim_p + r] - top);
        total += share * from[rows * (c.v_dim_p + 1) + r];
        for (int64_t d = 0; d < c.v_dim; d++) to[d] += share * from[r * c.v_dim_p + d];
      }
      const bool some = !(total <= 0);
      for (int64_t d = 0; d < c.v_dim; d++) to[d] = some ? to[d] / total : 0.f;
      lse->typed_data()[(b * c.heads + h) * c.q_len + row] = some ? top / kLog2e + std::log(total) : kNothing;
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
