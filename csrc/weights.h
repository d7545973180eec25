// Sums of magnitudes of weights, by output and by input, in one pass.
#pragma once

#include <algorithm>
#include <vector>

#include "checks.h"
#include "dims.h"
#include "work.h"

namespace cbp {
namespace {

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

}  // namespace
}  // namespace cbp
