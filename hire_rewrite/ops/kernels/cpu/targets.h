// What all targets have in common.

#ifndef HIRE_REWRITE_TARGETS_H_
#define HIRE_REWRITE_TARGETS_H_

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "rows.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace hire {

namespace ffi = xla::ffi;

constexpr int64_t kGrain = 1 << 14;  // bytes of rows that a thread takes at least

using F32 = ffi::Buffer<ffi::F32>;
using S8 = ffi::Buffer<ffi::S8>;
using S32 = ffi::Buffer<ffi::S32>;
using Result = ffi::Result<F32>;

// The fastest form that this processor runs, unless another is asked for.
inline const Kernels& Best() {
#if defined(__x86_64__)
  static const Kernels& best = []() -> const Kernels& {
    const char* variable = std::getenv("HIRE_REWRITE_KERNELS");
    const std::string asked = variable == nullptr ? "" : variable;
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool vnni = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vnni");
    if (asked == "portable" || !avx2) return kPortable;
    return asked == "avx2" || !vnni ? kAvx2 : kVnni;
  }();
  return best;
#else
  return kPortable;
#endif
}

// Rows that a thread takes at least, a multiple of `together`.
inline int64_t Grain(int64_t row_bytes, int64_t together = 1) {
  return std::max<int64_t>(1, kGrain / (std::max<int64_t>(1, row_bytes) * together)) * together;
}

template <typename Row>
const Row* Data(ffi::AnyBuffer& buffer) {
  return reinterpret_cast<const Row*>(buffer.untyped_data());
}

}  // namespace hire

#endif  // HIRE_REWRITE_TARGETS_H_
