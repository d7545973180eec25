// What only keeps a wrong argument from reading or writing elsewhere; types of elements. Of ops.cpp, as are the files
// that include it.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "ops.h"
#include "plan.h"

// the caller's arguments were checked in Python
#define CBP_CHECK(condition, message) \
  if (!(condition)) throw std::runtime_error(std::string("cbp_fast: ") + (message))

namespace cbp {
namespace {

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

Plan checked_plan(const Array& buffer, const Array& table) {
  CBP_CHECK(table.is_run_of(ScalarType::Long) && table.sizes[0] >= static_cast<int64_t>(sizeof(Header) / 8),
            "the plan must be a contiguous int64 tensor on the CPU");
  const Plan plan(static_cast<const int64_t*>(table.data));
  CBP_CHECK(table.sizes[0] == Plan::size(*plan.header), "the plan has a wrong size");
  CBP_CHECK(buffer.is_run_of(ScalarType::Byte) && buffer.sizes[0] == plan.header->bytes,
            "the buffer must be a contiguous uint8 tensor of the plan's size on the CPU");
  return plan;
}

}  // namespace
}  // namespace cbp
