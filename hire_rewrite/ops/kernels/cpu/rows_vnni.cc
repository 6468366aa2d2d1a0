// The kernels for x86 with the integer products of AVX-512 (VNNI).

#include "rows.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")
#endif

namespace hire {
namespace vnni {
namespace {

constexpr int kBytes = 64;
constexpr int64_t kLanes = kBytes / 4;
using Floats = Vectors<kBytes>::Floats;
using Ints = Vectors<kBytes>::Ints;

inline Ints LoadInts(const int8_t* p) {
  return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline Ints LoadInts(const uint16_t* p) {
  return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline Floats Load(const Float16* p) {
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline float Wide(Float16 v) { return _cvtsh_ss(v.bits); }

inline float Sum(Floats v) { return _mm512_reduce_add_ps((__m512)v); }

// Numbers are looked up: sixteen of them are one vector.
template <bool kMinimum>
struct Nibbles {
  Floats low, high;
  Nibbles(const float* scale, const float* minimum) {
    const Floats integers = kMinimum
                                ? Floats{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
                                : Floats{0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    low = integers * scale[0];
    high = integers * scale[1];
    if (kMinimum) low += minimum[0], high += minimum[1];
  }
  void Get(const int8_t* p, Floats* lows, Floats* highs) const {
    const __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    *lows = (Floats)_mm512_permutexvar_ps(both, (__m512)low);
    *highs = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), (__m512)high);
  }
};

using Bytes32 = Vectors<32>::Bytes;
using Bytes64 = Vectors<64>::Bytes;

constexpr int32_t kShift = 128;
constexpr int kSums = 16;

inline Vectors<32>::Ints AddProducts(Vectors<32>::Ints sums, Bytes32 u, Bytes32 s) {
  return (Vectors<32>::Ints)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)u, (__m256i)s);
}

inline Ints AddProducts(Ints sums, Bytes64 u, Bytes64 s) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)u, (__m512i)s);
}

inline int32_t Greatest(Ints v) { return _mm512_reduce_max_epi32((__m512i)v); }

using Floats8 = Vectors<32>::Floats;

inline Floats8 Evens(Floats8 a, Floats8 b) {
  return (Floats8)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
}

inline Floats8 Odds(Floats8 a, Floats8 b) {
  return (Floats8)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd);
}

inline Floats Evens(Floats a, Floats b) {
  return (Floats)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88);
}

inline Floats Odds(Floats a, Floats b) {
  return (Floats)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xdd);
}

template <int T>
inline auto Repeat(const void* p) {
  const auto* from = static_cast<const __m256i*>(p);
  if constexpr (T == 1) {
    return (Bytes32)_mm256_loadu_si256(from);
  } else if constexpr (T == 2) {
    return (Bytes64)_mm512_broadcast_i64x4(_mm256_loadu_si256(from));
  } else if constexpr (T == 4) {
    return (Bytes64)_mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  } else if constexpr (T == 8) {
    int64_t eight;
    __builtin_memcpy(&eight, p, sizeof(eight));
    return (Bytes64)_mm512_set1_epi64(eight);
  } else {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof(four));
    return (Bytes64)_mm512_set1_epi32(four);
  }
}

#include "rows.inc"
#include "blocks.inc"
#include "rounded.inc"
#include "select.inc"

}  // namespace
}  // namespace vnni

using namespace vnni;

const Kernels kVnni = {
    Dot<float>,   Dot<BFloat16>, Dot<int8_t>, Add<float>,     Add<BFloat16>,
    DotAnyBlocks, DotAnyPicked, AddAnyPicked, RoundedBytes, Round, DotAnyRounded,
    Kth,
};

}  // namespace hire

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // defined(__x86_64__)
