// Block-sparse matrix products for CPUs: handlers for XLA's FFI, float32 and float64.
//
// y = x W and dx = dy W^T are one algorithm: an output block is a sum of products (block of activations) x (stored block), and
// a tile of kRows rows by two vectors of the output stays in registers over the whole sum. Activations are copied once into
// tiles of kRows rows, a cache line of each row after the other, so that a product reads them from addresses that no power of
// two separates. The gradient of a stored block is a product over all rows, from panels of both operands. Work is dealt out to
// XLA's thread pool in even shares of the stored blocks; the order of every sum depends on shapes and lists only, never on
// threads, so results are the same bits in every run.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu.h"

using namespace pallas;

namespace {

constexpr int64_t kLine = 16;           // elements of a row that lie together in a tile
constexpr int64_t kTileBytes = 786432;  // of activations that a task goes through again and again
constexpr int64_t kSlabBytes = 16 << 20;  // of both operands of a gradient, packed at a time
constexpr int64_t kDepth = 128;           // rows that a gradient sums in registers before it is added to memory

// ---- products ------------------------------------------------------------------------------------------------------------

// One term of the sum that makes an output block: a block of activations and the stored block it meets.
template <class T>
struct Term {
  int64_t block;
  const T* stored;
};

// R rows of V vectors of an output block: the sum over its terms. `a` is a tile, `step` elements a block.
template <class T, int R, int V>
void SumTerms(const Term<T>* terms, int64_t count, int64_t depth, const T* a, int64_t step, int64_t column, int64_t ldb, T* c,
              int64_t ldc, int64_t columns) {
  Vec<T> sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sum[r][v] = Vec<T>{};
  }
  for (int64_t t = 0; t < count; t++) {
    const T* row = a + terms[t].block * step;
    const T* b = terms[t].stored + column;
    for (int64_t p0 = 0; p0 < depth; p0 += kLine, row += R * kLine) {
      const int64_t n = std::min(kLine, depth - p0);
      for (int64_t p = 0; p < n; p++, b += ldb) {
        Vec<T> line[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) line[v] = Load(b + v * kLanes<T>);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          const Vec<T> s = All(row[r * kLine + p]);
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) sum[r][v] += s * line[v];
        }
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) Put<T, V>(c + r * ldc, sum[r], columns);
}

// SumTerms and Outer for 1 to kRows rows.
template <class T, int V>
struct Kernels {
  decltype(&SumTerms<T, 1, V>) sum[kRows];
  decltype(&Outer<T, 1, V>) outer[kRows];
  template <int... R>
  explicit Kernels(std::integer_sequence<int, R...>) : sum{SumTerms<T, R + 1, V>...}, outer{Outer<T, R + 1, V>...} {}
  static const Kernels& Get() {
    static const Kernels kernels{std::make_integer_sequence<int, kRows>()};
    return kernels;
  }
};

// ---- the lists -----------------------------------------------------------------------------------------------------------

using S32 = ffi::Buffer<ffi::S32>;

struct Lists {
  const int32_t *rows, *cols, *ptr, *slot;
  int64_t groups, capacity, kb, nbg;
};

// Terms of all output blocks, one block's after the other's. What lies outside the grid is left out.
template <class T>
struct Terms {
  std::vector<Term<T>> all;
  std::vector<int64_t> start;
};

// For y: terms of column block j are (input block, stored block). For dx: terms of row block i are (output block, stored block).
template <class T>
Terms<T> MakeTerms(const Lists& l, const T* stored, int64_t size, bool transposed) {
  Terms<T> terms;
  const int64_t lines = transposed ? l.kb : l.groups * l.nbg;
  terms.all.reserve(l.groups * l.capacity);
  terms.start.reserve(lines + 1);
  auto add = [&](int64_t g, int64_t line, int64_t per_group) {
    const int32_t* ptr = l.ptr + g * (per_group + 1);
    const int64_t last = std::min<int64_t>(ptr[line + 1], l.capacity);
    for (int64_t at = std::max(ptr[line], 0); at < last; at++) {
      const int64_t slot = l.slot[g * l.capacity + at];
      if (slot < 0 || slot >= l.capacity) continue;
      const int64_t row = l.rows[g * l.capacity + slot], col = l.cols[g * l.capacity + slot];
      if (row < 0 || row >= l.kb || col < 0 || col >= l.nbg) continue;
      terms.all.push_back({transposed ? g * l.nbg + col : row, stored + (g * l.capacity + slot) * size});
    }
  };
  for (int64_t line = 0; line < lines; line++) {
    terms.start.push_back(terms.all.size());
    if (transposed) {
      for (int64_t g = 0; g < l.groups; g++) add(g, line, l.kb);
    } else {
      add(line / l.nbg, line % l.nbg, l.nbg);
    }
  }
  terms.start.push_back(terms.all.size());
  return terms;
}

// ---- y and dx ------------------------------------------------------------------------------------------------------------

// Copies `rows` rows of x into a tile: block after block, in it kLine columns after kLine columns, in those row after row.
template <class T>
void PackTile(const T* x, int64_t ld, int64_t rows, int64_t features, int64_t width, int64_t blocks, T* to) {
  const int64_t padded = RoundUp(width, kLine);
  for (int64_t i = 0; i < blocks; i++) {
    const int64_t here = std::min(width, features - i * width);
    for (int64_t r = 0; r < rows; r++) {
      const T* from = x + r * ld + i * width;
      T* line = to + i * rows * padded + r * kLine;
      int64_t p = 0;
      for (; p + kLine <= here; p += kLine, line += rows * kLine) {
        for (int64_t e = 0; e < kLine; e += kLanes<T>) Store(line + e, Load(from + p + e));
      }
      for (; p < padded; p += kLine, line += rows * kLine) {
        for (int64_t e = 0; e < kLine; e++) line[e] = p + e < here ? from[p + e] : T(0);
      }
    }
  }
}

// out[M, features_out] = sums of terms; blocks of activations are `depth` wide, output blocks `width`, rows of stored ones `ldb`.
template <class T>
void Product(ffi::ThreadPool& pool, const Terms<T>& terms, const T* x, int64_t m, int64_t features, int64_t depth, int64_t ldb,
             T* out, int64_t features_out, int64_t width) {
  const int64_t blocks = (features + depth - 1) / depth, lines = terms.start.size() - 1;
  const int64_t row_size = blocks * RoundUp(depth, kLine), threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t chunk = std::max<int64_t>(8 * kRows, kTileBytes / (row_size * static_cast<int64_t>(sizeof(T))));
  const int64_t tiles = (m + kRows - 1) / kRows;
  // As many tasks as threads, or a multiple; by rows first, since those shares are even whatever the lists are.
  int64_t by_rows = std::min(tiles, RoundUp((m + chunk - 1) / chunk, threads)), by_lines = 1;
  if (m < 2 * kRows * threads) by_rows = 1;
  if (by_rows < 2 * threads) by_lines = std::min(lines, (2 * threads + by_rows - 1) / by_rows);
  const int64_t total = terms.all.size() + lines;
  ParallelFor(pool, by_rows * by_lines, [&](int64_t task) {
    const int64_t t0 = Share(tiles, task % by_rows, by_rows), t1 = Share(tiles, task % by_rows + 1, by_rows);
    const int64_t part = task / by_rows;
    // Line j ends where terms and lines before it count start[j] + j: an empty line costs about as much as a term.
    auto border = [&](int64_t share) {
      int64_t low = 0, high = lines;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (terms.start[middle] + middle < share) low = middle + 1; else high = middle;
      }
      return low;
    };
    const int64_t j0 = border(Share(total, part, by_lines)), j1 = border(Share(total, part + 1, by_lines));
    if (j0 == j1 || t0 == t1) return;
    const int64_t first = Share(m, t0, tiles);
    Lease lease((Share(m, t1, tiles) - first) * row_size * sizeof(T));
    T* packed = lease.As<T>();
    for (int64_t t = t0; t < t1; t++) {
      const int64_t row = Share(m, t, tiles), rows = Share(m, t + 1, tiles) - row;
      PackTile(x + row * features, features, rows, features, depth, blocks, packed + (row - first) * row_size);
    }
    for (int64_t j = j0; j < j1; j++) {
      const Term<T>* mine = terms.all.data() + terms.start[j];
      const int64_t count = terms.start[j + 1] - terms.start[j], columns = std::min(width, features_out - j * width);
      for (int64_t t = t0; t < t1; t++) {
        const int64_t row = Share(m, t, tiles), rows = Share(m, t + 1, tiles) - row;
        const T* a = packed + (row - first) * row_size;
        T* c = out + row * features_out + j * width;
        if (count == 0) {
          for (int64_t r = 0; r < rows; r++) std::memset(c + r * features_out, 0, columns * sizeof(T));
          continue;
        }
        const int64_t step = rows * RoundUp(depth, kLine);
        for (int64_t at = 0; at < columns;) {
          const bool wide = columns - at > kLanes<T>;
          auto* kernel = wide ? Kernels<T, 2>::Get().sum[rows - 1] : Kernels<T, 1>::Get().sum[rows - 1];
          kernel(mine, count, depth, a, step, at, ldb, c + at, features_out, columns - at);
          at += (wide ? 2 : 1) * kLanes<T>;
        }
      }
    }
  });
}

Lists MakeLists(const S32& rows, const S32& cols, const S32& ptr, const S32& slot, int64_t kb, int64_t nbg) {
  auto d = rows.dimensions();
  return {rows.typed_data(), cols.typed_data(), ptr.typed_data(), slot.typed_data(), d[0], d[1], kb, nbg};
}

template <ffi::DataType kType>
ffi::Error Forward(ffi::ThreadPool pool, int64_t kb, int64_t nb, ffi::Buffer<kType> x, ffi::Buffer<kType> values, S32 rows,
                   S32 cols, S32 ptr, S32 slot, ffi::ResultBuffer<kType> y) {
  using T = ffi::NativeType<kType>;
  auto vd = values.dimensions(), xd = x.dimensions(), yd = y->dimensions();
  const int64_t bk = vd[2], bn = vd[3], slots = vd[0] * vd[1], bn_p = RoundUp(bn, kLanes<T>);
  const Lists lists = MakeLists(rows, cols, ptr, slot, kb, nb / vd[0]);
  const T* stored = values.typed_data();
  Lease lease(bn_p == bn ? 0 : slots * bk * bn_p * sizeof(T));
  if (bn_p != bn) {
    // Vectors are loaded whole: rows of stored blocks must not end inside one.
    T* wide = lease.As<T>();
    ParallelFor(pool, slots, [&](int64_t s) {
      for (int64_t p = 0; p < bk; p++) {
        T* line = wide + (s * bk + p) * bn_p;
        std::memcpy(line, stored + (s * bk + p) * bn, bn * sizeof(T));
        std::memset(line + bn, 0, (bn_p - bn) * sizeof(T));
      }
    });
    stored = wide;
  }
  const Terms<T> terms = MakeTerms(lists, stored, bk * bn_p, false);
  Product(pool, terms, x.typed_data(), xd[0], xd[1], bk, bn_p, y->typed_data(), yd[1], bn);
  return ffi::Error::Success();
}

template <ffi::DataType kType>
ffi::Error InputGradient(ffi::ThreadPool pool, int64_t kb, int64_t nb, ffi::Buffer<kType> dy, ffi::Buffer<kType> values, S32 rows,
                         S32 cols, S32 ptr, S32 slot, ffi::ResultBuffer<kType> dx) {
  using T = ffi::NativeType<kType>;
  auto vd = values.dimensions(), yd = dy.dimensions(), xd = dx->dimensions();
  const int64_t bk = vd[2], bn = vd[3], slots = vd[0] * vd[1], bk_p = RoundUp(bk, kLanes<T>);
  const Lists lists = MakeLists(rows, cols, ptr, slot, kb, nb / vd[0]);
  Lease lease(slots * bn * bk_p * sizeof(T));
  T* turned = lease.As<T>();
  const int64_t tasks = std::min<int64_t>(slots, 8 * pool.num_threads());
  ParallelFor(pool, tasks, [&](int64_t task) {
    for (int64_t s = Share(slots, task, tasks); s < Share(slots, task + 1, tasks); s++) {
      if (rows.typed_data()[s] >= kb) continue;
      const T* from = values.typed_data() + s * bk * bn;
      T* to = turned + s * bn * bk_p;
      // Squares of kLine x kLine, so that lines of both stay in the first-level cache.
      for (int64_t c0 = 0; c0 < bn; c0 += kLine) {
        const int64_t c1 = std::min(bn, c0 + kLine);
        for (int64_t p0 = 0; p0 < bk_p; p0 += kLine) {
          const int64_t p1 = std::min(bk_p, p0 + kLine);
          for (int64_t c = c0; c < c1; c++) {
            for (int64_t p = p0; p < p1; p++) to[c * bk_p + p] = p < bk ? from[p * bn + c] : T(0);
          }
        }
      }
    }
  });
  const Terms<T> terms = MakeTerms(lists, turned, bn * bk_p, true);
  Product(pool, terms, dy.typed_data(), yd[0], yd[1], bn, bk_p, dx->typed_data(), xd[1], bk);
  return ffi::Error::Success();
}

// ---- gradients of stored blocks ------------------------------------------------------------------------------------------

// Copies the first `columns` columns of rows of x into lines of `width`, with zeros behind.
template <class T>
void CopyLines(const T* x, int64_t ld, int64_t rows, int64_t columns, int64_t width, T* to) {
  for (int64_t r = 0; r < rows; r++, x += ld, to += width) {
    std::memcpy(to, x, columns * sizeof(T));
    std::memset(to + columns, 0, (width - columns) * sizeof(T));
  }
}

template <ffi::DataType kType>
ffi::Error BlockGradients(ffi::ThreadPool pool, int64_t kb, int64_t nb, ffi::Buffer<kType> x, ffi::Buffer<kType> dy, S32 rows,
                          S32 cols, S32 ptr, S32 slot, ffi::ResultBuffer<kType> dvalues) {
  using T = ffi::NativeType<kType>;
  auto vd = dvalues->dimensions(), xd = x.dimensions(), yd = dy.dimensions();
  const int64_t m = xd[0], inputs = xd[1], outputs = yd[1], groups = vd[0], capacity = vd[1], bk = vd[2], bn = vd[3];
  const int64_t slots = groups * capacity, nbg = nb / groups;
  const int32_t *row = rows.typed_data(), *col = cols.typed_data();
  std::vector<int64_t> used;
  for (int64_t at = 0; at < slots; at++) {
    const int64_t s = at / capacity * capacity + slot.typed_data()[at];
    if (row[s] >= 0 && row[s] < kb && col[s] >= 0 && col[s] < nbg) {
      used.push_back(s);
    } else {
      std::memset(dvalues->typed_data() + s * bk * bn, 0, bk * bn * sizeof(T));
    }
  }
  const int64_t width = bn > kLanes<T> ? 2 * kLanes<T> : kLanes<T>, panels = (bn + width - 1) / width;
  const int64_t row_bytes = (kb * bk + nb * panels * width) * sizeof(T);
  const int64_t slab = std::min(m, std::max<int64_t>(kDepth, kSlabBytes / row_bytes / kDepth * kDepth));
  Lease lease(slab * row_bytes);
  T* xp = lease.As<T>();
  T* yp = xp + slab * kb * bk;
  const int64_t tiles = (bk + kRows - 1) / kRows, units = used.size() * panels;
  const int64_t tasks = std::min<int64_t>(units, 16 * pool.num_threads());
  for (int64_t m0 = 0; m0 < m && units; m0 += slab) {
    const int64_t here = std::min(slab, m - m0), parts = std::min<int64_t>((here + 15) / 16, 4 * pool.num_threads());
    ParallelFor(pool, parts, [&](int64_t part) {
      const int64_t r0 = Share(here, part, parts), n = Share(here, part + 1, parts) - r0;
      const T *from_x = x.typed_data() + (m0 + r0) * inputs, *from_y = dy.typed_data() + (m0 + r0) * outputs;
      for (int64_t i = 0; i < kb; i++) {
        CopyLines(from_x + i * bk, inputs, n, std::min(bk, inputs - i * bk), bk, xp + (i * here + r0) * bk);
      }
      for (int64_t j = 0; j < nb; j++) {
        for (int64_t q = 0; q < panels; q++) {
          const int64_t columns = std::min({width, bn - q * width, outputs - j * bn - q * width});
          CopyLines(from_y + j * bn + q * width, outputs, n, std::max<int64_t>(columns, 0), width,
                    yp + ((j * panels + q) * here + r0) * width);
        }
      }
    });
    ParallelFor(pool, tasks, [&](int64_t task) {
      for (int64_t unit = Share(units, task, tasks); unit < Share(units, task + 1, tasks); unit++) {
        const int64_t s = used[unit / panels], q = unit % panels, j = s / capacity * nbg + col[s];
        const T *a = xp + row[s] * here * bk, *b = yp + (j * panels + q) * here * width;
        T* c = dvalues->typed_data() + s * bk * bn + q * width;
        const int64_t columns = std::min(width, bn - q * width);
        const bool wide = columns > kLanes<T>;
        for (int64_t p = 0; p < here; p += kDepth) {
          const int64_t depth = std::min(kDepth, here - p);
          for (int64_t t = 0; t < tiles; t++) {
            const int64_t r0 = Share(bk, t, tiles), n = Share(bk, t + 1, tiles) - r0;
            auto* kernel = wide ? Kernels<T, 2>::Get().outer[n - 1] : Kernels<T, 1>::Get().outer[n - 1];
            kernel(depth, a + p * bk + r0, bk, b + p * width, width, c + r0 * bn, bn, columns, m0 + p > 0);
          }
        }
      }
    });
  }
  return ffi::Error::Success();
}

}  // namespace

#define BSMM_BINDING(type)                   \
  ffi::Ffi::Bind()                           \
      .Ctx<ffi::ThreadPool>()                \
      .Attr<int64_t>("kb")                   \
      .Attr<int64_t>("nb")                   \
      .Arg<ffi::Buffer<type>>()              \
      .Arg<ffi::Buffer<type>>()              \
      .Arg<S32>()                            \
      .Arg<S32>()                            \
      .Arg<S32>()                            \
      .Arg<S32>()                            \
      .Ret<ffi::Buffer<type>>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(bsmm_forward_f32, Forward<ffi::F32>, BSMM_BINDING(ffi::F32));
XLA_FFI_DEFINE_HANDLER_SYMBOL(bsmm_forward_f64, Forward<ffi::F64>, BSMM_BINDING(ffi::F64));
XLA_FFI_DEFINE_HANDLER_SYMBOL(bsmm_dx_f32, InputGradient<ffi::F32>, BSMM_BINDING(ffi::F32));
XLA_FFI_DEFINE_HANDLER_SYMBOL(bsmm_dx_f64, InputGradient<ffi::F64>, BSMM_BINDING(ffi::F64));
XLA_FFI_DEFINE_HANDLER_SYMBOL(bsmm_dvalues_f32, BlockGradients<ffi::F32>, BSMM_BINDING(ffi::F32));
XLA_FFI_DEFINE_HANDLER_SYMBOL(bsmm_dvalues_f64, BlockGradients<ffi::F64>, BSMM_BINDING(ffi::F64));
