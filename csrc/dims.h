// The axes of a tensor as they lie in memory.
#pragma once

#include <cstdint>

namespace cbp {
namespace {

// more than any layer takes; what is merged and copied stays small
constexpr int64_t MAX_AXES = 8;

struct Dim {
  int64_t size, stride;
};

// The axes of a tensor that are walked together, the greatest stride first; on the stack, since a step has hundreds.
class Dims {
 public:
  // neighbours in memory are merged and axes of size 1 left out, whatever the order of adding
  void add(Dim d) {
    if (d.size == 1) return;
    int at = count_++;
    for (; at > 0 && dims_[at - 1].stride < d.stride; --at) dims_[at] = dims_[at - 1];
    dims_[at] = d;
  }
  void merge() {
    int last = 0;
    for (int i = 1; i < count_; ++i)
      if (dims_[last].stride == dims_[i].size * dims_[i].stride)
        dims_[last] = {dims_[last].size * dims_[i].size, dims_[i].stride};
      else
        dims_[++last] = dims_[i];
    if (count_ > 0) count_ = last + 1;
  }
  Dim take(int i) {
    const Dim d = dims_[i];
    for (--count_; i < count_; ++i) dims_[i] = dims_[i + 1];
    return d;
  }
  int count() const { return count_; }
  const Dim& operator[](int i) const { return dims_[i]; }

 private:
  int count_ = 0;
  Dim dims_[MAX_AXES];
};

// f(offset) for every index of dims
template <typename F>
void for_each_offset(const Dims& dims, const F& f, int axis = 0, int64_t offset = 0) {
  if (axis == dims.count()) return f(offset);
  for (int64_t i = 0; i < dims[axis].size; ++i) for_each_offset(dims, f, axis + 1, offset + i * dims[axis].stride);
}

}  // namespace
}  // namespace cbp
