// The kernels for any processor.

#include "rows.h"

namespace hire {
namespace portable {
namespace {

constexpr int kBytes = 32;
constexpr int64_t kLanes = kBytes / 4;
using Floats = Vectors<kBytes>::Floats;
using Ints = Vectors<kBytes>::Ints;

template <typename Int>
inline Ints LoadInts(const Int* p) {
  return Ints{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
}

inline float Wide(Float16 v) {
  const uint32_t sign = (v.bits & 0x8000u) << 16, rest = v.bits & 0x7fffu;
  uint32_t bits = rest << 13;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof(wide));
  wide *= 0x1p112f;  // the exponents are so far apart
  __builtin_memcpy(&bits, &wide, sizeof(bits));
  if (rest >= 0x7c00) bits |= 0x7f800000u;  // infinity and NaN
  bits |= sign;
  __builtin_memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

inline Floats Load(const Float16* p) {
  return Floats{Wide(p[0]), Wide(p[1]), Wide(p[2]), Wide(p[3]),
                Wide(p[4]), Wide(p[5]), Wide(p[6]), Wide(p[7])};
}

using Bytes = Vectors<kBytes>::Bytes;

constexpr int kSums = 8;
constexpr int32_t kShift = 0;

inline Ints AddProducts(Ints sums, Bytes u, Bytes s) {
  for (int i = 0; i < kBytes; ++i) sums[i / 4] += u[i] * static_cast<int8_t>(s[i]);
  return sums;
}

inline Ints AddSigned(Ints sums, Bytes w, Bytes s) {
  for (int i = 0; i < kBytes; ++i) sums[i / 4] += static_cast<int8_t>(w[i]) * static_cast<int8_t>(s[i]);
  return sums;
}

inline Floats Evens(Floats a, Floats b) {
  return Floats{a[0], a[2], b[0], b[2], a[4], a[6], b[4], b[6]};
}

inline Floats Odds(Floats a, Floats b) {
  return Floats{a[1], a[3], b[1], b[3], a[5], a[7], b[5], b[7]};
}

template <int T>
inline Bytes Repeat(const void* p) {
  Bytes all;
  for (int i = 0; i < kBytes; ++i) all[i] = static_cast<const uint8_t*>(p)[i % (kBytes / T)];
  return all;
}

#include "eight.inc"
#include "rows.inc"
#include "blocks.inc"
#include "rounded.inc"
#include "select.inc"

}  // namespace
}  // namespace portable

using namespace portable;

const Kernels kPortable = {
    Dot<float>,   Dot<BFloat16>, Dot<int8_t>, Add<float>,     Add<BFloat16>,
    DotAnyBlocks, DotAnyPicked, AddAnyPicked, RoundedBytes, Round, DotAnyRounded,
    Kth,
};

}  // namespace hire
