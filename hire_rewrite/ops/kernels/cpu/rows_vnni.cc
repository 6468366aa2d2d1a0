// The kernels for x86 with the integer products of AVX-512 (VNNI), in vectors as long as AVX2's.

#include "rows.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512vl,avx512vnni")
#endif

namespace hire {
namespace vnni {
namespace {

#include "x86.inc"

inline Ints Products(Bytes unsigned_ones, const int8_t* signed_ones) {
  const __m256i others = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(signed_ones));
  return (Ints)_mm256_dpbusd_epi32(_mm256_setzero_si256(), (__m256i)unsigned_ones, others);
}

#include "rows.inc"

}  // namespace
}  // namespace vnni

using vnni::Add;
using vnni::Dot;
using vnni::Dot4;

const Kernels kVnni = {Dot<float>, Dot<BFloat16>, Dot<int8_t>, Dot4, Add<float>, Add<BFloat16>};

}  // namespace hire

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // defined(__x86_64__)
