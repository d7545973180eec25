// The Python module: what is no operator on tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "isa.h"

namespace py = pybind11;

namespace {

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const cbp::Level* level = cbp::levels; level->name; ++level)
    if (level->supported()) names.emplace_back(level->name);
  return names;
}

void set_isa(const std::string& name) {
  for (const cbp::Level* level = cbp::levels; level->name; ++level)
    if (level->name == name) {
      if (!level->supported()) throw py::value_error("this CPU does not support instruction set '" + name + "'");
      cbp::active = level;
      return;
    }
  throw py::value_error("unknown instruction set '" + name + "'");
}

py::dict build_info() {
  py::dict info;
#if defined(__VERSION__)
  info["compiler"] = __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
  std::vector<std::string> compiled;
  for (const cbp::Level* level = cbp::levels; level->name; ++level) compiled.emplace_back(level->name);
  info["instruction_sets"] = compiled;
  return info;
}

std::vector<float> philox_uniform(uint64_t seed, uint32_t step, uint32_t stream, uint64_t first, int64_t n) {
  if (n < 0) throw py::value_error("philox_uniform: n is negative");
  std::vector<float> out(n);
  cbp::active->kernels->uniform(seed, step, stream, first, n, out.data());
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("isa_levels", &isa_levels, "Instruction sets this CPU can run, the least first.");
  m.def("get_isa", [] { return cbp::active->name; }, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Use another instruction set, for all threads; the results are the same.");
  m.def("build_info", &build_info, "Compiler, pybind11 and the instruction sets compiled.");
  m.def("philox_uniform", &philox_uniform, py::arg("seed"), py::arg("step"), py::arg("stream"), py::arg("first"),
        py::arg("n"), "U[0, 1) draws of elements first ... first + n - 1 of a random stream.");
}
