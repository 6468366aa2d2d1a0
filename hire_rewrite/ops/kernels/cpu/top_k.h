// The k greatest of many floats, in the order of `lax.top_k`.

#ifndef HIRE_REWRITE_TOP_K_H_
#define HIRE_REWRITE_TOP_K_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "rows.h"

namespace hire {

// Integers in the order of the values: NaN last, negative NaN first, and negative zero before zero.
inline int32_t Key(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float Value(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

constexpr int32_t kLowest = std::numeric_limits<int32_t>::min();

// The key that the k best of `scores` reach, or a somewhat lower one, guessed from every 64th.
inline int32_t Reach(const float* scores, int64_t n, int64_t k) {
  constexpr int64_t kStride = 64;
  const double expected = static_cast<double>(k) / kStride;
  const int64_t wanted = static_cast<int64_t>(expected + 4 * std::sqrt(expected) + 4);
  if (8 * wanted * kStride > n) return kLowest;
  std::vector<int32_t> sample;
  for (int64_t i = kStride / 2; i < n; i += kStride) sample.push_back(Key(scores[i]));
  std::nth_element(sample.begin(), sample.begin() + wanted, sample.end(), std::greater<int32_t>());
  return sample[wanted];
}

// Calls take(i, key) for the k greatest of n scores, in the order of their places. Of equal scores those
// come that lie first.
template <typename Take>
void EachGreatest(const Kernels& kernels, const float* scores, int64_t n, int64_t k, Take take) {
  if (k == 0) return;
  std::vector<int32_t> keys(n);
  for (int64_t i = 0; i < n; ++i) keys[i] = Key(scores[i]);
  const int32_t bound = kernels.kth(keys.data(), n, k);
  int64_t above = 0;
  for (int64_t i = 0; i < n; ++i) above += keys[i] > bound;
  for (int64_t i = 0, equal = k - above; i < n; ++i) {
    if (keys[i] > bound || (keys[i] == bound && equal-- > 0)) take(i, keys[i]);
  }
}

// Most of many scores are far from the k best: one pass collects those that are not.
inline void TopK(const Kernels& kernels, const float* scores, int64_t n, int64_t k, float* values,
                 int32_t* indices) {
  constexpr int64_t kTogether = 32;
  std::vector<int64_t> found;  // the greatest key first, then the lowest place
  const auto add = [&](int64_t i, int32_t key) { found.push_back(~key * (int64_t{1} << 32) + i); };
  const int32_t reach = Reach(scores, n, k);
  if (reach != kLowest) {
    const auto collect = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int32_t key = Key(scores[i]);
        if (key >= reach) add(i, key);
      }
    };
    int64_t i = 0;
    for (; i + kTogether <= n; i += kTogether) {
      int32_t any = 0;
      for (int64_t j = 0; j < kTogether; ++j) any |= Key(scores[i + j]) >= reach;
      if (any) collect(i, i + kTogether);
    }
    collect(i, n);
  }
  if (static_cast<int64_t>(found.size()) < k) {
    found.clear();
    EachGreatest(kernels, scores, n, k, add);
  }
  if (static_cast<int64_t>(found.size()) > k) {
    std::nth_element(found.begin(), found.begin() + k, found.end());
    found.resize(k);
  }
  std::sort(found.begin(), found.end());
  for (int64_t i = 0; i < k; ++i) {
    values[i] = Value(~static_cast<int32_t>(found[i] >> 32));
    indices[i] = static_cast<int32_t>(found[i] & 0xffffffff);
  }
}

}  // namespace hire

#endif  // HIRE_REWRITE_TOP_K_H_
