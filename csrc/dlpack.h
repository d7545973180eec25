// What is needed of DLPack 1, by which libraries show each other their tensors: https://dmlc.github.io/dlpack
//
// PyTorch's own copy of its header is not for those who use the stable ABI. Layouts are those of version 1.3.
#pragma once

#include <cstdint>

namespace dlpack {

enum : int32_t { CPU = 1 };
enum : uint8_t { INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4 };

struct Tensor {
  void* data;
  struct {
    int32_t type, index;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};

// what the capsule `type(tensor).__dlpack_c_exchange_api__` points to, in one of its major versions
struct ExchangeHeader {
  struct {
    uint32_t major, minor;
  } version;
  const ExchangeHeader* older;
};

struct Exchange1 {
  ExchangeHeader header;
  void (*others[3])();
  // fills in a Tensor that is good while the object lives and stays as it is; -1 and a Python exception if it cannot
  int (*tensor_of)(void* object, Tensor* out);
  void (*stream)();
};

}  // namespace dlpack
