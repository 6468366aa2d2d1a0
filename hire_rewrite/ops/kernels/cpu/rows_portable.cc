// The kernels for any processor.

#include "rows.h"

namespace hire {
namespace portable {
namespace {

template <typename Int>
inline Ints LoadInts(const Int* p) {
  return Ints{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
}

inline Ints Products(Bytes unsigned_ones, const int8_t* signed_ones) {
  Ints sums = {};
  for (int64_t i = 0; i < kBytes; ++i) sums[i / 4] += unsigned_ones[i] * signed_ones[i];
  return sums;
}

inline Ints SumEach(Ints a, Ints b, Ints c, Ints d) {
  const Ints all[] = {a, b, c, d};
  Ints sums = {};
  for (int64_t i = 0; i < 4 * kLanes; ++i) {
    const int64_t lane = i % kLanes;
    sums[i / kLanes + lane / 4 * 4] += all[i / kLanes][lane];
  }
  return sums;
}

#include "rows.inc"

}  // namespace
}  // namespace portable

using portable::Add;
using portable::Dot;
using portable::Dot4;

const Kernels kPortable = {Dot<float>, Dot<BFloat16>,  Dot<int8_t>,
                           Dot4,       Add<float>,     Add<BFloat16>};

}  // namespace hire
