// The k greatest of many floats, in the order of `lax.top_k`.

#ifndef HIRE_REWRITE_TOP_K_H_
#define HIRE_REWRITE_TOP_K_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace hire {

// Integers in the opposite order: NaN first, negative NaN last, and zero before negative zero.
inline uint32_t Rank(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return (bits & 0x80000000u) ? bits : ~bits & 0x7fffffffu;
}

inline float Unranked(uint32_t rank) {
  const uint32_t bits = (rank & 0x80000000u) ? rank : ~rank & 0x7fffffffu;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// One pass counts ranks by their first bits, which says how far the k best reach; another collects
// those, and few more. Equal values come in the order of their places.
inline void TopK(const float* scores, int64_t n, int64_t k, float* values, int32_t* indices) {
  constexpr int kBits = 13, kShift = 32 - kBits;
  std::vector<int32_t> counts(1 << kBits, 0);
  for (int64_t i = 0; i < n; ++i) ++counts[Rank(scores[i]) >> kShift];
  int64_t reached = 0;
  uint32_t last = 0;
  for (; last < counts.size(); ++last) {
    reached += counts[last];
    if (reached >= k) break;
  }
  std::vector<uint64_t> found;
  found.reserve(reached);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t rank = Rank(scores[i]);
    if (rank >> kShift <= last) found.push_back(static_cast<uint64_t>(rank) << 32 | i);
  }
  if (static_cast<int64_t>(found.size()) > k) {
    std::nth_element(found.begin(), found.begin() + k, found.end());
    found.resize(k);
  }
  std::sort(found.begin(), found.end());
  for (int64_t i = 0; i < k; ++i) {
    values[i] = Unranked(static_cast<uint32_t>(found[i] >> 32));
    indices[i] = static_cast<int32_t>(found[i] & 0xffffffffu);
  }
}

}  // namespace hire

#endif  // HIRE_REWRITE_TOP_K_H_
