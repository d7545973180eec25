// Sums and random draws on raw pointers: no torch, no threads, no checks.
//
// Included once for every instruction set, in a namespace CBP_ISA under `#pragma GCC target` (isa.cpp), so there is no
// include guard. All sets give the same bits: sums run over LANES explicit lanes and fold them by a fixed tree, and the
// compiler may neither contract nor reassociate. What these functions call must be CBP_INLINE, or a copy compiled for
// another instruction set may be called instead.

namespace cbp {
namespace CBP_ISA {

// float of a float16 or bfloat16 bit pattern, exactly, without a denormal on the way
CBP_INLINE uint32_t widen(Bfloat16 x) { return static_cast<uint32_t>(x.bits) << 16; }
CBP_INLINE uint32_t widen(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = (x.bits & 0x7fffu) << 13, exponent = x.bits & 0x7c00u;
  const uint32_t normal = magnitude + (exponent == 0x7c00u ? 224u << 23 : 112u << 23);
  const float tiny = as_float(magnitude + (113u << 23)) - as_float(113u << 23);
  return sign | (exponent == 0 ? as_bits(tiny) : normal);
}

// n elements of x, `stride` apart, as the type that sums run in; a dense run of that type is not copied
template <typename T>
const Wide<T>* fetch(const void* from, int64_t stride, int64_t n, Wide<T>* buffer) {
  const T* x = static_cast<const T*>(from);
  if constexpr (std::is_same_v<T, Wide<T>>) {
    if (stride == 1) return x;
    for (int64_t i = 0; i < n; ++i) buffer[i] = x[i * stride];
  } else {
    Bits* out = reinterpret_cast<Bits*>(buffer);
    int64_t i = 0;
#ifdef CBP_F16C
    if constexpr (std::is_same_v<T, Float16>)
      for (; stride == 1 && i + 8 <= n; i += 8)
        _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
#endif
    if (stride == 1)
      for (; i < n; ++i) out[i] = widen(x[i]);
    for (; i < n; ++i) out[i] = widen(x[i * stride]);
  }
  return buffer;
}

// A matrix or vector of any type as the sums see it: runs of A, fetched. Not a template over the type, which would only
// be compiled over and over.
template <typename A>
struct Source {
  const char* data;
  int64_t item;
  const A* (*fetch)(const void*, int64_t, int64_t, A*);
  const A* run(int64_t at, int64_t stride, int64_t n, A* buffer) const {
    return fetch(data + at * item, stride, n, buffer);
  }
};

#if defined(__GNUC__)
// abs of every lane: the sign bit cleared
template <typename V>
CBP_INLINE V magnitude(V x) {
  using Lane = std::conditional_t<sizeof(x[0]) == 8, int64_t, int32_t>;
  typedef Lane Integers __attribute__((vector_size(sizeof(V)), may_alias));
  return (V)((Integers)x & std::numeric_limits<Lane>::max());
}
#endif

template <Term TERM, typename A>
CBP_INLINE A term(A x, A offset) {
  if constexpr (TERM == Term::kValue) return x;
  if constexpr (TERM == Term::kDistance) return std::abs(x - offset);
  return std::abs(x);
}

#if defined(__GNUC__)
template <typename A, int WIDTH>
using Run __attribute__((vector_size(WIDTH * sizeof(A)), aligned(alignof(A)), may_alias)) = A;
#endif

// sum of the lanes, by halves
template <typename A>
CBP_INLINE A fold(A* lane) {
  static_assert(LANES == 16);
#if defined(__GNUC__)
  *reinterpret_cast<Run<A, 8>*>(lane) += *reinterpret_cast<Run<A, 8>*>(lane + 8);
  *reinterpret_cast<Run<A, 4>*>(lane) += *reinterpret_cast<Run<A, 4>*>(lane + 4);
#else
  for (int width = 8; width > 2; width /= 2)
    for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
#endif
  return (lane[0] + lane[2]) + (lane[1] + lane[3]);
}

// sum of eight terms, or the only one
template <typename V, int R>
CBP_INLINE V tree(const V (&t)[R]) {
  if constexpr (R == 8) return ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]));
  return t[0];
}

// For R rows of n elements: rows[r] += sum_i term(x[r][i]) and column[i] += sum_r term(x[r][i]). Reads x once.
//
// Eight rows at a time are eight streams from memory, which one core reads half as fast again as a single one.
// With COLUMNS the offset of Term::kDistance is one a column, else offset[0] alone.
template <Term TERM, int R, bool ROWS, bool COLUMNS, typename A>
CBP_INLINE void add_rows(const A* const (&x)[R], const A* offset, double* rows, A* column, int64_t n) {
  alignas(64) A lane[R][LANES] = {};
  int64_t i = 0;
#if defined(__GNUC__)
  // spelled out in vectors, since compilers keep an array of lanes in memory
  constexpr int WIDTH = CBP_VECTOR_BYTES / sizeof(A), COUNT = LANES / WIDTH;
  typedef A Vector __attribute__((vector_size(CBP_VECTOR_BYTES), may_alias));
  using Unaligned = Run<A, WIDTH>;
  Vector sum[R][COUNT] = {};
  for (; i + LANES <= n; i += LANES)
#pragma GCC unroll 16
    for (int v = 0; v < COUNT; ++v) {
      const int64_t at = i + v * WIDTH;
      Vector t[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        t[r] = *reinterpret_cast<const Unaligned*>(x[r] + at);
        if constexpr (TERM == Term::kDistance && COLUMNS) t[r] -= *reinterpret_cast<const Unaligned*>(offset + at);
        if constexpr (TERM == Term::kDistance && !COLUMNS) t[r] -= offset[0];
        if constexpr (TERM != Term::kValue) t[r] = magnitude(t[r]);
        if constexpr (ROWS) sum[r][v] += t[r];
      }
      if constexpr (COLUMNS) *reinterpret_cast<Unaligned*>(column + at) += tree(t);
    }
  if constexpr (ROWS) std::memcpy(lane, sum, sizeof lane);
#endif
  for (; i < n; ++i) {
    A t[R];
    for (int r = 0; r < R; ++r) {
      t[r] = term<TERM>(x[r][i], TERM == Term::kDistance ? offset[COLUMNS ? i : 0] : A(0));
      if constexpr (ROWS) lane[r][i % LANES] += t[r];
    }
    if constexpr (COLUMNS) column[i] += tree(t);
  }
  if constexpr (ROWS)
    for (int r = 0; r < R; ++r) rows[r] += fold(lane[r]);
}

// rows[r] += sum_i term(x[r, i]) and columns[i] += sum_r term(x[r, i]), in double, over x [num_rows, n].
//
// Reads x once, in blocks of columns whose sums stay in the first cache, and passes partial sums of at most SPAN rows
// on to double. `offset` [n] is for Term::kDistance. Either result may be left out.
template <typename A, Term TERM, bool ROWS, bool COLUMNS>
void sum_matrix(const Source<A>& x, int64_t num_rows, int64_t n, int64_t row_stride, int64_t stride,
                const double* offset, double* rows, double* columns) {
  // what is read in place comes from memory once; eight copied rows and their sums must fit the first cache
  constexpr int64_t IN_PLACE = 2048, COPIED = 512, SPAN = 512;
  const int64_t block = x.item == sizeof(A) && stride == 1 ? IN_PLACE : COPIED;
  alignas(64) A column[IN_PLACE], shift[IN_PLACE], copy[8][COPIED];
  for (int64_t start = 0; start < n; start += block) {
    const int64_t width = n - start < block ? n - start : block;
    if constexpr (TERM == Term::kDistance)
      for (int64_t i = 0; i < width; ++i) shift[i] = static_cast<A>(offset[start + i]);
    const auto row = [&](int64_t r, A* buffer)
                         CBP_LAMBDA_INLINE { return x.run(r * row_stride + start * stride, stride, width, buffer); };
    for (int64_t first = 0; first < num_rows; first += SPAN) {
      const int64_t last = num_rows - first < SPAN ? num_rows : first + SPAN;
      int64_t r = first;
      if constexpr (COLUMNS) std::memset(column, 0, width * sizeof(A));
      for (; r + 8 <= last; r += 8) {
        const A* eight[8];
        for (int i = 0; i < 8; ++i) eight[i] = row(r + i, copy[i]);
        add_rows<TERM, 8, ROWS, COLUMNS>(eight, shift, rows + r, column, width);
      }
      for (; r < last; ++r) {
        const A* const one[] = {row(r, copy[0])};
        add_rows<TERM, 1, ROWS, COLUMNS>(one, shift, rows + r, column, width);
      }
      if constexpr (COLUMNS)
        for (int64_t i = 0; i < width; ++i) columns[start + i] += column[i];
    }
  }
}

// sum_i term(x[i]) of one run, in double; partial sums of at most BLOCK elements
template <typename A, Term TERM>
double sum_vector(const Source<A>& x, int64_t n, int64_t stride, double offset) {
  constexpr int64_t BLOCK = 2048;
  alignas(64) A copy[BLOCK];
  double total = 0;
  for (int64_t start = 0; start < n; start += BLOCK) {
    const int64_t width = n - start < BLOCK ? n - start : BLOCK;
    const A* const one[] = {x.run(start * stride, stride, width, copy)};
    const A shift = static_cast<A>(offset);
    add_rows<TERM, 1, true, false>(one, &shift, &total, static_cast<A*>(nullptr), width);
  }
  return total;
}

// The random words of the elements 4 * block ... 4 * block + 4 * BLOCKS - 1: Philox4x32-10 (Salmon et al., SC 2011)
// with key = seed and counter = (block low, block high ^ step high << 16, step low, stream).
constexpr int BLOCKS = 8;
CBP_INLINE void philox(uint64_t seed, uint64_t step, uint32_t stream, uint64_t block, uint32_t (&word)[4 * BLOCKS]) {
  uint32_t c0[BLOCKS], c1[BLOCKS], c2[BLOCKS], c3[BLOCKS];
  for (int b = 0; b < BLOCKS; ++b) {
    c0[b] = static_cast<uint32_t>(block + b);
    c1[b] = static_cast<uint32_t>((block + b) >> 32 ^ step >> 32 << 16);
    c2[b] = static_cast<uint32_t>(step);
    c3[b] = stream;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
    for (int b = 0; b < BLOCKS; ++b) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c0[b], p1 = uint64_t{0xCD9E8D57u} * c2[b];
      c0[b] = static_cast<uint32_t>(p1 >> 32) ^ c1[b] ^ k0;
      c1[b] = static_cast<uint32_t>(p1);
      c2[b] = static_cast<uint32_t>(p0 >> 32) ^ c3[b] ^ k1;
      c3[b] = static_cast<uint32_t>(p0);
    }
  for (int b = 0; b < BLOCKS; ++b) {
    word[4 * b] = c0[b];
    word[4 * b + 1] = c1[b];
    word[4 * b + 2] = c2[b];
    word[4 * b + 3] = c3[b];
  }
}

// out[i] = r of element first + i, with r = (word >> 8) * 2^-24 in [0, 1)
void uniform(uint64_t seed, uint64_t step, uint32_t stream, uint64_t first, int64_t n, float* out) {
  uint32_t word[4 * BLOCKS];
  int64_t i = 0;
  while (i < n) {
    const uint64_t element = first + i;
    philox(seed, step, stream, element / 4, word);
    const int64_t skip = element % 4;
    const int64_t count = n - i < 4 * BLOCKS - skip ? n - i : 4 * BLOCKS - skip;
    for (int64_t w = 0; w < count; ++w) out[i + w] = static_cast<float>(word[skip + w] >> 8) * 0x1p-24f;
    i += count;
  }
}

template <typename A>
void sum_weight(const Source<A>& x, int64_t m, int64_t n, int64_t rs, int64_t s, double* rows, double* columns) {
  if (rows && columns)
    sum_matrix<A, Term::kMagnitude, true, true>(x, m, n, rs, s, nullptr, rows, columns);
  else if (rows)
    sum_matrix<A, Term::kMagnitude, true, false>(x, m, n, rs, s, nullptr, rows, nullptr);
  else
    sum_matrix<A, Term::kMagnitude, false, true>(x, m, n, rs, s, nullptr, nullptr, columns);
}

template <typename A>
void sum_columns(const Source<A>& x, Term term, int64_t m, int64_t n, int64_t rs, int64_t s, const double* offset,
                 double* columns) {
  if (term == Term::kMagnitude)
    sum_matrix<A, Term::kMagnitude, false, true>(x, m, n, rs, s, nullptr, nullptr, columns);
  else if (term == Term::kValue)
    sum_matrix<A, Term::kValue, false, true>(x, m, n, rs, s, nullptr, nullptr, columns);
  else
    sum_matrix<A, Term::kDistance, false, true>(x, m, n, rs, s, offset, nullptr, columns);
}

template <typename A>
double sum_run(const Source<A>& x, Term term, int64_t n, int64_t s, double offset) {
  if (term == Term::kMagnitude) return sum_vector<A, Term::kMagnitude>(x, n, s, 0);
  if (term == Term::kValue) return sum_vector<A, Term::kValue>(x, n, s, 0);
  return sum_vector<A, Term::kDistance>(x, n, s, offset);
}

template <typename T>
Source<Wide<T>> source(const void* data) {
  return {static_cast<const char*>(data), sizeof(T), fetch<T>};
}

template <typename T>
constexpr SumKernels sum_kernels() {
  return {
      [](const void* x, int64_t m, int64_t n, int64_t rs, int64_t s, double* rows, double* columns) {
        sum_weight(source<T>(x), m, n, rs, s, rows, columns);
      },
      [](Term term, const void* x, int64_t m, int64_t n, int64_t rs, int64_t s, const double* offset, double* columns) {
        sum_columns(source<T>(x), term, m, n, rs, s, offset, columns);
      },
      [](Term term, const void* x, int64_t n, int64_t s, double offset) {
        return sum_run(source<T>(x), term, n, s, offset);
      },
  };
}

constexpr Kernels kernels = {sum_kernels<Float16>(), sum_kernels<Bfloat16>(), sum_kernels<float>(),
                             sum_kernels<double>(), uniform};

}  // namespace CBP_ISA
}  // namespace cbp
