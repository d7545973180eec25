// What `reinit_` is given, checked.
#pragma once

#include <vector>

#include "checks.h"
#include "reinit.h"

namespace cbp {
namespace {

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

// What of one tensor is set anew.
struct Job {
  const Region* region;
  bool entry;  // of the optimizer's state
  Target target, weight;
  ScalarType type, weight_type;
};

// Everything that can be wrong with what `reinit_` gets is found here. Numbers in `numbers`: 2 * region, and
// 2 * region + 1 for an entry of the optimizer's state. A transfer takes two tensors: the bias, and the weight that
// reads the units.
std::vector<Job> jobs_of(const Plan& plan, const Arrays& tensors, const Numbers& numbers) {
  std::vector<Job> jobs;
  jobs.reserve(numbers.size());
  size_t next = 0;
  for (const int64_t number : numbers) {
    CBP_CHECK(number >= 0 && number / 2 < plan.header->regions, "no such region");
    const Region& region = plan.regions[number / 2];
    CBP_CHECK(next + (region.kind == RegionKind::kTransfer) < tensors.size(), "too few tensors");
    Job job{&region, number % 2 == 1, target_of(tensors[next], region), {}, tensors[next].type, {}};
    sum_kernels(job.type);
    if (region.kind == RegionKind::kTransfer) {
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
}  // namespace cbp
