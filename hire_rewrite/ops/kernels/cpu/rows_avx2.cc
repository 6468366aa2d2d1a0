// The kernels for x86 with AVX2, FMA and F16C.

#include "rows.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace hire {
namespace avx2 {
namespace {

constexpr int kBytes = 32;
constexpr int64_t kLanes = kBytes / 4;
using Floats = Vectors<kBytes>::Floats;
using Ints = Vectors<kBytes>::Ints;

inline Ints LoadInts(const int8_t* p) {
  return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

inline Ints LoadInts(const uint16_t* p) {
  return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline Floats Load(const Float16* p) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline float Wide(Float16 v) { return _cvtsh_ss(v.bits); }

using Bytes = Vectors<kBytes>::Bytes;

constexpr int kSums = 8;
constexpr int32_t kShift = 0;  // sums of two products of 8 bits without a sign overflow

inline Ints AddProducts(Ints sums, Bytes u, Bytes s) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)u, (__m256i)s);
  return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

inline Ints AddSigned(Ints sums, Bytes w, Bytes s) {
  const __m256i flipped = _mm256_sign_epi8((__m256i)s, (__m256i)w);
  return AddProducts(sums, (Bytes)_mm256_abs_epi8((__m256i)w), (Bytes)flipped);
}

inline Floats Evens(Floats a, Floats b) {
  return (Floats)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
}

inline Floats Odds(Floats a, Floats b) {
  return (Floats)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd);
}

template <int T>
inline Bytes Repeat(const void* p) {
  if constexpr (T == 1) {
    return (Bytes)_mm256_loadu_si256(static_cast<const __m256i*>(p));
  } else if constexpr (T == 2) {
    return (Bytes)_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  } else if constexpr (T == 4) {
    int64_t eight;
    __builtin_memcpy(&eight, p, sizeof(eight));
    return (Bytes)_mm256_set1_epi64x(eight);
  } else {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof(four));
    return (Bytes)_mm256_set1_epi32(four);
  }
}

#include "eight.inc"
#include "rows.inc"
#include "blocks.inc"
#include "rounded.inc"
#include "select.inc"

}  // namespace
}  // namespace avx2

using namespace avx2;

const Kernels kAvx2 = {
    Dot<float>,   Dot<BFloat16>, Dot<int8_t>, Add<float>,     Add<BFloat16>,
    DotAnyBlocks, DotAnyPicked, AddAnyPicked, RoundedBytes, Round, DotAnyRounded,
    Kth,
};

}  // namespace hire

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // defined(__x86_64__)
