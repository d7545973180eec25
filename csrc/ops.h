// The functions of a step, on tensors as the caller shows them; cbp_fast/backends/reference.py says what each does.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace cbp {

using torch::headeronly::ScalarType;

// A tensor, which belongs to the caller.
struct Array {
  void* data;
  ScalarType type;  // Undefined: none that is known here
  int64_t dims;
  const int64_t *sizes, *strides;
  bool cpu;

  // whether it is a vector without gaps
  bool is_run_of(ScalarType t) const { return cpu && type == t && dims == 1 && (strides[0] == 1 || sizes[0] <= 1); }
};

using Arrays = std::vector<Array>;
using Numbers = std::vector<int64_t>;

// All throw before anything was written if what they are given does not fit.
void capture_(const Array& buffer, const Array& table, const Array& h, int64_t slot);
int64_t select_(const Array& buffer, const Array& table, const Arrays& weights, const Arrays& held,
                const Numbers& held_slots);
void sum_(const Array& buffer, const Array& table, const Array& out, const Arrays& weights, const Arrays& held,
          const Numbers& held_slots);
int64_t choose_(const Array& buffer, const Array& table, const Array& sums, const Arrays& weights);
void reinit_(const Array& buffer, const Array& table, const Arrays& tensors, const Numbers& numbers);
// throws what `reinit_` would throw
void check_reinit(const Array& buffer, const Array& table, const Arrays& tensors, const Numbers& numbers);
void copy_(const Array& to, const Array& from);

}  // namespace cbp
