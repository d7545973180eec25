// From sums to the choice, for one group: utility, decayed average, age, and the units of least score. No torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "isa.h"
#include "plan.h"

namespace cbp {

// y[j] in double: activation statistic x weight statistic; cbp_fast/rules/arithmetic.py says what is multiplied. `flat`
// holds the sums of weights, where each says.
inline void utility_now(const Plan& plan, const Fields& f, const Group& group, const double* flat, double* y) {
  const Header& h = *plan.header;
  const int64_t n = group.units, per_unit = group.columns_per_unit;
  std::fill(y, y + n, 0.0);
  double elements = 0, samples = 0;
  for (int64_t s = group.first_slot; s < group.first_slot + group.slots; ++s) {
    const Slot& slot = plan.slots[s];
    const double seen = static_cast<double>(f.seen[s]);
    if (seen == 0) continue;
    samples += seen;
    // one mean over all readers: sums first, one division at the end
    const double divisor = h.incoming == Incoming::kTimesSum ? 1.0 : seen;
    const double* activation = f.sums + slot.first_column;
    const double* weight =
        h.outgoing != Outgoing::kNone ? flat + plan.weights[slot.weight].inputs() + slot.block.start : nullptr;
    const auto add = [&](const auto& term) {
      if (per_unit == 1) {
        for (int64_t j = 0; j < n; ++j) y[j] += term(j);
        return;
      }
      for (int64_t j = 0; j < n; ++j) {
        double total = 0;
        for (int64_t p = 0; p < per_unit; ++p) total += term(slot.column(j, p));
        y[j] += total;
      }
    };
    if (h.activation != Activation::kNone && weight)
      add([&](int64_t c) { return activation[c] / divisor * weight[c]; });
    else if (h.activation != Activation::kNone)
      add([&](int64_t c) { return activation[c] / divisor; });
    else if (weight)
      add([&](int64_t c) { return weight[c]; });
    else
      add([](int64_t) { return 1.0; });
    const int64_t per_column = h.outgoing != Outgoing::kNone ? plan.weights[slot.weight].numel() / slot.features : 1;
    elements += static_cast<double>(per_column * per_unit);
  }
  if (h.incoming != Incoming::kTimesSum && h.outgoing != Outgoing::kSum)
    for (int64_t j = 0; j < n; ++j) y[j] /= elements;
  if (h.incoming == Incoming::kNone) return;
  const auto weigh = [&](const auto& w_in, double fan_in) {
    if (h.incoming == Incoming::kTimesSum)
      for (int64_t j = 0; j < n; ++j) y[j] = y[j] / samples * w_in(j);
    else
      for (int64_t j = 0; j < n; ++j) y[j] = y[j] / (w_in(j) / fan_in);
  };
  const Maker *first = plan.makers + group.first_maker, *last = first + group.makers;
  int64_t fan_in = 0;
  for (const Maker* i = first; i < last; ++i) {
    const Weight& w = plan.weights[i->weight];
    fan_in += i->block.per_unit * (w.numel() / w.size[w.out_axis]);
  }
  if (group.makers == 1 && first->block.unit_stride == 1 && first->block.per_unit == 1)
    weigh([sum = flat + plan.weights[first->weight].outputs() + first->block.start](int64_t j) { return sum[j]; },
          fan_in);
  else
    weigh(
        [&](int64_t j) {
          double total = 0;
          for (const Maker* i = first; i < last; ++i)
            for (int64_t p = 0; p < i->block.per_unit; ++p)
              total += flat[plan.weights[i->weight].outputs() + i->block.index(j, p)];
          return total;
        },
        fan_in);
}

// a float's bits in an order of their own: less as a float is less as an integer, and -0 is +0
inline uint64_t ordered(float x) {
  const uint32_t bits = as_bits(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// a count stays at the greatest there is
inline int64_t added(int64_t count, int64_t n) {
  constexpr int64_t MOST = std::numeric_limits<int64_t>::max();
  return count > MOST - n ? MOST : count + n;
}

// u = decay * u + (1 - decay) * y and age + 1 where y is finite; then the choice. `now`, `random` and
// `keys` have room for n.
template <typename U>
void choose(const Plan& plan, const Fields& f, int64_t g, const double* y, U* now, float* random, uint64_t* keys) {
  const Header& h = *plan.header;
  const Group& group = plan.groups[g];
  const int64_t n = group.units;
  U* utility = static_cast<U*>(f.utility) + group.first_unit;
  int32_t* age = f.age + group.first_unit;
  constexpr U infinity = std::numeric_limits<U>::infinity();
  // branches would keep these loops from being vector code: what is not finite is masked
  const auto finite = [](U x) { return std::abs(x) < infinity; };
  U low = infinity, high = -infinity;
  for (int64_t j = 0; j < n; ++j) now[j] = static_cast<U>(y[j]);
  if (h.normalisation == Normalisation::kMinMax) {
    for (int64_t j = 0; j < n; ++j) {
      low = finite(now[j]) && now[j] < low ? now[j] : low;
      high = finite(now[j]) && now[j] > high ? now[j] : high;
    }
    const U range = high - low + static_cast<U>(1e-8);
    // a value that is not finite stays so
    for (int64_t j = 0; j < n; ++j) now[j] = finite(now[j]) ? (now[j] - low) / range : now[j];
  }
  if (h.score == Score::kRandom)
    for (int64_t j = 0; j < n; ++j) now[j] = finite(now[j]) ? U(0) : now[j];
  const U decay = static_cast<U>(*f.decay), rest = static_cast<U>(1.0 - *f.decay);
  // ages are whole numbers
  const int32_t maturity = static_cast<int32_t>(std::min(std::floor(*f.maturity), 2147483647.0));
  int32_t mature = 0;
  for (int64_t j = 0; j < n; ++j) {
    const bool moves = finite(now[j]);
    const U decayed = decay * utility[j] + rest * now[j];
    utility[j] = moves ? decayed : utility[j];
    age[j] += moves & (age[j] < std::numeric_limits<int32_t>::max());
    mature += age[j] > maturity;
  }
  const int64_t eligible = mature;

  const uint64_t seed = static_cast<uint64_t>(*f.seed);
  const uint64_t step = static_cast<uint64_t>(*f.step);
  const uint32_t stream = static_cast<uint32_t>(group.stream);
  double due = *f.rate * static_cast<double>(h.accrual == Accrual::kAll ? (eligible > 0) * n : eligible);
  if (h.accrual == Accrual::kWhole) due = std::trunc(due);
  const double pending = f.pending[g] + due;
  double count = h.count == Count::kFloor ? std::floor(pending) : pending > 1;
  if (h.count == Count::kCoin) {
    // the coin's element follows those of the random scores
    float coin;
    active->kernels->uniform(seed, step, stream, static_cast<uint64_t>(n), 1, &coin);
    count = std::floor(due) + (coin < due - std::floor(due));
  }

  int64_t k = 0;
  if (count > 0) {
    if (h.score == Score::kRandom) active->kernels->uniform(seed, step, stream, 0, n, random);
    BiasCorrection correction(*f.decay);
    int64_t candidates = 0;
    for (int64_t j = 0; j < n; ++j) {
      if (age[j] <= maturity) continue;
      const double divisor = h.score == Score::kPerStep ? age[j] : correction(age[j]);
      const U score = h.score == Score::kRandom ? static_cast<U>(random[j]) : static_cast<U>(utility[j] / divisor);
      if (!std::isfinite(score)) continue;
      // a float64 score beyond float32 stays a candidate, after all others
      const float key = std::min(static_cast<float>(score), std::numeric_limits<float>::max());
      keys[candidates++] = ordered(key) << 32 | static_cast<uint64_t>(j);
    }
    k = count < static_cast<double>(candidates) ? static_cast<int64_t>(count) : candidates;
    if (k < candidates) std::nth_element(keys, keys + k, keys + candidates);
    std::sort(keys, keys + k);
    for (int64_t i = 0; i < k; ++i) f.chosen[group.first_unit + i] = static_cast<int32_t>(keys[i] & 0xffffffffu);
  }
  if (h.count != Count::kCoin) f.pending[g] = pending - static_cast<double>(k);
  f.num_chosen[g] = static_cast<int32_t>(k);
  f.num_replaced[g] = added(f.num_replaced[g], k);
}

// m_h = decay * m_h + (1 - decay) * mean_s h where that mean is finite
inline void average_features(const Plan& plan, const Fields& f, const Group& group) {
  for (int64_t s = group.first_slot; s < group.first_slot + group.slots; ++s) {
    const Slot& slot = plan.slots[s];
    if (f.seen[s] == 0) continue;
    for (int64_t c = slot.first_column; c < slot.first_column + slot.columns; ++c) {
      const double mean = f.feature[c] / static_cast<double>(f.seen[s]);
      if (std::isfinite(mean)) f.running_mean[c] = *f.decay * f.running_mean[c] + (1.0 - *f.decay) * mean;
    }
  }
}

}  // namespace cbp
