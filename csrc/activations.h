// Sums over the samples of one forward.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "checks.h"
#include "dims.h"
#include "work.h"

namespace cbp {
namespace {

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

void capture(const Plan& plan, const Fields& f, int64_t s, const Activations& a) {
  const Header& h = *plan.header;
  const Slot& slot = plan.slots[s];
  if (a.samples == 0) return;
  f.seen[s] += a.samples;
  const int64_t first = slot.first_column + slot.seen_column;
  double* sums = f.sums + first;
  if (h.keeps_mean) sum_activations(a, Term::kValue, nullptr, f.feature + first);
  if (h.activation == Activation::kMagnitude) sum_activations(a, Term::kMagnitude, nullptr, sums);
  if (h.activation != Activation::kCentred) return;
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

}  // namespace
}  // namespace cbp
