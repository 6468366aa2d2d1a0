// What all targets have in common.

#ifndef HIRE_REWRITE_TARGETS_H_
#define HIRE_REWRITE_TARGETS_H_

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

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
    if (asked == "portable" || !RunsAvx2()) return kPortable;
    return asked == "avx2" || !RunsVnni() ? kAvx2 : kVnni;
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

// The number of a layer of a stack, as XLA's slices take what lies outside.
inline int64_t Layer(ffi::AnyBuffer& stacked, S32& layer) {
  return std::clamp<int64_t>(layer.typed_data()[0], 0, stacked.dimensions()[0] - 1);
}

// Fetches the beginning of a row; processors foresee the rest.
template <typename Row>
inline void Prefetch(const Row* row, int64_t d) {
  const int64_t bytes = std::min<int64_t>(d * sizeof(Row), 16 * kLine);
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(reinterpret_cast<const char*>(row) + i);
}

// Lists [tokens, count] of rows, of which each ends before its first negative number.
class Lists {
 public:
  Lists(const int32_t* lists, int64_t tokens, int64_t count) : lists_(lists), count_(count), starts_{0} {
    for (int64_t token = 0; token < tokens; ++token) {
      const int32_t* own = lists + token * count;
      const auto* end = std::partition_point(own, own + count, [](int32_t row) { return row >= 0; });
      starts_.push_back(starts_.back() + (end - own));
    }
  }
  int64_t total() const { return starts_.back(); }
  int64_t length(int64_t token) const { return starts_[token + 1] - starts_[token]; }

  // Calls run(token, list, first, last) for what lies between two places of all lists in a row.
  template <typename Run>
  void Each(int64_t begin, int64_t end, Run run) const {
    for (size_t token = 0; token + 1 < starts_.size(); ++token) {
      const int64_t first = std::max(begin, starts_[token]), last = std::min(end, starts_[token + 1]);
      if (first < last) {
        run(static_cast<int64_t>(token), lists_ + token * count_, first - starts_[token], last - starts_[token]);
      }
    }
  }

 private:
  const int32_t* lists_;
  int64_t count_;
  std::vector<int64_t> starts_;  // of each list among all, and their end
};

}  // namespace hire

#endif  // HIRE_REWRITE_TARGETS_H_
