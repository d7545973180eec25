// The kernels for every instruction set this compiler can target.
#include "isa.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CBP_X86_LEVELS 1
#include <immintrin.h>
#endif

#define CBP_ISA baseline
#define CBP_VECTOR_BYTES 16
#include "kernels.h"
#undef CBP_ISA
#undef CBP_VECTOR_BYTES

#ifdef CBP_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define CBP_F16C 1
#define CBP_ISA v3
#define CBP_VECTOR_BYTES 32
#include "kernels.h"
#undef CBP_ISA
#undef CBP_VECTOR_BYTES
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define CBP_ISA v4
#define CBP_VECTOR_BYTES 64
#include "kernels.h"
#undef CBP_ISA
#undef CBP_VECTOR_BYTES
#pragma GCC pop_options
#endif

namespace cbp {

const Level levels[] = {
    {"baseline", &baseline::kernels, [] { return true; }},
#ifdef CBP_X86_LEVELS
    {"v3", &v3::kernels,
     [] {
       // the rest of v3: the oldest CPU with AVX2 and BMI2 has MOVBE and F16C too
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
              __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("f16c");
     }},
    {"v4", &v4::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl");
     }},
#endif
    {nullptr, nullptr, nullptr},
};

const Level* active = [] {
  const Level* best = levels;
  for (const Level* level = levels; level->name; ++level)
    if (level->supported()) best = level;
  return best;
}();

}  // namespace cbp
