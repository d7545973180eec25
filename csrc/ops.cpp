// Guards and work splitting of the functions in ops.h, and the operator whose schema is in cbp_fast/cpp.py.
//
// All of LibTorch is used through its stable ABI, so that one binary serves every PyTorch from 2.10 on.
#include "ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "plan.h"
#include "reinit.h"
#include "select.h"

namespace cbp {

namespace {

// the caller's arguments were checked in Python; these only keep a wrong one from reading or writing elsewhere
#define CBP_CHECK(condition, message) \
  if (!(condition)) throw std::runtime_error(std::string("cbp_fast: ") + (message))

const SumKernels& sum_kernels(ScalarType type) {
  switch (type) {
    case ScalarType::Half:
      return active->kernels->float16;
    case ScalarType::BFloat16:
      return active->kernels->bfloat16;
    case ScalarType::Float:
      return active->kernels->float32;
    case ScalarType::Double:
      return active->kernels->float64;
    default:
      throw std::runtime_error("cbp_fast: only float16, bfloat16, float32 and float64 are supported");
  }
}

int64_t element_size(ScalarType type) { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }

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

// The activations of one forward: `columns` features, `column_stride` apart, over the samples of the other dims.
struct Activations {
  const char* data;
  ScalarType type;
  int64_t columns, column_stride, samples;
  Dims dims;
};

Activations activations_of(const Array& h, const Slot& slot) {
  const int64_t dims = h.dims, *sizes = h.sizes, *strides = h.strides;
  CBP_CHECK(h.cpu, "activations must be on the CPU");
  CBP_CHECK(slot.spatial == 0 ? dims >= 1 && dims <= MAX_AXES : dims == slot.spatial + 1 || dims == slot.spatial + 2,
            "activations have " + std::to_string(dims) + " dimensions, which their layer does not take");
  const int64_t axis = slot.spatial == 0 ? dims - 1 : dims - 1 - slot.spatial;
  CBP_CHECK(sizes[axis] == slot.seen_features, "activations have " + std::to_string(sizes[axis]) + " features, not " +
                                                   std::to_string(slot.seen_features) + " as at attach");
  Activations a{nullptr, h.type, slot.seen_columns, strides[axis], 1, {}};
  sum_kernels(a.type);
  for (int64_t d = 0; d < dims; ++d)
    if (d != axis) {
      a.samples *= sizes[d];
      a.dims.add({sizes[d], strides[d]});
    }
  a.dims.merge();
  a.data = static_cast<const char*>(h.data) + slot.seen_feature * strides[axis] * element_size(a.type);
  return a;
}

// out[c] += sum over samples of term(h[s, c]). Reads h once.
void sum_activations(const Activations& a, Term term, const double* offset, double* out) {
  const SumKernels& kernels = sum_kernels(a.type);
  const int64_t item = element_size(a.type), columns = a.columns, work = a.samples * columns;
  Dims outer = a.dims;
  Dim inner{1, 1};
  const bool runs = outer.count() > 0 && columns > 1 && outer[outer.count() - 1].stride < a.column_stride;
  if (outer.count() > 0) {
    // runs along memory where a channel's samples are neighbours, else rows of features, along the longest axis
    int which = outer.count() - 1;
    for (int i = 0; !runs && i < outer.count(); ++i)
      if (outer[i].size > outer[which].size) which = i;
    inner = outer.take(which);
  }
  if (runs) {
    const int64_t parts = std::min<int64_t>(columns, 64);
    for_each(parts, work, [&](int64_t part) {
      const int64_t first = columns * part / parts, last = columns * (part + 1) / parts;
      for_each_offset(outer, [&](int64_t at) {
        for (int64_t c = first; c < last; ++c)
          out[c] += kernels.run(term, a.data + (at + c * a.column_stride) * item, inner.size, inner.stride,
                                offset ? offset[c] : 0.0);
      });
    });
    return;
  }
  const int64_t parts = parts_of(inner.size, work / inner.size);
  if (parts == 1) {
    for_each_offset(outer, [&](int64_t at) {
      kernels.columns(term, a.data + at * item, inner.size, columns, inner.stride, a.column_stride, offset, out);
    });
    return;
  }
  Scratch scratch(Scratch::size<double>(parts * columns));
  double* partial = scratch.take<double>(parts * columns);
  for_each(parts, work, [&](int64_t part) {
    double* mine = partial + part * columns;
    std::fill(mine, mine + columns, 0.0);
    const int64_t first = part_start(inner.size, parts, part), last = part_start(inner.size, parts, part + 1);
    for_each_offset(outer, [&](int64_t at) {
      kernels.columns(term, a.data + (at + first * inner.stride) * item, last - first, columns, inner.stride,
                      a.column_stride, offset, mine);
    });
  });
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t c = 0; c < columns; ++c) out[c] += partial[part * columns + c];
}

Plan checked_plan(const Array& buffer, const Array& table) {
  CBP_CHECK(table.is_run_of(ScalarType::Long) && table.sizes[0] >= static_cast<int64_t>(sizeof(Header) / 8),
            "the plan must be a contiguous int64 tensor on the CPU");
  const Plan plan(static_cast<const int64_t*>(table.data));
  CBP_CHECK(table.sizes[0] == Plan::size(*plan.header), "the plan has a wrong size");
  CBP_CHECK(buffer.is_run_of(ScalarType::Byte) && buffer.sizes[0] == plan.header->bytes,
            "the buffer must be a contiguous uint8 tensor of the plan's size on the CPU");
  return plan;
}

void capture(const Plan& plan, const Fields& f, int64_t s, const Activations& a) {
  const Header& h = *plan.header;
  const Slot& slot = plan.slots[s];
  if (a.samples == 0) return;
  f.seen[s] += a.samples;
  const int64_t first = slot.first_column + slot.seen_column;
  double* sums = f.sums + first;
  if (h.keeps_mean) sum_activations(a, Term::kValue, nullptr, f.feature + first);
  if (h.activation == 1) sum_activations(a, Term::kMagnitude, nullptr, sums);
  if (h.activation != 2) return;
  // h_hat of a unit: the mean so far, this forward included, and the age as it will be after the step; or else both as
  // the step before left them, 0 where there was none
  const Group& group = plan.groups[slot.group];
  BiasCorrection correction(*f.decay);
  std::vector<double> h_hat(slot.columns);
  for (int64_t j = 0; j < group.units; ++j) {
    const int64_t age = f.age[group.first_unit + j];
    const double divisor = h.previous_mean ? age == 0 ? 1.0 : correction(age) : correction(age + 1);
    double total = 0;
    for (int64_t p = 0; p < group.columns_per_unit; ++p) {
      const int64_t c = slot.first_column + slot.column(j, p);
      if (h.previous_mean) {
        total += f.running_mean[c] / divisor;
        continue;
      }
      const double mean = f.feature[c] / static_cast<double>(f.seen[s]);
      total += (*f.decay * f.running_mean[c] + (1.0 - *f.decay) * mean) / divisor;
    }
    for (int64_t p = 0; p < group.columns_per_unit; ++p)
      h_hat[slot.column(j, p)] = total / static_cast<double>(group.columns_per_unit);
  }
  sum_activations(a, Term::kDistance, h_hat.data() + slot.seen_column, sums);
}

// One weight as matrices [major, minor], of which the minor axis is the one whose elements are neighbours in memory:
// one matrix for every convolution group and, where a row with its kernel positions is not dense, for every position.
struct WeightView {
  const char* data;
  const SumKernels* kernels;
  int64_t item, conv_groups, group_stride, major, minor, major_stride, minor_stride, parts;
  bool transposed;          // major is the weight's axis 1
  int64_t column_size = 0;  // of a dense row with kernel positions: column of element i is i / column_size % columns
  Dims positions;
  double *major_sums, *partial, *rows, *columns;

  int64_t major_length() const { return conv_groups * major; }
  int64_t partial_length() const { return conv_groups * parts * minor; }
};

WeightView view_of(const Array& w, const Weight& record) {
  const int64_t *sizes = w.sizes, *strides = w.strides;
  CBP_CHECK(w.cpu && static_cast<int64_t>(w.type) == record.dtype && w.dims == record.dims,
            "a weight changed its device, type or number of dimensions");
  for (int64_t d = 0; d < record.dims; ++d) CBP_CHECK(sizes[d] == record.part[d], "a weight changed its shape");
  WeightView v{};
  v.kernels = &sum_kernels(w.type);
  v.item = element_size(w.type);
  v.data = static_cast<const char*>(w.data);
  v.conv_groups = record.part_groups;
  const int64_t out = sizes[0] / v.conv_groups, in = sizes[1];
  v.group_stride = out * strides[0];
  Dims kernel, row;
  for (int64_t d = 2; d < record.dims; ++d) {
    kernel.add({sizes[d], strides[d]});
    row.add({sizes[d], strides[d]});
  }
  row.add({in, strides[1]});
  row.merge();
  kernel.merge();
  if (kernel.count() > 0 && row.count() == 1 && row[0].stride == 1) {
    v.major = out;
    v.minor = row[0].size;
    v.major_stride = strides[0];
    v.minor_stride = 1;
    // an axis of one element may have any stride
    v.column_size = in > 1 ? strides[1] : 1;
  } else {
    v.transposed = out > 1 && strides[0] < strides[1];
    v.major = v.transposed ? in : out;
    v.minor = v.transposed ? out : in;
    v.major_stride = strides[v.transposed];
    v.minor_stride = strides[!v.transposed];
    v.positions = kernel;
  }
  v.parts = parts_of(v.major, v.minor);
  return v;
}

// abs-sums over one part of one convolution group
void sum_part(const WeightView& v, int64_t group, int64_t part, bool rows, bool columns) {
  const int64_t first = part_start(v.major, v.parts, part), last = part_start(v.major, v.parts, part + 1);
  double* minor = v.partial + (group * v.parts + part) * v.minor;
  double* major = v.major_sums + group * v.major + first;
  const bool need_minor = v.transposed ? rows : columns, need_major = v.transposed ? columns : rows;
  if (need_minor) std::fill(minor, minor + v.minor, 0.0);
  if (need_major) std::fill(major, major + (last - first), 0.0);
  for_each_offset(v.positions, [&](int64_t at) {
    v.kernels->weight(v.data + (group * v.group_stride + first * v.major_stride + at) * v.item, last - first, v.minor,
                      v.major_stride, v.minor_stride, need_major ? major : nullptr, need_minor ? minor : nullptr);
  });
}

// the parts of every group put together, in order
void finish_sums(WeightView& v, const Weight& record) {
  const int64_t in = record.part[1];
  const bool need_minor = v.transposed ? record.reads_rows : record.reads_columns;
  if (need_minor)
    for (int64_t g = 0; g < v.conv_groups; ++g) {
      double* total = v.partial + g * v.parts * v.minor;
      for (int64_t part = 1; part < v.parts; ++part)
        for (int64_t i = 0; i < v.minor; ++i) total[i] += total[part * v.minor + i];
      double* out = (v.transposed ? v.rows : v.columns) + g * (v.transposed ? v.minor : in);
      if (v.column_size) {
        std::fill(out, out + in, 0.0);
        for (int64_t i = 0; i < v.minor; ++i) out[i / v.column_size % in] += total[i];
      } else {
        std::copy(total, total + v.minor, out);
      }
    }
  if (v.transposed ? record.reads_columns : record.reads_rows)
    std::copy(v.major_sums, v.major_sums + v.major_length(), v.transposed ? v.columns : v.rows);
}

template <typename U>
void choose_all(const Plan& plan, const Fields& f, const double* flat, const std::vector<int64_t>& reached) {
  const Header& h = *plan.header;
  for_each(h.groups, h.units * 32, [&](int64_t g) {
    if (!reached[g]) {
      f.num_chosen[g] = 0;
      return;
    }
    const Group& group = plan.groups[g];
    const int64_t n = group.units;
    // not Scratch: the calling thread runs tasks too, and its own holds the sums
    static thread_local std::vector<double> memory;
    const size_t each = Scratch::size<double>(n);
    if (memory.size() < 4 * each) memory.resize(4 * each);
    double* y = memory.data();
    utility_now(plan, f, group, flat, y);
    choose<U>(plan, f, g, y, reinterpret_cast<U*>(y + each), reinterpret_cast<float*>(y + 2 * each),
              reinterpret_cast<uint64_t*>(y + 3 * each));
    if (h.keeps_mean) average_features(plan, f, group);
  });
}

// What a step reads; everything that can be wrong with it is found before anything is written. The weights are all
// there, or none where they may be read `elsewhere`.
struct Inputs {
  std::vector<Activations> forwards;
  std::vector<int64_t> slots;  // of the forwards
  std::vector<WeightView> weights;

  Inputs(const Plan& plan, const Arrays& tensors, const Arrays& held, const Numbers& held_slots, bool elsewhere = false)
      : slots(held_slots) {
    const Header& h = *plan.header;
    CBP_CHECK(static_cast<int64_t>(tensors.size()) == h.weights || (tensors.empty() && elsewhere),
              "a wrong number of weights");
    CBP_CHECK(held.size() == slots.size(), "held activations and their slots differ in number");
    forwards.reserve(held.size());
    for (size_t i = 0; i < held.size(); ++i) {
      CBP_CHECK(slots[i] >= 0 && slots[i] < h.slots, "no such slot");
      forwards.push_back(activations_of(held[i], plan.slots[slots[i]]));
    }
    weights.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) weights.push_back(view_of(tensors[i], plan.weights[i]));
  }
  void capture_all(const Plan& plan, const Fields& f) const {
    for (size_t i = 0; i < forwards.size(); ++i) capture(plan, f, slots[i], forwards[i]);
  }
  // room that sums of weights need beside their results
  size_t scratch() const {
    size_t room = 0;
    for (const WeightView& v : weights) room += v.major_length() + v.partial_length();
    return room;
  }
};

// which groups a forward reached since the last step, and the weights that these groups need
struct Reached {
  std::vector<int64_t> groups, weights;
  bool any = false;

  Reached(const Plan& plan, const Fields& f) : groups(plan.header->groups, 0), weights(plan.header->weights, 0) {
    for (int64_t s = 0; s < plan.header->slots; ++s) {
      if (f.seen[s] == 0) continue;
      any = true;
      const Group& group = plan.groups[plan.slots[s].group];
      groups[plan.slots[s].group] = 1;
      if (plan.slots[s].weight >= 0) weights[plan.slots[s].weight] = 1;
      for (int64_t i = 0; i < group.incoming; ++i) weights[plan.incoming[group.first_incoming + i].weight] = 1;
    }
  }
};

// sums of magnitudes of the weights that are needed, to their places in `flat`
void sum_weights(const Plan& plan, std::vector<WeightView>& views, const std::vector<int64_t>& needed, double* flat,
                 Scratch& scratch) {
  const Header& h = *plan.header;
  struct Part {
    int64_t weight, group, part;
  };
  std::vector<Part> parts;
  int64_t elements = 0;
  for (int64_t i = 0; i < h.weights; ++i) {
    WeightView& v = views[i];
    v.major_sums = scratch.take<double>(v.major_length());
    v.partial = scratch.take<double>(v.partial_length());
    v.rows = flat + plan.weights[i].rows + plan.weights[i].part_row;
    v.columns = flat + plan.weights[i].columns + plan.weights[i].part_column;
    if (!needed[i]) continue;
    elements += v.conv_groups * v.major * v.minor;
    for (int64_t g = 0; g < v.conv_groups; ++g)
      for (int64_t p = 0; p < v.parts; ++p) parts.push_back({i, g, p});
  }
  for_each(static_cast<int64_t>(parts.size()), elements, [&](int64_t i) {
    const Part& p = parts[i];
    sum_part(views[p.weight], p.group, p.part, plan.weights[p.weight].reads_rows, plan.weights[p.weight].reads_columns);
  });
  for_each(h.weights, elements / 16, [&](int64_t i) {
    if (needed[i]) finish_sums(views[i], plan.weights[i]);
  });
}

int64_t choose_none(const Plan& plan, const Fields& f) {
  std::fill(f.num_chosen, f.num_chosen + plan.header->groups, 0);
  return 0;
}

// from sums to the choice; returns how many units were chosen
int64_t choose_reached(const Plan& plan, const Fields& f, const double* flat, const Reached& reached) {
  const Header& h = *plan.header;
  *f.step = added(*f.step, 1);
  if (h.utility_bytes == 8)
    choose_all<double>(plan, f, flat, reached.groups);
  else
    choose_all<float>(plan, f, flat, reached.groups);
  std::fill(f.seen, f.seen + h.slots, 0);
  std::fill(f.sums, f.sums + h.columns, 0.0);
  if (h.keeps_mean) std::fill(f.feature, f.feature + h.columns, 0.0);
  int64_t chosen = 0;
  for (int64_t g = 0; g < h.groups; ++g) chosen += f.num_chosen[g];
  return chosen;
}

double* checked_flat(const Array& flat, const Plan& plan) {
  CBP_CHECK(flat.is_run_of(ScalarType::Double) && flat.sizes[0] == plan.header->flat,
            "the flat sums must be a contiguous float64 tensor of the plan's size on the CPU");
  return static_cast<double*>(flat.data);
}

// f(position in `flat`, column) for what is summed over samples: of one slot, or of the whole network
template <typename F>
void for_each_total(const Header& h, const Fields& f, int64_t first, int64_t columns, double* flat, const F& move) {
  move(f.sums + first, flat + h.slots + first, columns);
  if (h.keeps_mean) move(f.feature + first, flat + h.slots + h.columns + first, columns);
}

Target target_of(const Array& t, const Region& region) {
  CBP_CHECK(t.cpu && t.dims == region.dims, "a tensor to re-initialise changed its device or dimensions");
  Target target{};
  for (int64_t d = 0; d < MAX_DIMS; ++d) {
    target.size[d] = d < region.dims ? t.sizes[d] : 1;
    target.stride[d] = d < region.dims ? t.strides[d] : 0;
    target.first[d] = region.first[d];
    target.whole[d] = region.size[d];
    CBP_CHECK(target.size[d] == region.part[d], "a tensor to re-initialise changed its shape");
  }
  target.data = t.data;
  return target;
}

// f(T{}) for the C++ type of a tensor
template <typename F>
void dispatch(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Half:
      return f(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{});
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    default:
      throw std::runtime_error("cbp_fast: only float16, bfloat16, float32 and float64 are supported");
  }
}

// What of one tensor is set anew.
struct Job {
  const Region* region;
  bool slot;
  Target target, weight;
  ScalarType type, weight_type;
};

// Everything that can be wrong with what `reinit_` gets is found here. Numbers in `numbers`: 2 * region, and
// 2 * region + 1 for a slot of the optimizer's state. A transfer takes two tensors: the bias, and the weight that reads
// the units.
std::vector<Job> jobs_of(const Plan& plan, const Arrays& tensors, const Numbers& numbers) {
  std::vector<Job> jobs;
  jobs.reserve(numbers.size());
  size_t next = 0;
  for (const int64_t number : numbers) {
    CBP_CHECK(number >= 0 && number / 2 < plan.header->regions, "no such region");
    const Region& region = plan.regions[number / 2];
    CBP_CHECK(next + (region.kind == 2) < tensors.size(), "too few tensors");
    Job job{&region, number % 2 == 1, target_of(tensors[next], region), {}, tensors[next].type, {}};
    sum_kernels(job.type);
    if (region.kind == 2) {
      const Array& w = tensors[++next];
      const Slot& slot = plan.slots[region.slot];
      CBP_CHECK(w.cpu && w.dims >= 2 && w.dims <= MAX_DIMS && w.sizes[1 - region.axis] == region.size[0] &&
                    region.conv_groups * w.sizes[region.axis] == slot.features,
                "a reading weight changed its device or shape");
      job.weight_type = w.type;
      sum_kernels(job.weight_type);
      for (int64_t d = 0; d < MAX_DIMS; ++d) {
        job.weight.size[d] = d < w.dims ? w.sizes[d] : 1;
        job.weight.stride[d] = d < w.dims ? w.strides[d] : 0;
        job.weight.whole[d] = job.weight.size[d];
      }
      job.weight.data = w.data;
    }
    ++next;
    jobs.push_back(job);
  }
  CBP_CHECK(next == tensors.size(), "too many tensors");
  return jobs;
}

}  // namespace

void capture_(const Array& buffer, const Array& table, const Array& h, int64_t slot) {
  const Plan plan = checked_plan(buffer, table);
  CBP_CHECK(slot >= 0 && slot < plan.header->slots, "no such slot");
  const Activations a = activations_of(h, plan.slots[slot]);
  capture(plan, Fields(*plan.header, buffer.data), slot, a);
}

int64_t select_(const Array& buffer, const Array& table, const Arrays& weights, const Arrays& held,
                const Numbers& held_slots) {
  const Plan plan = checked_plan(buffer, table);
  const Fields f(*plan.header, buffer.data);
  Inputs inputs(plan, weights, held, held_slots);
  inputs.capture_all(plan, f);
  const Reached reached(plan, f);
  if (!reached.any) return choose_none(plan, f);
  Scratch scratch(inputs.scratch() + plan.header->flat);
  double* flat = scratch.take<double>(plan.header->flat);
  sum_weights(plan, inputs.weights, reached.weights, flat, scratch);
  return choose_reached(plan, f, flat, reached);
}

// `weights` is empty where no process has a part of one: their sums are then left to `choose_`
void sum_(const Array& buffer, const Array& table, const Array& out, const Arrays& weights, const Arrays& held,
          const Numbers& held_slots) {
  const Plan plan = checked_plan(buffer, table);
  const Header& h = *plan.header;
  const Fields f(h, buffer.data);
  double* flat = checked_flat(out, plan);
  Inputs inputs(plan, weights, held, held_slots, true);
  inputs.capture_all(plan, f);
  std::fill(flat, flat + h.flat, 0.0);
  for (int64_t s = 0; s < h.slots; ++s) {
    const Slot& slot = plan.slots[s];
    if (slot.counts) flat[s] = static_cast<double>(f.seen[s]);
    if (slot.adds)
      for_each_total(h, f, slot.first_column, slot.columns, flat,
                     [](const double* mine, double* total, int64_t n) { std::copy(mine, mine + n, total); });
  }
  if (weights.empty()) return;
  // another process may have reached what this one has not
  std::vector<int64_t> needed(h.weights);
  for (int64_t i = 0; i < h.weights; ++i) needed[i] = plan.weights[i].adds;
  Scratch scratch(inputs.scratch());
  sum_weights(plan, inputs.weights, needed, flat, scratch);
}

int64_t choose_(const Array& buffer, const Array& table, const Array& sums, const Arrays& weights) {
  const Plan plan = checked_plan(buffer, table);
  const Header& h = *plan.header;
  const Fields f(h, buffer.data);
  double* flat = checked_flat(sums, plan);
  Inputs inputs(plan, weights, {}, {}, true);
  for (int64_t s = 0; s < h.slots; ++s) f.seen[s] = static_cast<int64_t>(flat[s]);
  for_each_total(h, f, 0, h.columns, flat,
                 [](double* mine, const double* total, int64_t n) { std::copy(total, total + n, mine); });
  const Reached reached(plan, f);
  if (!reached.any) return choose_none(plan, f);
  Scratch scratch(inputs.scratch());
  if (!weights.empty()) sum_weights(plan, inputs.weights, reached.weights, flat, scratch);
  return choose_reached(plan, f, flat, reached);
}

void reinit_(const Array& buffer, const Array& table, const Arrays& tensors, const Numbers& numbers) {
  const Plan plan = checked_plan(buffer, table);
  const Fields f(*plan.header, buffer.data);
  for (const Job& job : jobs_of(plan, tensors, numbers)) {
    if (job.region->kind == 2) {
      dispatch(job.type, [&](auto bias) {
        dispatch(job.weight_type, [&](auto weight) {
          transfer<decltype(bias), decltype(weight)>(plan, f, *job.region, job.target, job.weight);
        });
      });
    } else {
      dispatch(job.type, [&](auto x) { reinit<decltype(x)>(plan, f, *job.region, job.slot, job.target); });
    }
  }
  forget(plan, f);
}

void check_reinit(const Array& buffer, const Array& table, const Arrays& tensors, const Numbers& numbers) {
  jobs_of(checked_plan(buffer, table), tensors, numbers);
}

void copy_(const Array& to, const Array& from) {
  CBP_CHECK(to.is_run_of(ScalarType::Byte) && from.is_run_of(ScalarType::Byte) && to.sizes[0] == from.sizes[0],
            "only a contiguous uint8 tensor can be copied to another of its size on the CPU");
  std::memcpy(to.data, from.data, to.sizes[0]);
}

namespace {

Array array_of(const torch::stable::Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()),
          t.scalar_type(),
          t.dim(),
          t.sizes().data(),
          t.strides().data(),
          t.is_cpu()};
}

void capture_operator(torch::stable::Tensor buffer, torch::stable::Tensor table, torch::stable::Tensor h,
                      int64_t slot) {
  capture_(array_of(buffer), array_of(table), array_of(h), slot);
}

}  // namespace
}  // namespace cbp

STABLE_TORCH_LIBRARY_IMPL(cbp_fast, CPU, m) { m.impl("capture_", TORCH_BOX(&cbp::capture_operator)); }
