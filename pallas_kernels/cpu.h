// What C++ kernels share: vectors, products of tiles, memory that calls lend each other, and loops over XLA's thread pool.

#ifndef PALLAS_KERNELS_CPU_H_
#define PALLAS_KERNELS_CPU_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace pallas {

// Bytes of a vector, and rows of a tile of two vectors each whose sums fit into the registers.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kRows = 12;
#elif defined(__AVX__)
constexpr int kBytes = 32, kRows = 6;
#elif defined(__aarch64__)
constexpr int kBytes = 16, kRows = 12;
#else
constexpr int kBytes = 16, kRows = 6;
#endif

template <class T>
struct Simd {
  static constexpr int kLanes = kBytes / sizeof(T);
  typedef T Vec __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
constexpr int kLanes = Simd<T>::kLanes;

template <class T>
inline Vec<T> Load(const T* p) { return *reinterpret_cast<const Vec<T>*>(p); }
template <class T>
inline void Store(T* p, Vec<T> x) { *reinterpret_cast<Vec<T>*>(p) = x; }
// x - 0 is x for every x, so this is a broadcast alone; 0 + x would be an addition.
template <class T>
inline Vec<T> All(T x) { return x - Vec<T>{}; }

// Sum of all lanes, by halves.
template <class T>
inline T Sum(Vec<T> x) {
#if defined(__clang__)
  T s = 0;
  for (int i = 0; i < kLanes<T>; i++) s += x[i];
  return s;
#else
  typedef typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type Int;
  typedef Int Order __attribute__((vector_size(kBytes)));
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half; half /= 2) {
    Order order = {};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; i++) order[i] = i ^ half;
    x += __builtin_shuffle(x, order);
  }
  return x[0];
#endif
}

inline int64_t RoundUp(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t Share(int64_t n, int64_t i, int64_t of) { return n * i / of; }

// Memory that calls lend each other, since fresh memory costs a fault for each page. Aligned to cache lines, not initialised.
class Lease {
 public:
  explicit Lease(int64_t bytes) {
    std::lock_guard<std::mutex> guard(Mutex());
    auto& shelf = Shelf();
    auto best = shelf.end();
    for (auto it = shelf.begin(); it != shelf.end(); ++it) {
      if (it->first >= bytes && (best == shelf.end() || it->first < best->first)) best = it;
    }
    if (best == shelf.end() && !shelf.empty()) {
      // Every one is too small: a larger one takes the place of the last.
      ::operator delete(shelf.back().second, std::align_val_t(64));
      shelf.pop_back();
    } else if (best != shelf.end()) {
      held_ = *best;
      shelf.erase(best);
      return;
    }
    const int64_t size = RoundUp(bytes + 64, 4096);
    held_ = {size, ::operator new(size, std::align_val_t(64))};
  }
  ~Lease() {
    std::lock_guard<std::mutex> guard(Mutex());
    Shelf().push_back(held_);
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  template <class T>
  T* As() const { return static_cast<T*>(held_.second); }

 private:
  using Held = std::pair<int64_t, void*>;
  static std::mutex& Mutex() {
    static std::mutex* mutex = new std::mutex;
    return *mutex;
  }
  static std::vector<Held>& Shelf() {
    static std::vector<Held>* shelf = new std::vector<Held>;
    return *shelf;
  }
  Held held_;
};

// Writes V vectors, of which `columns` elements have a place.
template <class T, int V>
inline void Put(T* c, const Vec<T>* x, int64_t columns) {
  if (columns >= V * kLanes<T>) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) Store(c + v * kLanes<T>, x[v]);
  } else {
    T line[V * kLanes<T>];
    for (int v = 0; v < V; v++) Store(line + v * kLanes<T>, x[v]);
    std::memcpy(c, line, columns * sizeof(T));
  }
}

// Adds to V vectors what Put has written.
template <class T, int V>
inline void AddStored(const T* c, Vec<T>* x, int64_t columns) {
  if (columns >= V * kLanes<T>) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) x[v] += Load(c + v * kLanes<T>);
  } else {
    T line[V * kLanes<T>] = {};
    std::memcpy(line, c, columns * sizeof(T));
    for (int v = 0; v < V; v++) x[v] += Load(line + v * kLanes<T>);
  }
}

// R rows of V vectors of C (+)= A^T B, over `depth` rows of both: A(p, r) is a[p * lda + r].
template <class T, int R, int V>
void Outer(int64_t depth, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, int64_t columns, bool add) {
  Vec<T> sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sum[r][v] = Vec<T>{};
  }
  for (int64_t p = 0; p < depth; p++, a += lda, b += ldb) {
    Vec<T> line[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) line[v] = Load(b + v * kLanes<T>);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const Vec<T> s = All(a[r]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sum[r][v] += s * line[v];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) {
    if (add) AddStored<T, V>(c + r * ldc, sum[r], columns);
    Put<T, V>(c + r * ldc, sum[r], columns);
  }
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

}  // namespace pallas

#endif  // PALLAS_KERNELS_CPU_H_
