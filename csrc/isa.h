// What the kernels of every instruction set share, and the table of them that is in use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__GNUC__)
#define CBP_INLINE inline __attribute__((always_inline))
#define CBP_LAMBDA_INLINE __attribute__((always_inline))
#define CBP_HIDDEN __attribute__((visibility("hidden")))
#define CBP_PREFETCH(address) __builtin_prefetch(address, 1)
#else
#define CBP_INLINE inline
#define CBP_LAMBDA_INLINE
#define CBP_HIDDEN
#define CBP_PREFETCH(address)
#endif

namespace cbp {

struct Float16 {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

// the type that sums over a T run in
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

#if defined(__GNUC__)
typedef uint32_t __attribute__((may_alias)) Bits;
#else
typedef uint32_t Bits;
#endif

CBP_INLINE float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
CBP_INLINE uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

constexpr int LANES = 16;

// what is summed of an element x: abs(x), x, or abs(x - offset)
enum class Term { kMagnitude, kValue, kDistance };

struct SumKernels {
  // sum_matrix of abs(x): pointer, rows, columns, row stride, column stride, row sums or null, column sums or null
  void (*weight)(const void*, int64_t, int64_t, int64_t, int64_t, double*, double*);
  // sum_matrix over rows only, of any term
  void (*columns)(Term, const void*, int64_t, int64_t, int64_t, int64_t, const double*, double*);
  double (*run)(Term, const void*, int64_t, int64_t, double);
};

struct Kernels {
  SumKernels float16, bfloat16, float32, float64;
  void (*uniform)(uint64_t, uint64_t, uint32_t, uint64_t, int64_t, float*);
};

struct Level {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

// from the least to the best; the last has no name
CBP_HIDDEN extern const Level levels[];
CBP_HIDDEN extern const Level* active;

}  // namespace cbp
