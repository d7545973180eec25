// The Python module.
//
// The functions of a step get tensors as PyTorch shows them to DLPack (`torch.Tensor.__dlpack_c_exchange_api__`), with
// no call of the dispatcher: in a training loop, where its code is out of the caches, it takes longer than the sums of
// a small network.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__unix__) || defined(__APPLE__)
#define CBP_PIPES 1
#include <sys/uio.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "dlpack.h"
#include "isa.h"
#include "ops.h"

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

std::vector<float> philox_uniform(uint64_t seed, uint64_t step, uint32_t stream, uint64_t first, int64_t n) {
  if (n < 0) throw py::value_error("philox_uniform: n is negative");
  std::vector<float> out(n);
  cbp::active->kernels->uniform(seed, step, stream, first, n, out.data());
  return out;
}

PyTypeObject* tensor_type;
int (*tensor_of)(void*, dlpack::Tensor*);

void find_exchange() {
  const py::object tensor = py::module_::import("torch").attr("Tensor");
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  const void* api = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (!api) throw py::error_already_set();
  const auto* header = static_cast<const dlpack::ExchangeHeader*>(api);
  while (header && header->version.major != 1) header = header->older;
  if (header) tensor_of = reinterpret_cast<const dlpack::Exchange1*>(header)->tensor_of;
  if (!tensor_of) throw py::import_error("this PyTorch does not show its tensors by DLPack 1");
  tensor_type = reinterpret_cast<PyTypeObject*>(tensor.ptr());
}

cbp::ScalarType type_of(const dlpack::Tensor& t) {
  using cbp::ScalarType;
  switch (t.dtype.lanes == 1 ? t.dtype.code << 8 | t.dtype.bits : -1) {
    case dlpack::FLOAT << 8 | 16:
      return ScalarType::Half;
    case dlpack::BFLOAT << 8 | 16:
      return ScalarType::BFloat16;
    case dlpack::FLOAT << 8 | 32:
      return ScalarType::Float;
    case dlpack::FLOAT << 8 | 64:
      return ScalarType::Double;
    case dlpack::INT << 8 | 64:
      return ScalarType::Long;
    case dlpack::UINT << 8 | 8:
      return ScalarType::Byte;
    default:
      return ScalarType::Undefined;
  }
}

void read(PyObject* from, int64_t& to) {
  to = PyLong_AsLongLong(from);
  if (to == -1 && PyErr_Occurred()) throw py::error_already_set();
}

int64_t numel(const dlpack::Tensor& t) {
  int64_t n = 1;
  for (int32_t d = 0; d < t.ndim; ++d) n *= t.shape[d];
  return n;
}

void read(PyObject* from, cbp::Array& to) {
  if (!PyObject_TypeCheck(from, tensor_type))
    throw py::type_error(std::string("cbp_fast: a ") + Py_TYPE(from)->tp_name + " stands for a torch.Tensor");
  dlpack::Tensor t;
  if (tensor_of(from, &t) != 0) throw py::error_already_set();
  // as of a subclass that only wraps others
  if (!t.data && numel(t)) throw std::runtime_error("cbp_fast: a tensor has no memory of its own");
  to = {
      static_cast<char*>(t.data) + t.byte_offset, type_of(t), t.ndim, t.shape, t.strides, t.device.type == dlpack::CPU};
}

template <typename T>
void read(PyObject* from, std::vector<T>& to) {
  if (!PyList_Check(from))
    throw py::type_error(std::string("cbp_fast: a ") + Py_TYPE(from)->tp_name + " stands for a list");
  const Py_ssize_t n = PyList_GET_SIZE(from);
  to.resize(n);
  for (Py_ssize_t i = 0; i < n; ++i) read(PyList_GET_ITEM(from, i), to[i]);
}

// A C++ function on arrays and numbers as one of Python.
template <auto FUNCTION>
struct Call;
template <typename R, typename... A, R (*FUNCTION)(A...)>
struct Call<FUNCTION> {
  template <size_t... I>
  static PyObject* with(PyObject* const* from, std::index_sequence<I...>) {
    std::tuple<std::decay_t<A>...> to;
    (read(from[I], std::get<I>(to)), ...);
    const auto run = [&] {
      // the caller's lists keep the tensors
      py::gil_scoped_release without;
      return FUNCTION(std::get<I>(to)...);
    };
    if constexpr (std::is_void_v<R>) {
      run();
      Py_RETURN_NONE;
    } else {
      return PyLong_FromLongLong(run());
    }
  }

  static PyObject* call(PyObject*, PyObject* const* from, Py_ssize_t n) {
    try {
      if (n != static_cast<Py_ssize_t>(sizeof...(A)))
        throw py::type_error("cbp_fast: takes " + std::to_string(sizeof...(A)) + " arguments, not " +
                             std::to_string(n));
      return with(from, std::index_sequence_for<A...>());
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const py::builtin_exception& error) {
      error.set_error();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  static PyMethodDef named(const char* name) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)), METH_FASTCALL,
            "See the function of this name in cbp_fast.backends.reference or cpp."};
  }
};

PyObject* nbytes(PyObject*, PyObject* from) {
  dlpack::Tensor t;
  if (!PyObject_TypeCheck(from, tensor_type) || tensor_of(from, &t) != 0 || t.device.type != dlpack::CPU ||
      (!t.data && numel(t))) {
    PyErr_Clear();
    return PyLong_FromLong(-1);
  }
  return PyLong_FromLongLong(numel(t) * t.dtype.bits * t.dtype.lanes / 8);
}

// Two lists of tensors have the same layout if types, devices, sizes and strides are the same, and the addresses modulo
// 16. For backends that keep tables of tensors: to ask each tensor in Python takes longer than a small network's step.
PyObject* describe(PyObject*, PyObject* from) {
  if (!PyList_Check(from)) {
    PyErr_Format(PyExc_TypeError, "cbp_fast: a %s stands for a list", Py_TYPE(from)->tp_name);
    return nullptr;
  }
  const Py_ssize_t n = PyList_GET_SIZE(from);
  py::list addresses(n);
  std::vector<int64_t> layout;
  layout.reserve(8 * n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* const item = PyList_GET_ITEM(from, i);
    dlpack::Tensor t;
    if (!PyObject_TypeCheck(item, tensor_type)) {
      PyErr_Format(PyExc_TypeError, "cbp_fast: a %s stands for a torch.Tensor", Py_TYPE(item)->tp_name);
      return nullptr;
    }
    if (tensor_of(item, &t) != 0) return nullptr;
    if (!t.data && numel(t)) {
      PyErr_SetString(PyExc_RuntimeError, "cbp_fast: a tensor has no memory of its own");
      return nullptr;
    }
    const int64_t address = reinterpret_cast<int64_t>(t.data) + static_cast<int64_t>(t.byte_offset);
    layout.push_back(int64_t{t.device.type} << 32 | t.device.index);
    layout.push_back(int64_t{t.ndim} << 48 | int64_t{t.dtype.lanes} << 24 | t.dtype.bits << 16 | t.dtype.code << 8 |
                     (address & 15));
    layout.insert(layout.end(), t.shape, t.shape + t.ndim);
    layout.insert(layout.end(), t.strides, t.strides + t.ndim);
    PyList_SET_ITEM(addresses.ptr(), i, PyLong_FromLongLong(address));
  }
  const auto* bytes = reinterpret_cast<const char*>(layout.data());
  return PyTuple_Pack(2, py::bytes(bytes, layout.size() * sizeof(int64_t)).ptr(), addresses.ptr());
}

// Whether all of some bytes in memory can be written; they keep their values. A system call says so of memory where a
// plain write would end the process.
bool can_write(const std::vector<char*>& bytes) {
#ifdef CBP_PIPES
  int ends[2];
  // without a free descriptor nothing is known
  if (pipe(ends) != 0) return true;
  constexpr size_t MOST = 512;
  iovec parts[MOST];
  bool can = true;
  for (size_t first = 0; can && first < bytes.size(); first += MOST) {
    const size_t n = std::min(MOST, bytes.size() - first);
    for (size_t i = 0; i < n; ++i) parts[i] = {bytes[first + i], 1};
    const auto count = static_cast<int>(n);
    can = writev(ends[1], parts, count) == static_cast<ssize_t>(n) &&
          readv(ends[0], parts, count) == static_cast<ssize_t>(n);
  }
  close(ends[0]);
  close(ends[1]);
  return can;
#else
  return true;
#endif
}

// whether no two elements share memory, as far as sizes and strides, the least stride first, tell
bool is_apart(const dlpack::Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> axes;
  for (int32_t d = 0; d < t.ndim; ++d)
    if (t.shape[d] > 1) axes.emplace_back(t.strides[d], t.shape[d]);
  std::sort(axes.begin(), axes.end());
  int64_t extent = 1;
  for (const auto& [stride, size] : axes) {
    if (stride < extent) return false;
    extent += (size - 1) * stride;
  }
  return true;
}

// The first tensor of a list that cannot be written, as (index, reason); None if all can be. `rooms`: the bytes from
// each tensor's first element to the end of its memory.
PyObject* unwritable(PyObject*, PyObject* const* from, Py_ssize_t count) {
  if (count != 2 || !PyList_Check(from[0]) || !PyList_Check(from[1]) ||
      PyList_GET_SIZE(from[0]) != PyList_GET_SIZE(from[1])) {
    PyErr_SetString(PyExc_TypeError, "cbp_fast: unwritable takes two lists of one length");
    return nullptr;
  }
  const Py_ssize_t n = PyList_GET_SIZE(from[0]);
  const auto found = [](Py_ssize_t i, const char* reason) { return Py_BuildValue("(ns)", i, reason); };
  std::vector<char*> all;
  std::vector<Py_ssize_t> of;
  for (Py_ssize_t i = 0; i < n; ++i) {
    dlpack::Tensor t;
    PyObject* const item = PyList_GET_ITEM(from[0], i);
    if (!PyObject_TypeCheck(item, tensor_type) || tensor_of(item, &t) != 0) {
      PyErr_Clear();
      return found(i, "does not show its memory");
    }
    const int64_t size = numel(t);
    if (size == 0) continue;
    if (!t.data) return found(i, "has no memory of its own");
    if (!is_apart(t)) return found(i, "has elements that share memory");
    int64_t last = 0;
    for (int32_t d = 0; d < t.ndim; ++d) last += (t.shape[d] - 1) * t.strides[d];
    const int64_t bytes = t.dtype.bits * t.dtype.lanes / 8, room = PyLong_AsLongLong(PyList_GET_ITEM(from[1], i));
    if (room == -1 && PyErr_Occurred()) return nullptr;
    if ((last + 1) * bytes > room) return found(i, "has less memory than elements: it was freed");
    if (t.device.type != dlpack::CPU) continue;
    char* const data = static_cast<char*>(t.data) + t.byte_offset;
    for (char* const byte : {data, data + last * bytes}) {
      all.push_back(byte);
      of.push_back(i);
    }
  }
  if (can_write(all)) Py_RETURN_NONE;
  for (size_t i = 0; i < all.size(); ++i)
    if (!can_write({all[i]})) return found(of[i], "lies in memory that is read-only");
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"nbytes", &nbytes, METH_O, "Bytes of a tensor's elements on the CPU; -1 if it has none."},
    {"describe", &describe, METH_O, "(layout: bytes, addresses: list of int) of a list of tensors."},
    Call<&cbp::capture_>::named("capture_"),
    Call<&cbp::select_>::named("select_"),
    Call<&cbp::sum_>::named("sum_"),
    Call<&cbp::choose_>::named("choose_"),
    Call<&cbp::reinit_>::named("reinit_"),
    Call<&cbp::check_reinit>::named("check_reinit"),
    Call<&cbp::copy_>::named("copy_"),
    {"unwritable", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&unwritable)), METH_FASTCALL,
     "(index, reason) of the first tensor of a list that cannot be written, by the bytes that each may take, or None."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PYBIND11_MODULE(_C, m) {
  find_exchange();
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
  m.def("isa_levels", &isa_levels, "Instruction sets this CPU can run, the least first.");
  m.def("get_isa", [] { return cbp::active->name; }, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name"),
        "Use another instruction set, for all threads; the results are the same.");
  m.def("build_info", &build_info, "Compiler, pybind11 and the instruction sets compiled.");
  m.def("philox_uniform", &philox_uniform, py::arg("seed"), py::arg("step"), py::arg("stream"), py::arg("first"),
        py::arg("n"), "U[0, 1) draws of elements first ... first + n - 1 of a random stream.");
}
