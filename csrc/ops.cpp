// The functions in ops.h, and the operator whose schema is in cbp_fast/backends/cpp.py.
//
// All of LibTorch is used through its stable ABI, so that one binary serves every PyTorch from 2.10 on.
#include "ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>

#include "activations.h"
#include "checks.h"
#include "plan.h"
#include "reinit.h"
#include "select.h"
#include "targets.h"
#include "weights.h"
#include "work.h"

namespace cbp {

namespace {

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
      for (int64_t i = 0; i < group.makers; ++i) weights[plan.makers[group.first_maker + i].weight] = 1;
    }
  }
};

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

// move(mine, total, how many) for what is summed over samples: of one slot, or of the whole network
template <typename F>
void for_each_total(const Header& h, const Fields& f, int64_t first, int64_t columns, double* flat, const F& move) {
  move(f.sums + first, flat + h.slots + first, columns);
  if (h.keeps_mean) move(f.feature + first, flat + h.slots + h.columns + first, columns);
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
    if (job.region->kind == RegionKind::kTransfer) {
      dispatch(job.type, [&](auto bias) {
        dispatch(job.weight_type, [&](auto weight) {
          transfer<decltype(bias), decltype(weight)>(plan, f, *job.region, job.target, job.weight);
        });
      });
    } else {
      dispatch(job.type, [&](auto x) { reinit<decltype(x)>(plan, f, *job.region, job.entry, job.target); });
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
