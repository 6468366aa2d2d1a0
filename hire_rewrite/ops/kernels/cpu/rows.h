// Products with rows of a matrix, on one thread: what is compiled once for each kind of processor.

#ifndef HIRE_REWRITE_ROWS_H_
#define HIRE_REWRITE_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <type_traits>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace hire {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Vectors of so many bytes.
template <int kBytes>
struct Vectors;
template <>
struct Vectors<32> {
  typedef float Floats __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef uint8_t Bytes __attribute__((vector_size(32)));
};
template <>
struct Vectors<64> {
  typedef float Floats __attribute__((vector_size(64)));
  typedef int32_t Ints __attribute__((vector_size(64)));
  typedef uint8_t Bytes __attribute__((vector_size(64)));
};

typedef float Four __attribute__((vector_size(16)));

constexpr int64_t kLine = 64;   // bytes of a line of the cache
constexpr int64_t kPiece = 32;  // columns that blocks, and halves of rows of 4 bits, are multiples of
constexpr int64_t kMaxColumns = 1 << 16;  // of rows in blocks

// Scales or minima of blocks: [n, blocks], of one of three types.
struct Factors {
  const float* float32;
  const BFloat16* bfloat16;
  const Float16* float16;
};

// Rows of integers, with a scale for each block of columns, which is multiplied, and perhaps a
// minimum, which is added.
struct Blocks {
  const int8_t* integers;  // [n, bytes]: d of 8 bits, or d / 2 of two numbers each that are d / 2 apart
  bool narrow;             // 4 bits: −8 to 7, or 0 to 15 where there are minima
  bool minima;
  Factors scale, minimum;  // [n, blocks]
  float ratio;             // where minima are so many scales each, and not stored
  int64_t d, bytes, blocks;
  int64_t pieces;  // of a block
  int64_t second;  // the block of the first number in the high bits, and how many pieces of it
  int64_t before;  // are before that
};

// Functions here have no linkage: each kind of processor has its own.
static inline Blocks BlocksOf(bool narrow, bool minima, int64_t d, int64_t blocks) {
  Blocks rows = {};
  rows.narrow = narrow;
  rows.minima = minima;
  rows.d = d;
  rows.bytes = narrow ? d / 2 : d;
  rows.blocks = blocks;
  rows.pieces = d / blocks / kPiece;
  rows.second = d / 2 / kPiece / rows.pieces;
  rows.before = d / 2 / kPiece % rows.pieces;
  return rows;
}

// The functions of `rows.inc`, `blocks.inc` and `rounded.inc` for one kind of processor. Tokens are
// rows of x: [tokens, d].
struct Kernels {
  // out[t * stride + i] = x[t] · rows[i], for `count` rows of length d one behind the other.
  template <typename Row>
  using Dot = void (*)(const float* x, int64_t tokens, const Row* rows, int64_t count, int64_t d,
                       float* out, int64_t stride);
  Dot<float> dot_f32;
  Dot<BFloat16> dot_bf16;
  Dot<int8_t> dot_i8;
  // out[t * stride + j] += Σ_i h[t * h_stride + i] rows[i * d + j] for `width` columns j of `count`
  // rows.
  template <typename Row>
  using Add = void (*)(const float* h, int64_t tokens, int64_t h_stride, const Row* rows,
                       int64_t count, int64_t d, int64_t width, float* out, int64_t stride);
  Add<float> add_f32;
  Add<BFloat16> add_bf16;
  // out[t * stride + i] = x[t] · rows[i] for begin ≤ i < end.
  void (*dot_blocks)(const float* x, int64_t tokens, const Blocks& rows, int64_t begin, int64_t end,
                     float* out, int64_t stride);
  // out[i] = x · rows[picked[i]], of one token.
  void (*dot_picked)(const float* x, const Blocks& rows, const int32_t* picked, int64_t count,
                     float* out);
  // out += Σ_i h[i] rows[picked[i]], of one token, for columns that lie in bytes of a row from `begin`
  // to `end`, in pieces.
  void (*add_picked)(const float* h, const Blocks& rows, const int32_t* picked, int64_t count,
                     int64_t begin, int64_t end, float* out);
  // As `dot_blocks`, for tokens that `round` rounded to 8 bits for these rows, with a scale for each `block`
  // columns. It takes `rounded_bytes` of memory at a multiple of kLine.
  int64_t (*rounded_bytes)(int64_t tokens, const Blocks& rows);
  void (*round)(const float* x, int64_t tokens, int64_t block, const Blocks& rows, void* rounded);
  void (*dot_rounded)(const void* rounded, int64_t tokens, const Blocks& rows, int64_t begin,
                      int64_t end, float* out, int64_t stride);
  // A bound that at least k of n integers reach, and fewer than k exceed. 0 < k ≤ n.
  int32_t (*kth)(const int32_t* keys, int64_t n, int64_t k);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;  // with FMA and F16C
extern const Kernels kVnni;  // those of AVX-512

inline bool RunsAvx2() {
  // Not every clang knows "f16c" by name.
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

inline bool RunsVnni() {
  return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

}  // namespace hire

#endif  // HIRE_REWRITE_ROWS_H_
