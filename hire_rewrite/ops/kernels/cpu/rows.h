// Products with rows of a matrix, on one thread: what is compiled once for each kind of processor.

#ifndef HIRE_REWRITE_ROWS_H_
#define HIRE_REWRITE_ROWS_H_

#include <cstdint>
#include <type_traits>

namespace hire {

struct BFloat16 {
  uint16_t bits;
};

// Vectors of eight numbers, or of 32 bytes.
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(32)));
constexpr int64_t kLanes = 8, kBytes = 32, kLine = 64;  // kLine: bytes of a line of the cache

// Tokens rounded to 8 bits, with a scale for each of the blocks of a row.
struct Rounded {
  const int8_t* integers;  // [tokens, d]
  const float* scale;      // [tokens, d / block]
  const float* offset;     // [tokens, d / block]: 8 Σ of a block's integers
  int64_t tokens, d, block;
};
constexpr int64_t kMaxPieces = 2048;  // of 32 numbers, in a row

// The functions of `rows.inc` for one kind of processor. Tokens are rows of x: [tokens, d].
struct Kernels {
  // out[t * stride + i] = x[t] · rows[i], for `count` rows of length d one behind the other.
  template <typename Row>
  using Dot = void (*)(const float* x, int64_t tokens, const Row* rows, int64_t count, int64_t d,
                       float* out, int64_t stride);
  Dot<float> dot_f32;
  Dot<BFloat16> dot_bf16;
  Dot<int8_t> dot_i8;
  // The same for rows of 4 bits, two to a byte and d/2 apart, with a scale for each block. A block
  // is a multiple of kBytes long and divides half of a row.
  void (*dot_i4)(const Rounded& x, const int8_t* rows, const BFloat16* scale, int64_t count,
                 float* out, int64_t stride);
  // out[t * stride + j] += Σ_i h[t * h_stride + i] rows[i * d + j] for `width` columns j of `count`
  // rows.
  template <typename Row>
  using Add = void (*)(const float* h, int64_t tokens, int64_t h_stride, const Row* rows,
                       int64_t count, int64_t d, int64_t width, float* out, int64_t stride);
  Add<float> add_f32;
  Add<BFloat16> add_bf16;
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;  // with FMA
extern const Kernels kVnni;  // those of AVX-512
#endif

}  // namespace hire

#endif  // HIRE_REWRITE_ROWS_H_
