// Products with N:M matrices whose pattern groups of columns share, for CPUs: handlers for XLA's FFI, float32 and float64.
//
// y: a tile of kRows rows by two vectors of columns stays in registers, and each stored row meets the one feature of x that it
// belongs to, so nothing is gathered. dx: features and columns change places and vectors lie along the rows of x, so that sums
// go to whole lines of memory wherever the features are. Gradients of values: sums along the rows of x, four features by six
// columns at a time. Work is dealt out to XLA's thread pool by rows, or by values; the order of every sum depends on shapes
// only, never on threads, so results are the same bits in every run.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu.h"

using namespace pallas;

namespace {

constexpr int64_t kLine = 16;             // features of a row that lie together in a tile
constexpr int64_t kTileBytes = 786432;    // of x that a task goes through again and again
constexpr int64_t kSlab = 1024;           // rows that gradients of values sum at a time
constexpr int64_t kChunk = 64;            // features whose rows a task goes through again and again
constexpr int kFeatures = 4, kColumns = 6;  // of a tile of such gradients

using S32 = ffi::Buffer<ffi::S32>;

// R rows of V vectors of y: a sum over stored rows b, `depth` of them `ldb` apart, with features `index` of the tile `a`.
template <class T, int R, int V>
void SumStored(const int32_t* index, int64_t depth, const T* a, const T* b, int64_t ldb, T* c, int64_t ldc) {
  Vec<T> sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sum[r][v] = Vec<T>{};
  }
  for (int64_t p = 0; p < depth; p++, b += ldb) {
    const T* row = a + index[p] / kLine * (R * kLine) + index[p] % kLine;
    Vec<T> line[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) line[v] = Load(b + v * kLanes<T>);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const Vec<T> s = All(row[r * kLine]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sum[r][v] += s * line[v];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) Store(c + r * ldc + v * kLanes<T>, sum[r][v]);
  }
}

// R features of dx^T, two vectors of rows wide, += stored rows times dy^T; feature r is line index[r] of `to`.
template <class T, int R>
void SumColumns(const int32_t* index, int64_t depth, const T* stored, int64_t lda, const T* dyt, T* to) {
  constexpr int64_t kWide = 2 * kLanes<T>;
  Vec<T> sum[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    sum[r][0] = Load(to + index[r] * kWide);
    sum[r][1] = Load(to + index[r] * kWide + kLanes<T>);
  }
  for (int64_t p = 0; p < depth; p++, dyt += kWide) {
    const Vec<T> b0 = Load(dyt), b1 = Load(dyt + kLanes<T>);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const Vec<T> s = All(stored[r * lda + p]);
      sum[r][0] += s * b0;
      sum[r][1] += s * b1;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    Store(to + index[r] * kWide, sum[r][0]);
    Store(to + index[r] * kWide + kLanes<T>, sum[r][1]);
  }
}

// A features by B columns of the gradient: sums over `depth` rows, which are padded with zeros to whole vectors.
template <class T, int A, int B>
void SumRows(const int32_t* index, int64_t depth, const T* xt, const T* dyt, int64_t ld, T* to, int64_t ldc, bool add) {
  Vec<T> sum[A][B];
#pragma GCC unroll 4
  for (int i = 0; i < A; i++) {
#pragma GCC unroll 6
    for (int j = 0; j < B; j++) sum[i][j] = Vec<T>{};
  }
  const T* lines[A];
  for (int i = 0; i < A; i++) lines[i] = xt + index[i] * ld;
  for (int64_t p = 0; p < depth; p += kLanes<T>) {
    Vec<T> left[A];
#pragma GCC unroll 4
    for (int i = 0; i < A; i++) left[i] = Load(lines[i] + p);
#pragma GCC unroll 6
    for (int j = 0; j < B; j++) {
      const Vec<T> right = Load(dyt + j * ld + p);
#pragma GCC unroll 4
      for (int i = 0; i < A; i++) sum[i][j] += left[i] * right;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < A; i++) {
#pragma GCC unroll 6
    for (int j = 0; j < B; j++) {
      const T total = Sum<T>(sum[i][j]);
      to[i * ldc + j] = add ? to[i * ldc + j] + total : total;
    }
  }
}

// The functions above for 1 to kRows rows or features.
template <class T>
struct Kernels {
  decltype(&SumStored<T, 1, 1>) narrow[kRows], wide[kRows];
  decltype(&SumColumns<T, 1>) columns[kRows];
  template <int... R>
  explicit Kernels(std::integer_sequence<int, R...>)
      : narrow{SumStored<T, R + 1, 1>...}, wide{SumStored<T, R + 1, 2>...}, columns{SumColumns<T, R + 1>...} {}
  static const Kernels& Get() {
    static const Kernels kernels{std::make_integer_sequence<int, kRows>()};
    return kernels;
  }
};

// Copies the transpose of rows of x into lines `ld` apart, one for each feature, `width` long with zeros behind the last row.
template <class T>
void Transpose(const T* x, int64_t features, int64_t rows, int64_t width, T* to, int64_t ld) {
  for (int64_t f0 = 0; f0 < features; f0 += kLine) {
    const int64_t f1 = std::min(features, f0 + kLine);
    for (int64_t r = 0; r < width; r++) {
      for (int64_t f = f0; f < f1; f++) to[f * ld + r] = r < rows ? x[r * features + f] : T(0);
    }
  }
}

// Stored values [depth, outputs] as panels of `share` columns, [outputs / share][depth][share]; features as [panel][depth].
template <class T>
struct Stored {
  Lease values, features;
  int64_t depth, panels, share;
  Stored(ffi::ThreadPool& pool, const T* from, const int32_t* index, int64_t depth, int64_t panels, int64_t share)
      : values(depth * panels * share * sizeof(T)), features(depth * panels * 4), depth(depth), panels(panels), share(share) {
    // Some rows at a time: each is read from its beginning to its end, and panels are written in lines that lie together.
    ParallelFor(pool, (depth + kLine - 1) / kLine, [&](int64_t part) {
      const int64_t p0 = part * kLine, p1 = std::min(depth, p0 + kLine);
      for (int64_t j = 0; j < panels; j++) {
        for (int64_t p = p0; p < p1; p++) {
          std::memcpy(values.As<T>() + (j * depth + p) * share, from + (p * panels + j) * share, share * sizeof(T));
          features.As<int32_t>()[j * depth + p] = index[p * panels + j];
        }
      }
    });
  }
  const T* Values(int64_t j) const { return values.As<T>() + j * depth * share; }
  const int32_t* Features(int64_t j) const { return features.As<int32_t>() + j * depth; }
};

template <ffi::DataType kType>
ffi::Error Forward(ffi::ThreadPool pool, ffi::Buffer<kType> x, ffi::Buffer<kType> values, S32 index, ffi::ResultBuffer<kType> y) {
  using T = ffi::NativeType<kType>;
  auto xd = x.dimensions(), id = index.dimensions(), vd = values.dimensions();
  const int64_t m = xd[0], inputs = xd[1], outputs = vd[1], lined = RoundUp(inputs, kLine);
  const Stored<T> stored(pool, values.typed_data(), index.typed_data(), id[0], id[1], outputs / id[1]);
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1), tiles = (m + kRows - 1) / kRows;
  const int64_t chunk = std::max<int64_t>(4 * kRows, kTileBytes / (lined * static_cast<int64_t>(sizeof(T))));
  // By rows as far as they go, then by columns.
  const int64_t by_rows = m < 2 * kRows * threads ? 1 : std::min(tiles, RoundUp((m + chunk - 1) / chunk, threads));
  const int64_t by_panels = by_rows < 2 * threads ? std::min(stored.panels, (2 * threads + by_rows - 1) / by_rows) : 1;
  ParallelFor(pool, by_rows * by_panels, [&](int64_t task) {
    const int64_t t0 = Share(tiles, task % by_rows, by_rows), t1 = Share(tiles, task % by_rows + 1, by_rows);
    const int64_t part = task / by_rows, first = Share(m, t0, tiles);
    Lease lease((Share(m, t1, tiles) - first) * lined * sizeof(T));
    T* packed = lease.As<T>();
    for (int64_t t = t0; t < t1; t++) {
      const int64_t row = Share(m, t, tiles), rows = Share(m, t + 1, tiles) - row;
      for (int64_t r = 0; r < rows; r++) {
        const T* from = x.typed_data() + (row + r) * inputs;
        T* line = packed + (row - first) * lined + r * kLine;
        for (int64_t f = 0; f < inputs; f += kLine, line += rows * kLine) {
          std::memcpy(line, from + f, std::min(kLine, inputs - f) * sizeof(T));
        }
      }
    }
    for (int64_t j = Share(stored.panels, part, by_panels); j < Share(stored.panels, part + 1, by_panels); j++) {
      for (int64_t t = t0; t < t1; t++) {
        const int64_t row = Share(m, t, tiles), rows = Share(m, t + 1, tiles) - row;
        const T* a = packed + (row - first) * lined;
        T* c = y->typed_data() + row * outputs + j * stored.share;
        for (int64_t at = 0; at < stored.share;) {
          const bool wide = stored.share - at >= 2 * kLanes<T>;
          auto* kernel = wide ? Kernels<T>::Get().wide[rows - 1] : Kernels<T>::Get().narrow[rows - 1];
          kernel(stored.Features(j), stored.depth, a, stored.Values(j) + at, stored.share, c + at, outputs);
          at += (wide ? 2 : 1) * kLanes<T>;
        }
      }
    }
  });
  return ffi::Error::Success();
}

template <ffi::DataType kType>
ffi::Error InputGradient(ffi::ThreadPool pool, ffi::Buffer<kType> dy, ffi::Buffer<kType> values, S32 index,
                         ffi::ResultBuffer<kType> dx) {
  using T = ffi::NativeType<kType>;
  constexpr int64_t kWide = 2 * kLanes<T>;
  auto xd = dx->dimensions(), id = index.dimensions(), vd = values.dimensions();
  const int64_t m = xd[0], inputs = xd[1], outputs = vd[1];
  const Stored<T> stored(pool, values.typed_data(), index.typed_data(), id[0], id[1], outputs / id[1]);
  // Tasks of some stripes of kWide rows, so that stored values are fetched once for all of them.
  const int64_t stripes = (m + kWide - 1) / kWide, threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t fit = std::max<int64_t>(1, kTileBytes / ((inputs + outputs) * kWide * static_cast<int64_t>(sizeof(T))));
  const int64_t tasks = std::min(stripes, RoundUp((stripes + fit - 1) / fit, threads));
  ParallelFor(pool, tasks, [&](int64_t task) {
    const int64_t s0 = Share(stripes, task, tasks), s1 = Share(stripes, task + 1, tasks);
    Lease lease((s1 - s0) * (inputs + outputs) * kWide * sizeof(T));
    T* dyt = lease.As<T>();
    T* dxt = dyt + (s1 - s0) * outputs * kWide;
    for (int64_t s = s0; s < s1; s++) {
      Transpose(dy.typed_data() + s * kWide * outputs, outputs, std::min(kWide, m - s * kWide), kWide,
                dyt + (s - s0) * outputs * kWide, kWide);
    }
    std::memset(dxt, 0, (s1 - s0) * inputs * kWide * sizeof(T));
    const int64_t groups = (stored.depth + kRows - 1) / kRows;
    for (int64_t j = 0; j < stored.panels; j++) {
      for (int64_t s = 0; s < s1 - s0; s++) {
        for (int64_t g = 0; g < groups; g++) {
          const int64_t p = Share(stored.depth, g, groups), n = Share(stored.depth, g + 1, groups) - p;
          Kernels<T>::Get().columns[n - 1](stored.Features(j) + p, stored.share, stored.Values(j) + p * stored.share,
                                           stored.share, dyt + (s * outputs + j * stored.share) * kWide,
                                           dxt + s * inputs * kWide);
        }
      }
    }
    for (int64_t s = s0; s < s1; s++) {
      const T* from = dxt + (s - s0) * inputs * kWide;
      const int64_t rows = std::min(kWide, m - s * kWide);
      for (int64_t f0 = 0; f0 < inputs; f0 += kLine) {
        const int64_t f1 = std::min(inputs, f0 + kLine);
        for (int64_t r = 0; r < rows; r++) {
          T* to = dx->typed_data() + (s * kWide + r) * inputs;
          for (int64_t f = f0; f < f1; f++) to[f] = from[f * kWide + r];
        }
      }
    }
  });
  return ffi::Error::Success();
}

// B columns of the gradient for some features.
template <class T, int B>
void SumRowsOf(int64_t features, const int32_t* index, int64_t depth, const T* xt, const T* dyt, int64_t ld, T* to, int64_t ldc,
               bool add) {
  int64_t p = 0;
  for (; p + kFeatures <= features; p += kFeatures) {
    SumRows<T, kFeatures, B>(index + p, depth, xt, dyt, ld, to + p * ldc, ldc, add);
  }
  for (; p < features; p++) SumRows<T, 1, B>(index + p, depth, xt, dyt, ld, to + p * ldc, ldc, add);
}

template <ffi::DataType kType>
ffi::Error ValueGradients(ffi::ThreadPool pool, ffi::Buffer<kType> x, ffi::Buffer<kType> dy, S32 index,
                          ffi::ResultBuffer<kType> dvalues) {
  using T = ffi::NativeType<kType>;
  auto xd = x.dimensions(), id = index.dimensions();
  const int64_t m = xd[0], inputs = xd[1], outputs = dy.dimensions()[1], depth = id[0], panels = id[1], share = outputs / panels;
  std::vector<int32_t> features(depth * panels);
  for (int64_t p = 0; p < depth; p++) {
    for (int64_t j = 0; j < panels; j++) features[j * depth + p] = index.typed_data()[p * panels + j];
  }
  // One vector more than rows, so that neighbouring lines do not meet in the same place of the cache.
  const int64_t slab = RoundUp(std::min(m, kSlab), kLanes<T>), ld = slab + kLanes<T>;
  Lease lease((inputs + outputs) * ld * sizeof(T));
  T* xt = lease.As<T>();
  T* dyt = xt + inputs * ld;
  constexpr int64_t kPart = 2 * kLanes<T>;
  const int64_t groups = (depth + kChunk - 1) / kChunk;
  for (int64_t m0 = 0; m0 < m; m0 += slab) {
    const int64_t here = std::min(slab, m - m0);
    ParallelFor(pool, (slab + kPart - 1) / kPart, [&](int64_t part) {
      const int64_t r = part * kPart, rows = std::clamp<int64_t>(here - r, 0, kPart), width = std::min(kPart, slab - r);
      Transpose(x.typed_data() + (m0 + r) * inputs, inputs, rows, width, xt + r, ld);
      Transpose(dy.typed_data() + (m0 + r) * outputs, outputs, rows, width, dyt + r, ld);
    });
    ParallelFor(pool, panels * groups, [&](int64_t task) {
      const int64_t j = task / groups, g = task % groups;
      const int64_t p = Share(depth, g, groups), n = Share(depth, g + 1, groups) - p;
      const int32_t* mine = features.data() + j * depth + p;
      const T* columns = dyt + j * share * ld;
      T* to = dvalues->typed_data() + p * outputs + j * share;
      int64_t c = 0;
      for (; c + kColumns <= share; c += kColumns) {
        SumRowsOf<T, kColumns>(n, mine, slab, xt, columns + c * ld, ld, to + c, outputs, m0 > 0);
      }
      for (; c + 2 <= share; c += 2) SumRowsOf<T, 2>(n, mine, slab, xt, columns + c * ld, ld, to + c, outputs, m0 > 0);
    });
  }
  return ffi::Error::Success();
}

}  // namespace

#define NM_BINDING(type) \
  ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<type>>().Arg<ffi::Buffer<type>>().Arg<S32>().Ret<ffi::Buffer<type>>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(nm_forward_f32, Forward<ffi::F32>, NM_BINDING(ffi::F32));
XLA_FFI_DEFINE_HANDLER_SYMBOL(nm_forward_f64, Forward<ffi::F64>, NM_BINDING(ffi::F64));
XLA_FFI_DEFINE_HANDLER_SYMBOL(nm_dx_f32, InputGradient<ffi::F32>, NM_BINDING(ffi::F32));
XLA_FFI_DEFINE_HANDLER_SYMBOL(nm_dx_f64, InputGradient<ffi::F64>, NM_BINDING(ffi::F64));
XLA_FFI_DEFINE_HANDLER_SYMBOL(nm_dvalues_f32, ValueGradients<ffi::F32>, NM_BINDING(ffi::F32));
XLA_FFI_DEFINE_HANDLER_SYMBOL(nm_dvalues_f64, ValueGradients<ffi::F64>, NM_BINDING(ffi::F64));
