// What is written when units are replaced. No torch; T is any type with conversions from and to float.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.h"
#include "plan.h"

namespace cbp {

// the part of a tensor that is here, and where it lies in the whole one
struct Target {
  void* data;
  int64_t size[MAX_DIMS], stride[MAX_DIMS], first[MAX_DIMS], whole[MAX_DIMS];
};

// f(offset, element, n, stride) for every run of elements that unit j owns here: `n` elements with consecutive
// row-major numbers in the whole tensor from `element` on, `stride` apart in memory from `offset` on
template <typename F>
void for_each_run(const Target& t, const Region& region, int64_t j, const F& f) {
  // how far apart the numbers of neighbours along an axis are
  int64_t number[MAX_DIMS], inner = 1, inner_first = 0;
  for (int64_t d = MAX_DIMS - 1, n = 1; d >= 0; n *= t.whole[d--]) number[d] = n;
  for (int64_t d = region.axis + 1; d < MAX_DIMS; ++d) {
    inner *= t.size[d];
    inner_first += t.first[d] * number[d];
  }
  // the last axes are one run if they are dense, as those of a contiguous tensor are
  int64_t run = 1, stride = 0, axis = MAX_DIMS;
  for (; axis > region.axis + 1; --axis) {
    const int64_t d = axis - 1;
    if (t.size[d] == 1) continue;
    if (number[d] != run || (run > 1 && t.stride[d] != run * stride)) break;
    if (run == 1) stride = t.stride[d];
    run *= t.size[d];
  }
  const auto inner_runs = [&](int64_t offset, int64_t element) {
    for (int64_t i = 0; i < inner; i += run) {
      int64_t rest = i / run, at = offset, e = element + inner_first;
      for (int64_t d = axis - 1; d > region.axis; --d) {
        at += rest % t.size[d] * t.stride[d];
        e += rest % t.size[d] * number[d];
        rest /= t.size[d];
      }
      f(at, e, run, stride);
    }
  };
  const auto here = [&](int64_t index, int64_t d) { return index >= t.first[d] && index < t.first[d] + t.size[d]; };
  for (int64_t p = 0; p < region.block.per_unit; ++p) {
    const int64_t index = region.block.index(j, p);
    if (region.axis == 0) {
      if (here(index, 0)) inner_runs((index - t.first[0]) * t.stride[0], index * number[0]);
      continue;
    }
    // a grouped convolution's column lies in the rows of its group
    const int64_t rows = t.whole[0] / region.conv_groups, group = index / t.whole[1], column = index % t.whole[1];
    if (!here(column, 1)) continue;
    const int64_t last = std::min((group + 1) * rows, t.first[0] + t.size[0]);
    for (int64_t r = std::max(group * rows, t.first[0]); r < last; ++r)
      inner_runs((r - t.first[0]) * t.stride[0] + (column - t.first[1]) * t.stride[1],
                 r * number[0] + column * number[1]);
  }
}

// float32 draws for the elements first ... first + n - 1
inline void draw(const Fields& f, const Region& region, int64_t first, int64_t n, float* out) {
  const uint64_t seed = static_cast<uint64_t>(*f.seed);
  const uint64_t step = static_cast<uint64_t>(*f.step);
  const uint32_t stream = static_cast<uint32_t>(region.stream);
  const float bound = static_cast<float>(region.value);
  active->kernels->uniform(seed, step, stream, static_cast<uint64_t>(first), n, out);
  if (region.distribution == Distribution::kUniform)
    for (int64_t i = 0; i < n; ++i) out[i] = (2.0f * out[i] - 1.0f) * bound;
  if (region.distribution != Distribution::kNormal) return;
  // Box-Muller on the two words of a pair: the even element takes the cosine, the odd one the sine
  for (int64_t i = 0; i < n; ++i) {
    float pair[2];
    active->kernels->uniform(seed, step, stream, static_cast<uint64_t>((first + i) & ~int64_t{1}), 2, pair);
    const double radius = std::sqrt(-2.0 * std::log1p(-static_cast<double>(pair[0])));
    const double angle = 6.283185307179586 * static_cast<double>(pair[1]);
    out[i] = static_cast<float>(radius * ((first + i) % 2 ? std::sin(angle) : std::cos(angle)) * region.value);
  }
}

// The chosen units' columns of a matrix, row by row for all of them: rows are pages apart, and what will be written
// some rows on is fetched already.
template <typename T>
void fill_columns(const Region& region, const Target& t, const int32_t* chosen, int64_t n, T fill) {
  constexpr int64_t AHEAD = 16;
  std::vector<int64_t> columns;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t p = 0; p < region.block.per_unit; ++p) {
      const int64_t column = region.block.index(chosen[i], p) - t.first[1];
      if (column >= 0 && column < t.size[1]) columns.push_back(column * t.stride[1]);
    }
  std::sort(columns.begin(), columns.end());
  T* data = static_cast<T*>(t.data);
  for (int64_t r = 0; r < t.size[0]; ++r) {
    T* row = data + r * t.stride[0];
    const T* later = data + std::min(r + AHEAD, t.size[0] - 1) * t.stride[0];
    for (const int64_t column : columns) {
      CBP_PREFETCH(later + column);
      row[column] = fill;
    }
  }
}

template <typename T>
void reinit(const Plan& plan, const Fields& f, const Region& region, bool entry, const Target& t) {
  constexpr int64_t BLOCK = 1024;
  float values[BLOCK];
  const Group& group = plan.groups[region.group];
  const bool draws = region.kind == RegionKind::kDraw && !entry;
  const T fill = static_cast<T>(static_cast<float>(entry ? 0.0 : region.value));
  if (!draws && region.axis == 1 && region.dims == 2)
    return fill_columns(region, t, f.chosen + group.first_unit, f.num_chosen[region.group], fill);
  for (int64_t i = 0; i < f.num_chosen[region.group]; ++i)
    for_each_run(t, region, f.chosen[group.first_unit + i], [&](int64_t at, int64_t element, int64_t n, int64_t s) {
      T* out = static_cast<T*>(t.data) + at;
      if (!draws) {
        for (int64_t e = 0; e < n; ++e) out[e * s] = fill;
        return;
      }
      for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t width = std::min(BLOCK, n - start);
        draw(f, region, element + start, width, values);
        for (int64_t e = 0; e < width; ++e) out[(start + e) * s] = static_cast<T>(values[e]);
      }
    });
}

// bias += sum over the chosen units' columns of weight * h_hat; a row's total that is not finite adds nothing
template <typename B, typename W>
void transfer(const Plan& plan, const Fields& f, const Region& region, const Target& bias, const Target& weight) {
  const Group& group = plan.groups[region.group];
  const Slot& slot = plan.slots[region.slot];
  const int64_t outputs = weight.size[1 - region.axis];
  const int64_t inner = weight.size[2] * weight.size[3] * weight.size[4];
  std::vector<double> total(outputs, 0.0);
  BiasCorrection correction(*f.decay);
  for (int64_t i = 0; i < f.num_chosen[region.group]; ++i) {
    const int64_t j = f.chosen[group.first_unit + i];
    const double divisor = correction(f.age[group.first_unit + j]);
    for (int64_t p = 0; p < region.block.per_unit; ++p) {
      const double h_hat = f.running_mean[slot.first_column + slot.column(j, p)] / divisor;
      Region column = region;
      column.block = {region.block.index(j, p), 0, 1, 0};
      for_each_run(weight, column, 0, [&](int64_t at, int64_t element, int64_t n, int64_t s) {
        const W* w = static_cast<const W*>(weight.data) + at;
        for (int64_t e = 0; e < n; ++e) {
          const int64_t row = (element + e) / inner;
          total[region.axis == 1 ? row / weight.size[1] : row % weight.size[1]] +=
              static_cast<double>(w[e * s]) * h_hat;
        }
      });
    }
  }
  for (int64_t r = 0; r < outputs; ++r) {
    B& b = static_cast<B*>(bias.data)[r * bias.stride[0]];
    const B moved = static_cast<B>(static_cast<double>(b) + total[r]);
    if (std::isfinite(static_cast<double>(moved))) b = moved;
  }
}

// u, a and m_h of the chosen units
inline void forget(const Plan& plan, const Fields& f) {
  const Header& h = *plan.header;
  for (int64_t g = 0; g < h.groups; ++g) {
    const Group& group = plan.groups[g];
    for (int64_t i = 0; i < f.num_chosen[g]; ++i) {
      const int64_t j = f.chosen[group.first_unit + i], unit = group.first_unit + j;
      if (h.utility_bytes == 8)
        static_cast<double*>(f.utility)[unit] = 0;
      else
        static_cast<float*>(f.utility)[unit] = 0;
      f.age[unit] = 0;
      for (int64_t s = group.first_slot; h.keeps_mean && s < group.first_slot + group.slots; ++s)
        for (int64_t p = 0; p < group.columns_per_unit; ++p)
          f.running_mean[plan.slots[s].first_column + plan.slots[s].column(j, p)] = 0;
    }
  }
}

}  // namespace cbp
