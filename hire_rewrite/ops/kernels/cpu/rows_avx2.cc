// The kernels for x86 with AVX2 and FMA.

#include "rows.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace hire {
namespace avx2 {
namespace {

#include "x86.inc"

inline Ints Products(Bytes unsigned_ones, const int8_t* signed_ones) {
  const __m256i others = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(signed_ones));
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)unsigned_ones, others);
  return (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

#include "rows.inc"

}  // namespace
}  // namespace avx2

using avx2::Add;
using avx2::Dot;
using avx2::Dot4;

const Kernels kAvx2 = {Dot<float>, Dot<BFloat16>, Dot<int8_t>, Dot4, Add<float>, Add<BFloat16>};

}  // namespace hire

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // defined(__x86_64__)
