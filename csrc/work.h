// How work is split among threads, and the memory that it needs meanwhile.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace cbp {
namespace {

// Scratch memory of the calling thread, kept from step to step: it grows with units and layers, not with weights. Of
// all that one thread makes, only the newest may be used.
class Scratch {
 public:
  explicit Scratch(size_t doubles) {
    if (memory().size() < doubles) memory().resize(doubles);
    next_ = memory().data();
  }
  template <typename T>
  T* take(int64_t n) {
    T* out = reinterpret_cast<T*>(next_);
    next_ += size<T>(n);
    return out;
  }
  template <typename T>
  static size_t size(int64_t n) {
    return (static_cast<size_t>(n) * sizeof(T) + 7) / 8;
  }

 private:
  static std::vector<double>& memory() {
    static thread_local std::vector<double> m;
    return m;
  }
  double* next_;
};

// below this many elements a second thread costs more than it saves
constexpr int64_t PARALLEL = 1 << 17;

// task(i) for i in [0, n), on all of PyTorch's threads if there is enough work. A task writes to places of its own, so
// the result does not depend on who runs it.
template <typename F>
void for_each(int64_t n, int64_t elements, const F& task) {
  const int64_t threads = elements < PARALLEL ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), n);
  if (threads <= 1) {
    for (int64_t i = 0; i < n; ++i) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < n; i = next++) task(i);
  });
}

// into how many parts a sum over `rows` rows of `n` is split, whatever the number of threads
int64_t parts_of(int64_t rows, int64_t n) {
  constexpr int64_t MOST = 16, LEAST_ELEMENTS = 1 << 15;
  return std::max<int64_t>(1, std::min({MOST, rows * n / LEAST_ELEMENTS, rows / 8}));
}
int64_t part_start(int64_t rows, int64_t parts, int64_t i) {
  // whole groups of eight rows but for the last part
  return i == parts ? rows : rows * i / parts / 8 * 8;
}

}  // namespace
}  // namespace cbp
