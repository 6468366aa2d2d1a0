// What targets compute, in float64 and one number after the other; and the arrays that they are given.

#ifndef HIRE_REWRITE_REFERENCE_H_
#define HIRE_REWRITE_REFERENCE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "frame.h"

namespace fuzz {

constexpr float kInf = std::numeric_limits<float>::infinity();

// The choices of a case, and numbers that follow from one of them.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}
  // 0 to `most`.
  int64_t Next(int64_t most) { return data_ == end_ ? 0 : *data_++ % (most + 1); }
  bool Flag() { return Next(1); }
  void Seed() { random_ = random_ * 256 + Next(255); }
  uint32_t Random() {
    random_ = random_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(random_ >> 33);
  }

 private:
  const uint8_t *data_, *end_;
  uint64_t random_ = 1;
};

inline float OfBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float WideHalf(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent == 31 ? (fraction ? std::nanf("") : kInf)
                     : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                    : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -size : size;
}

// A number of an array of any type that targets read.
inline double Number(const Array& array, XLA_FFI_DataType type, int64_t i) {
  if (type == XLA_FFI_DataType_F32) return array.data<float>()[i];
  if (type == XLA_FFI_DataType_BF16) return OfBits(uint32_t{array.data<uint16_t>()[i]} << 16);
  if (type == XLA_FFI_DataType_F16) return WideHalf(array.data<uint16_t>()[i]);
  return array.data<int8_t>()[i];
}

inline size_t Item(XLA_FFI_DataType type) {
  return type == XLA_FFI_DataType_F32 || type == XLA_FFI_DataType_S32 ? 4
         : type == XLA_FFI_DataType_S8 || type == XLA_FFI_DataType_PRED ? 1 : 2;
}

// A float of one of eight sorts: usual, small integers, with odd ones among them, zeros, all equal, huge,
// tiny, one great one.
inline float Value(Bytes& bytes, int64_t sort, int64_t i) {
  static const float odd[] = {kInf, -kInf, std::nanf(""), -0.0f, 1e-45f, -1e-39f, 3e38f, 0.0f};
  const float usual = static_cast<float>(bytes.Random() % 20001) / 10000 - 1;
  switch (sort) {
    case 1: return std::nearbyint(usual * 3);
    case 2: return bytes.Random() % 16 ? usual : odd[bytes.Random() % 8];
    case 3: return 0;
    case 4: return 0.37f;
    case 5: return usual * 1e15f;
    case 6: return usual * 1e-30f;
    case 7: return i == 0 ? 1e6f : usual;
    default: return usual;
  }
}

inline Array Floats(Bytes& bytes, XLA_FFI_DataType type, std::vector<int64_t> dims) {
  const int64_t sort = bytes.Next(7);
  Array array(type, Item(type), std::move(dims), Item(type) * bytes.Next(3));
  for (int64_t i = 0; i < array.count(); ++i) {
    if (type == XLA_FFI_DataType_S8) {
      array.data<int8_t>()[i] = static_cast<int8_t>(bytes.Random());
    } else if (type == XLA_FFI_DataType_F32) {
      array.data<float>()[i] = Value(bytes, sort, i);
    } else if (type == XLA_FFI_DataType_BF16) {
      array.data<uint16_t>()[i] = static_cast<uint16_t>(BitsOf(Value(bytes, sort, i)) >> 16);
    } else {  // float16 as it comes; of most sorts without infinity and NaN
      const auto bits = static_cast<uint16_t>(bytes.Random());
      array.data<uint16_t>()[i] = sort == 2 ? bits : bits & 0xbfff;
    }
  }
  return array;
}

inline Array Places(Bytes& bytes, std::vector<int64_t> dims, int64_t below) {
  Array array(XLA_FFI_DataType_S32, 4, std::move(dims), 4 * bytes.Next(3));
  for (int64_t i = 0; i < array.count(); ++i) {
    array.data<int32_t>()[i] = static_cast<int32_t>(bytes.Random() % std::max<int64_t>(below, 1));
  }
  return array;
}

// Lists that may end early. None has a place where there is none.
inline Array Lists(Bytes& bytes, int64_t tokens, int64_t count, int64_t below) {
  Array array = Places(bytes, {tokens, count}, below);
  const bool early = bytes.Flag();
  for (int64_t t = 0; t < tokens; ++t) {
    int64_t length = early ? bytes.Random() % (count + 1) : count;
    if (below == 0) length = 0;
    for (int64_t i = length; i < count; ++i) array.data<int32_t>()[t * count + i] = -1;
  }
  return array;
}

[[noreturn]] inline void Wrong(const char* what, int64_t i, double got, double want) {
  std::fprintf(stderr, "%s: number %lld is %g instead of %g\n", what, static_cast<long long>(i), got, want);
  std::abort();
}

// A sum, and that of its terms without their signs.
struct Sum {
  double total = 0, size = 0;
  bool odd = false;  // a term is infinite or NaN

  void Add(double a, double b) {
    total += a * b;
    odd = odd || !std::isfinite(a) || !std::isfinite(b);
    size += std::abs(a * b);
  }
};

// `between`: the greatest number that may occur on the way; where float32 may overflow anything goes.
inline void Check(const char* what, int64_t i, float got, const Sum& sum, double between = 0, bool loose = false) {
  if (!sum.odd) {
    if (std::max(sum.size, between) > 1e37) return;
    const double limit = 2e-5 * sum.size + 1e-36 + 1e-40 * between;
    if (!(std::abs(got - sum.total) <= limit)) Wrong(what, i, got, sum.total);
  } else if (std::isfinite(got)) {
    Wrong(what, i, got, sum.total);
  } else if (!loose && std::isnan(sum.total) && !std::isnan(got)) {
    Wrong(what, i, got, sum.total);
  }
}

inline void CheckEqual(const char* what, int64_t i, int64_t got, int64_t want) {
  if (got != want) Wrong(what, i, static_cast<double>(got), static_cast<double>(want));
}

inline void CheckBits(const char* what, int64_t i, float got, float want) {
  if (BitsOf(got) != BitsOf(want)) Wrong(what, i, got, want);
}

// The order of IEEE 754's totalOrder.
inline bool Greater(float a, float b) {
  const auto place = [](float v) {
    const uint32_t bits = BitsOf(v);
    return bits >> 31 ? -static_cast<int64_t>(bits & 0x7fffffff) - 1 : static_cast<int64_t>(bits);
  };
  return place(a) > place(b);
}

// Places of n numbers, the greatest first; of equal ones those that lie first.
inline std::vector<int32_t> Order(const float* numbers, int64_t n) {
  std::vector<int32_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return Greater(numbers[a], numbers[b]); });
  return order;
}

}  // namespace fuzz

#endif  // HIRE_REWRITE_REFERENCE_H_
