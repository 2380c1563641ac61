// Convolution over rows for CPUs: handlers for XLA's FFI, float32 and float64, and one that finds neighbours.
//
// A product goes through blocks of output rows and, in each, through the taps: the pairs of a tap are collected from its row
// of the table of neighbours, and tiles of kRows input rows, read where they lie, are multiplied by two vectors of weights and
// added to their output rows, which stay in the cache. Where nearly all neighbours are there, a tile of output rows stays in
// registers over all taps. Nothing else writes these rows, so nothing is scattered between threads, and every sum runs in the
// order of taps. The derivative by the input is the same product with the other table. The one by the weights sums parts of the
// rows apart, whose number depends on shapes only, and adds them up in order; neighbouring rows are read where they lie.
// So results are the same bits in every run, on any number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu.h"

using namespace pallas;

namespace {

constexpr int64_t kBlock = 512;  // rows whose pairs are collected at a time
constexpr int64_t kDepth = 128;  // pairs that a gradient copies and sums in registers before it is added to memory
constexpr int64_t kRun = 32;     // pairs of neighbouring rows from which on a gradient reads them where they lie
constexpr int64_t kParts = 16;   // of the rows, that a gradient sums apart
constexpr int64_t kPart = 1024;  // rows whose neighbours are found at a time

using S32 = ffi::Buffer<ffi::S32>;

// The pairs of one tap among some output rows. What lies outside the input is left out.
struct Pairs {
  int32_t source[kBlock], target[kBlock], order[kBlock];
  int64_t count = 0, rows = 0;
  void Add(int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++) order[rows++] = o;
  }
  void Collect(const int32_t* table, uint32_t inputs) {
    int64_t n = 0;
    for (int64_t i = 0; i < rows; i++) {
      source[n] = table[order[i]];
      target[n] = order[i];
      n += static_cast<uint32_t>(source[n]) < inputs;
    }
    count = n;
  }
  // How many pairs from `begin` on are of neighbouring rows on both sides.
  int64_t Run(int64_t begin) const {
    int64_t end = begin + 1;
    while (end < count && source[end] == source[end - 1] + 1 && target[end] == target[end - 1] + 1) end++;
    return end - begin;
  }
};

// Sizes of a grouped convolution, and how its outputs are cut into panels of one or two vectors that lie in one group.
template <class T>
struct Sizes {
  int64_t taps, groups, in, out, width, panels, inputs, outputs;
  Sizes(int64_t taps, int64_t in, int64_t outputs, int64_t groups)
      : taps(taps),
        groups(groups),
        in(in),
        out(outputs / groups),
        width(out > kLanes<T> ? 2 * kLanes<T> : kLanes<T>),
        panels((out + width - 1) / width),
        inputs(in * groups),
        outputs(outputs) {}
  bool Depthwise() const { return in == 1 && out == 1; }
  int64_t All() const { return groups * panels; }
  int64_t Column(int64_t panel) const { return panel / panels * out + panel % panels * width; }
  int64_t Columns(int64_t panel) const { return std::min(width, out - panel % panels * width); }
};

// R pairs: rows of x times a panel of weights, added to rows of y.
template <class T, int R, int V>
void Rows(const int32_t* source, const int32_t* target, const T* x, int64_t ldx, const T* w, int64_t ldw, int64_t depth, T* y,
          int64_t ldy, int64_t columns) {
  const T* row[R];
  Vec<T> sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    row[r] = x + source[r] * ldx;
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sum[r][v] = Vec<T>{};
  }
  for (int64_t p = 0; p < depth; p++, w += ldw) {
    Vec<T> line[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) line[v] = Load(w + v * kLanes<T>);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const Vec<T> s = All(row[r][p]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sum[r][v] += s * line[v];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    T* c = y + target[r] * ldy;
    AddStored<T, V>(c, sum[r], columns);
    Put<T, V>(c, sum[r], columns);
  }
}

// R neighbouring rows of y from all taps at once; where there is no neighbour, from a row of zeros.
template <class T, int R, int V>
void Whole(const int32_t* table, int64_t step, int64_t taps, const T* x, int64_t ldx, uint32_t rows, const T* zeros, const T* w,
           int64_t tap_size, int64_t ldw, int64_t depth, T* y, int64_t ldy, int64_t columns) {
  Vec<T> sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sum[r][v] = Vec<T>{};
  }
  for (int64_t tap = 0; tap < taps; tap++, table += step) {
    const T* row[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) row[r] = static_cast<uint32_t>(table[r]) < rows ? x + table[r] * ldx : zeros;
    const T* b = w + tap * tap_size;
    for (int64_t p = 0; p < depth; p++, b += ldw) {
      Vec<T> line[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) line[v] = Load(b + v * kLanes<T>);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const Vec<T> s = All(row[r][p]);
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) sum[r][v] += s * line[v];
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) Put<T, V>(y + r * ldy, sum[r], columns);
}

template <class T>
inline void Copy(const T* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) Store(to + i, Load(from + i));
  for (; i < n; i++) to[i] = from[i];
}

// The functions for 1 to kRows rows.
template <class T, int V>
struct Kernels {
  decltype(&Rows<T, 1, V>) rows[kRows];
  decltype(&Whole<T, 1, V>) whole[kRows];
  decltype(&Outer<T, 1, V>) outer[kRows];
  template <int... R>
  explicit Kernels(std::integer_sequence<int, R...>)
      : rows{Rows<T, R + 1, V>...}, whole{Whole<T, R + 1, V>...}, outer{Outer<T, R + 1, V>...} {}
  static const Kernels& Get() {
    static const Kernels kernels{std::make_integer_sequence<int, kRows>()};
    return kernels;
  }
};

// Copies (taps, in, outputs) to (taps, panels, in, width), zeros behind the last columns.
template <class T>
void PackWeights(const T* w, const Sizes<T>& s, T* to) {
  for (int64_t tap = 0; tap < s.taps; tap++, w += s.in * s.outputs) {
    for (int64_t panel = 0; panel < s.All(); panel++) {
      const int64_t n = s.Columns(panel);
      for (int64_t p = 0; p < s.in; p++, to += s.width) {
        std::memcpy(to, w + p * s.outputs + s.Column(panel), n * sizeof(T));
        std::memset(to + n, 0, (s.width - n) * sizeof(T));
      }
    }
  }
}

template <ffi::DataType kType>
ffi::Error Forward(ffi::ThreadPool pool, int64_t groups, ffi::Buffer<kType> x, ffi::Buffer<kType> w, S32 table,
                   ffi::ResultBuffer<kType> y) {
  using T = ffi::NativeType<kType>;
  auto xd = x.dimensions(), wd = w.dimensions(), td = table.dimensions();
  const Sizes<T> s(wd[0], wd[1], wd[2], groups);
  const int64_t rows = td[1];
  const int64_t tap_size = s.All() * s.in * s.width;
  Lease lease((s.taps * tap_size + s.in) * sizeof(T));
  T* packed = lease.As<T>();
  T* zeros = packed + s.taps * tap_size;
  std::memset(zeros, 0, s.in * sizeof(T));
  if (!s.Depthwise()) PackWeights(w.typed_data(), s, packed);
  // Few rows are cut finer, so that there is work for all threads.
  const int64_t block = std::clamp<int64_t>(rows / 16, 64, kBlock) / kRows * kRows;
  ParallelFor(pool, (rows + block - 1) / block, [&](int64_t b) {
    const int64_t begin = b * block, end = std::min(rows, begin + block);
    T* out = y->typed_data();
    auto clear = [&](int64_t from, int64_t to) { std::memset(out + from * s.outputs, 0, (to - from) * s.outputs * sizeof(T)); };
    Pairs pairs;
    int32_t found[kBlock] = {};
    for (int64_t tap = 0; tap < s.taps && !s.Depthwise(); tap++) {
      const int32_t* row = table.typed_data() + tap * rows + begin;
      for (int64_t i = 0; i < end - begin; i++) found[i] += static_cast<uint32_t>(row[i]) < static_cast<uint32_t>(xd[0]);
    }
    if (s.Depthwise()) {
      clear(begin, end);
      pairs.Add(begin, end);
    }
    for (int64_t first = 0; first < end - begin && !s.Depthwise(); first += kRows) {
      // Where nearly all neighbours are there, a tile is computed as a whole. Empty rows do not count, so that a larger
      // capacity changes nothing.
      const int64_t n = std::min<int64_t>(kRows, end - begin - first);
      int64_t present = 0, filled = 0;
      for (int64_t i = first; i < first + n; i++) {
        present += found[i];
        filled += found[i] > 0;
      }
      if (!filled || present * 8 < 7 * s.taps * filled) {
        clear(begin + first, begin + first + n);
        if (filled) pairs.Add(begin + first, begin + first + n);
        continue;
      }
      for (int64_t panel = 0; panel < s.All(); panel++) {
        const int64_t columns = s.Columns(panel);
        auto* kernel = columns > kLanes<T> ? Kernels<T, 2>::Get().whole[n - 1] : Kernels<T, 1>::Get().whole[n - 1];
        kernel(table.typed_data() + begin + first, rows, s.taps, x.typed_data() + panel / s.panels * s.in, s.inputs, xd[0], zeros,
               packed + panel * s.in * s.width, tap_size, s.width, s.in, out + (begin + first) * s.outputs + s.Column(panel),
               s.outputs, columns);
      }
    }
    for (int64_t tap = 0; tap < s.taps && pairs.rows; tap++) {
      pairs.Collect(table.typed_data() + tap * rows, xd[0]);
      if (s.Depthwise()) {
        const T* scale = w.typed_data() + tap * s.outputs;
        for (int64_t i = 0; i < pairs.count; i++) {
          const T* from = x.typed_data() + pairs.source[i] * s.inputs;
          T* to = out + pairs.target[i] * s.outputs;
          for (int64_t c = 0; c < s.outputs; c++) to[c] += from[c] * scale[c];
        }
        continue;
      }
      const int64_t tiles = (pairs.count + kRows - 1) / kRows;
      for (int64_t panel = 0; panel < s.All(); panel++) {
        const T* from = x.typed_data() + panel / s.panels * s.in;
        const T* weights = packed + (tap * s.All() + panel) * s.in * s.width;
        T* to = out + s.Column(panel);
        const int64_t columns = s.Columns(panel);
        for (int64_t t = 0; t < tiles; t++) {
          const int64_t first = Share(pairs.count, t, tiles), n = Share(pairs.count, t + 1, tiles) - first;
          auto* kernel = columns > kLanes<T> ? Kernels<T, 2>::Get().rows[n - 1] : Kernels<T, 1>::Get().rows[n - 1];
          kernel(pairs.source + first, pairs.target + first, from, s.inputs, weights, s.width, s.in, to, s.outputs,
                 columns);
        }
      }
    }
  });
  return ffi::Error::Success();
}

// dw (taps, in, outputs) += the sum over pairs of a tap of rows of x times rows of dy.
template <class T>
void AddPairs(const Pairs& pairs, const Sizes<T>& s, const T* x, const T* dy, T* left, T* right, T* dw, bool add) {
  const int64_t tiles = (s.in + kRows - 1) / kRows;
  for (int64_t begin = 0, depth; begin < pairs.count; begin += depth, add = true) {
    const T* a = x + pairs.source[begin] * s.inputs;
    const T* b = dy + pairs.target[begin] * s.outputs;
    // A panel that is not full would be read beyond the end.
    depth = s.out % kLanes<T> ? 0 : pairs.Run(begin);
    if (depth < kRun) {
      depth = std::min(kDepth, pairs.count - begin);
      a = left;
      b = right;
      for (int64_t p = 0; p < depth; p++) {
        Copy(x + pairs.source[begin + p] * s.inputs, s.inputs, left + p * s.inputs);
        Copy(dy + pairs.target[begin + p] * s.outputs, s.outputs, right + p * s.outputs);
      }
    }
    for (int64_t panel = 0; panel < s.All(); panel++) {
      const int64_t columns = s.Columns(panel), column = s.Column(panel);
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t r0 = Share(s.in, t, tiles), n = Share(s.in, t + 1, tiles) - r0;
        auto* kernel = columns > kLanes<T> ? Kernels<T, 2>::Get().outer[n - 1] : Kernels<T, 1>::Get().outer[n - 1];
        kernel(depth, a + panel / s.panels * s.in + r0, s.inputs, b + column, s.outputs, dw + r0 * s.outputs + column, s.outputs,
               columns, add);
      }
    }
  }
}

template <ffi::DataType kType>
ffi::Error WeightGradient(ffi::ThreadPool pool, int64_t groups, ffi::Buffer<kType> x, ffi::Buffer<kType> dy, S32 table,
                          ffi::ResultBuffer<kType> dw) {
  using T = ffi::NativeType<kType>;
  auto xd = x.dimensions(), wd = dw->dimensions(), td = table.dimensions();
  const Sizes<T> s(wd[0], wd[1], wd[2], groups);
  const int64_t rows = td[1], parts = std::clamp<int64_t>(rows / (2 * kBlock), 1, kParts), size = s.in * s.outputs;
  const int64_t scratch = kDepth * (s.inputs + s.outputs) + s.width;
  Lease lease(parts * (s.taps * size + scratch) * sizeof(T));
  T* sums = lease.As<T>();
  std::vector<uint8_t> seen(parts * s.taps);
  ParallelFor(pool, parts, [&](int64_t part) {
    T* left = sums + parts * s.taps * size + part * scratch;
    T* right = left + kDepth * s.inputs;
    const int64_t last = Share(rows, part + 1, parts);
    Pairs pairs;
    for (int64_t begin = Share(rows, part, parts); begin < last; begin += kBlock) {
      pairs.rows = 0;
      pairs.Add(begin, std::min(begin + kBlock, last));
      for (int64_t tap = 0; tap < s.taps; tap++) {
        pairs.Collect(table.typed_data() + tap * rows, xd[0]);
        if (!pairs.count) continue;
        T* to = sums + (part * s.taps + tap) * size;
        uint8_t& add = seen[part * s.taps + tap];
        if (s.Depthwise()) {
          if (!add) std::memset(to, 0, size * sizeof(T));
          for (int64_t i = 0; i < pairs.count; i++) {
            const T* a = x.typed_data() + pairs.source[i] * s.inputs;
            const T* b = dy.typed_data() + pairs.target[i] * s.outputs;
            for (int64_t c = 0; c < s.outputs; c++) to[c] += a[c] * b[c];
          }
        } else {
          AddPairs(pairs, s, x.typed_data(), dy.typed_data(), left, right, to, add);
        }
        add = 1;
      }
    }
  });
  ParallelFor(pool, s.taps, [&](int64_t tap) {
    T* to = dw->typed_data() + tap * size;
    std::memset(to, 0, size * sizeof(T));
    for (int64_t part = 0; part < parts; part++) {
      const T* from = sums + (part * s.taps + tap) * size;
      if (!seen[part * s.taps + tap]) continue;
      for (int64_t i = 0; i < size; i++) to[i] += from[i];
    }
  });
  return ffi::Error::Success();
}

// ---- neighbours ----------------------------------------------------------------------------------------------------------

using Numbers = ffi::Span<const int64_t>;

constexpr int64_t kSpan = 57;          // bits that a load from any byte has behind the first one wanted
constexpr int64_t kWordsPerSite = 16;  // of a grid's bits, up to which these are quicker than walking along the list

// Numbers for places in a grid of sites with margins so wide that no tap leads out of it: a tap moves all sites by one number.
struct Grid {
  int64_t dims, size = 1;
  std::vector<int64_t> low, step;
  // Margins for sites at `coordinate * scale + shift + tap * spread`, where lines of `run` taps are looked at together.
  Grid(Numbers shape, Numbers rows_shape, Numbers window, Numbers scale, Numbers shift, Numbers spread, int64_t run)
      : dims(shape.size()), low(dims, 0), step(dims) {
    for (int64_t d = dims; d-- > 0;) {
      const int64_t together = d + 1 == dims ? run : 1, top = (rows_shape[d] - 1) * scale[d];
      int64_t high = 0;
      for (int64_t t = 0; t < window[d]; t += together) {
        const int64_t first = shift[d] + t * spread[d], last = first + (together - 1) * spread[d];
        if (!Meets(shape[d], top, first, last)) continue;
        low[d] = std::max(low[d], -first);
        high = std::max(high, top + last - (shape[d] - 1));
      }
      step[d] = size;
      size *= low[d] + shape[d] + high;
    }
  }
  // Whether any of 0 to `top` is inside once it is moved by something from `first` to `last`.
  static bool Meets(int64_t side, int64_t top, int64_t first, int64_t last) { return first < side && top + last >= 0; }
  // The numbers of sites of a grid of that shape, coordinates times `scale`.
  void Places(const int32_t* batch, const int32_t* keys, int64_t count, Numbers shape, const int64_t* scale, int64_t* to) const {
    int32_t rest[kPart];
    std::memcpy(rest, keys, count * sizeof(int32_t));
    for (int64_t i = 0; i < count; i++) to[i] = batch[i] * size;
    for (int64_t d = dims; d-- > 0;) {
      const int32_t side = shape[d];
      const int64_t by = scale[d] * step[d], margin = low[d] * step[d];
      // In float64 the quotient is right: it is 0.5 / side or more away from whole numbers, rounding errs by far less.
      const double inverse = 1.0 / side;
      for (int64_t i = 0; i < count; i++) {
        const int32_t quotient = static_cast<int32_t>((rest[i] + 0.5) * inverse);
        to[i] += (rest[i] - quotient * side) * by + margin;
        rest[i] = quotient;
      }
    }
  }
};

// What is at a place and behind it, from one bit for each place and, for each word of bits, the number of sites before it.
struct BitSearch {
  const uint64_t* words;
  const int32_t* before;
  uint64_t Seen(int64_t place, int64_t) const {
    uint64_t word;
    std::memcpy(&word, reinterpret_cast<const char*>(words) + place / 8, sizeof(word));
    return word >> place % 8;
  }
  int64_t Mark(int64_t place) const { return place; }
  int32_t Row(int64_t place) const {
    return before[place / 64] + __builtin_popcountll(words[place / 64] & ((uint64_t{1} << place % 64) - 1));
  }
};

// The same for places that ascend, by walking along those of the list.
struct WalkSearch {
  const int64_t *places, *end, *at = nullptr;
  uint64_t Seen(int64_t place, int64_t span) {
    if (!at) at = std::lower_bound(places, end, place);
    while (at < end && *at < place) at++;
    uint64_t seen = 0;
    for (const int64_t* site = at; site < end && *site < place + span; site++) seen |= uint64_t{1} << (*site - place);
    return seen;
  }
  int64_t Mark(int64_t) const { return at - places; }
  int32_t Row(int64_t mark) const { return mark; }
};

// For a line of `run` taps and some rows, the row in the list where it has their neighbours; `to` holds "none" already.
template <class Search>
void FindLine(Search search, const int64_t* places, int64_t count, int64_t move, int64_t run, int64_t spread, int32_t none, int32_t* to,
              int64_t step) {
  int32_t row[kPart];
  int64_t mark[kPart], found = 0;
  uint64_t seen[kPart], taps = 0;
  for (int64_t t = 0; t < run; t++) taps |= uint64_t{1} << t * spread;
  for (int64_t i = 0; i < count; i++) {
    row[found] = i;
    seen[found] = search.Seen(places[i] + move, (run - 1) * spread + 1);
    mark[found] = search.Mark(places[i] + move);
    found += (seen[found] & taps) != 0;
  }
  for (int64_t n = 0; n < found; n++) {
    const int32_t first = search.Row(mark[n]);
    for (int64_t t = 0; t < run; t++) {
      // Without a branch, which nobody could foresee.
      const int32_t next = first + __builtin_popcountll(seen[n] & ((uint64_t{1} << t * spread) - 1));
      const int32_t there = -static_cast<int32_t>(seen[n] >> t * spread & 1);
      to[t * step + row[n]] = (next & there) | (none & ~there);
    }
  }
}

// For every tap and row the row in a list of the site at coordinate * scale + shift + tap * spread, if it is there. Both the rows
// and the list are sorted, empty ones at the end.
ffi::Error Neighbours(ffi::ThreadPool pool, int64_t samples, Numbers list_shape, Numbers shape, Numbers window, Numbers scale,
                      Numbers shift, Numbers spread, S32 list_batch, S32 list_keys, S32 batch, S32 keys,
                      ffi::ResultBuffer<ffi::S32> table) {
  const int64_t dims = shape.size(), last = dims - 1, rows = keys.element_count(), taps = table->dimensions()[0];
  const int64_t run = (window[last] - 1) * spread[last] < kSpan ? window[last] : 1, lines = taps / run;
  const Grid grid(list_shape, shape, window, scale, shift, spread, run);
  auto used = [samples](const S32& batch) {
    const int32_t *begin = batch.typed_data(), *end = begin + batch.element_count();
    return std::partition_point(begin, end, [samples](int32_t sample) { return sample < samples; }) - begin;
  };
  auto parts = [](int64_t count) { return (count + kPart - 1) / kPart; };
  const int64_t listed = used(list_batch), count = used(batch), none = list_keys.element_count();
  const int64_t words = samples * grid.size / 64 + 1;
  const bool walk = words > kWordsPerSite * (listed + kPart);
  // One more word, since a load may begin in the last one and end behind it.
  Lease lease((listed + count) * sizeof(int64_t) + (walk ? 0 : (words + 1) * (sizeof(uint64_t) + sizeof(int32_t))));
  int64_t* sites = lease.As<int64_t>();
  int64_t* places = sites + listed;
  uint64_t* bits = reinterpret_cast<uint64_t*>(places + count);
  int32_t* before = reinterpret_cast<int32_t*>(bits + words + 1);
  const std::vector<int64_t> once(dims, 1);
  ParallelFor(pool, parts(listed) + parts(count), [&](int64_t part) {
    const bool of_list = part < parts(listed);
    const int64_t begin = (of_list ? part : part - parts(listed)) * kPart;
    if (of_list) {
      grid.Places(list_batch.typed_data() + begin, list_keys.typed_data() + begin, std::min(kPart, listed - begin), list_shape,
                  once.data(), sites + begin);
    } else {
      grid.Places(batch.typed_data() + begin, keys.typed_data() + begin, std::min(kPart, count - begin), shape, scale.begin(),
                  places + begin);
    }
  });
  // A part writes the words from the one behind those of earlier sites up to that of its last site.
  if (!walk) bits[words] = 0;
  ParallelFor(pool, walk ? 0 : std::max<int64_t>(1, parts(listed)), [&](int64_t part) {
    int64_t site = part * kPart, word = part ? sites[site - 1] / 64 + 1 : 0;
    const int64_t end = std::min(site + kPart, listed), stop = end == listed ? words : sites[end - 1] / 64 + 1;
    while (site < end && sites[site] / 64 < word) site++;
    for (; word < stop; word++) {
      before[word] = site;
      uint64_t found = 0;
      for (; site < listed && sites[site] / 64 == word; site++) found |= uint64_t{1} << sites[site] % 64;
      bits[word] = found;
    }
  });
  ParallelFor(pool, lines * parts(rows), [&](int64_t unit) {
    const int64_t line = unit / parts(rows), begin = unit % parts(rows) * kPart, end = std::min(rows, begin + kPart);
    int32_t* to = table->typed_data() + line * run * rows + begin;
    for (int64_t t = 0; t < run; t++) std::fill(to + t * rows, to + t * rows + end - begin, none);
    int64_t move = 0, tap = line * run;
    for (int64_t d = dims; d-- > 0;) {
      const int64_t first = shift[d] + tap % window[d] * spread[d], end_of_line = first + (d == last ? (run - 1) * spread[d] : 0);
      if (!Grid::Meets(list_shape[d], (shape[d] - 1) * scale[d], first, end_of_line)) return;
      move += first * grid.step[d];
      tap /= window[d];
    }
    const int64_t filled = std::min(end, count) - begin;
    if (filled <= 0) return;
    if (walk) {
      FindLine(WalkSearch{sites, sites + listed}, places + begin, filled, move, run, spread[last], none, to, rows);
    } else {
      FindLine(BitSearch{bits, before}, places + begin, filled, move, run, spread[last], none, to, rows);
    }
  });
  return ffi::Error::Success();
}

// The table of the transposed map: for every tap and row of the input the row of the output that reads it.
ffi::Error Inverse(ffi::ThreadPool pool, S32 table, ffi::ResultBuffer<ffi::S32> inverse) {
  const int64_t taps = table.dimensions()[0], outputs = table.dimensions()[1], inputs = inverse->dimensions()[1];
  ParallelFor(pool, taps, [&](int64_t tap) {
    const int32_t* from = table.typed_data() + tap * outputs;
    int32_t* to = inverse->typed_data() + tap * inputs;
    std::fill(to, to + inputs, outputs);
    for (int64_t o = 0; o < outputs; o++) {
      if (static_cast<uint32_t>(from[o]) < static_cast<uint32_t>(inputs)) to[from[o]] = o;
    }
  });
  return ffi::Error::Success();
}

}  // namespace

#define SPARSE_CONV_BINDING(type)    \
  ffi::Ffi::Bind()                   \
      .Ctx<ffi::ThreadPool>()        \
      .Attr<int64_t>("groups")       \
      .Arg<ffi::Buffer<type>>()      \
      .Arg<ffi::Buffer<type>>()      \
      .Arg<S32>()                    \
      .Ret<ffi::Buffer<type>>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_conv_forward_f32, Forward<ffi::F32>, SPARSE_CONV_BINDING(ffi::F32));
XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_conv_forward_f64, Forward<ffi::F64>, SPARSE_CONV_BINDING(ffi::F64));
XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_conv_dw_f32, WeightGradient<ffi::F32>, SPARSE_CONV_BINDING(ffi::F32));
XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_conv_dw_f64, WeightGradient<ffi::F64>, SPARSE_CONV_BINDING(ffi::F64));
XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_conv_neighbours, Neighbours,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("samples")
                                  .Attr<Numbers>("list_shape")
                                  .Attr<Numbers>("shape")
                                  .Attr<Numbers>("window")
                                  .Attr<Numbers>("scale")
                                  .Attr<Numbers>("shift")
                                  .Attr<Numbers>("spread")
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Arg<S32>()
                                  .Ret<S32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_conv_inverse, Inverse, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<S32>().Ret<S32>());
