// Calls the kernels on arrays that end where their memory ends, for the compiler's sanitizers.
// Prints what is wrong, and returns whether anything is.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "rows.h"
#include "threads.h"
#include "top_k.h"

namespace {

int wrong = 0;
std::mt19937 generator(0);

void Expect(const char* what, double got, double want, double scale) {
  if (std::abs(got - want) <= 1e-5 * scale) return;
  std::printf("%s: %g instead of %g\n", what, got, want);
  wrong = 1;
}

std::vector<float> Normal(int64_t n) {
  std::normal_distribution<float> distribution;
  std::vector<float> values(n);
  for (float& value : values) value = distribution(generator);
  return values;
}

std::vector<int8_t> Integers(int64_t n, int low, int high) {
  std::uniform_int_distribution<int> distribution(low, high);
  std::vector<int8_t> values(n);
  for (int8_t& value : values) value = static_cast<int8_t>(distribution(generator));
  return values;
}

hire::BFloat16 Narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return {static_cast<uint16_t>(bits >> 16)};
}

float Wide(hire::BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
float Wide(float value) { return value; }

// Numbers as factors of a type, and rounded themselves to what it holds.
template <typename Factor>
std::vector<Factor> Rounded(std::vector<float>& values);

template <>
std::vector<float> Rounded(std::vector<float>& values) {
  return values;
}

template <>
std::vector<hire::BFloat16> Rounded(std::vector<float>& values) {
  std::vector<hire::BFloat16> narrow(values.size());
  std::transform(values.begin(), values.end(), narrow.begin(), Narrow);
  std::transform(narrow.begin(), narrow.end(), values.begin(), [](hire::BFloat16 v) { return Wide(v); });
  return narrow;
}

// Every eighth is as small as float16 has them.
template <>
std::vector<hire::Float16> Rounded(std::vector<float>& values) {
  std::vector<hire::Float16> narrow;
  for (size_t i = 0; i < values.size(); ++i) {
    const int exponent = i % 8 == 7 ? -24 : std::max(std::ilogb(values[i]), -14) - 10;
    const float integer = std::nearbyint(std::ldexp(values[i], i % 8 == 7 ? 4 : -exponent));
    values[i] = std::ldexp(integer, exponent);
    uint32_t bits;
    const float shifted = std::ldexp(values[i], -112);  // has the exponent of float16
    std::memcpy(&bits, &shifted, sizeof(bits));
    narrow.push_back({static_cast<uint16_t>((bits >> 16 & 0x8000) | (bits >> 13 & 0x7fff))});
  }
  return narrow;
}
float Wide(int8_t value) { return value; }

template <typename Row>
void CheckDot(hire::Kernels::Dot<Row> dot, const std::vector<Row>& rows, int64_t tokens, int64_t n,
              int64_t d) {
  const std::vector<float> x = Normal(tokens * d);
  std::vector<float> out(tokens * n);
  dot(x.data(), tokens, rows.data(), n, d, out.data(), n);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < n; ++i) {
      double want = 0, size = 1;
      for (int64_t j = 0; j < d; ++j) {
        const double term = static_cast<double>(x[t * d + j]) * Wide(rows[i * d + j]);
        want += term;
        size += std::abs(term);
      }
      Expect("dot", out[t * n + i], want, size);
    }
  }
}

template <typename Row>
void CheckAdd(hire::Kernels::Add<Row> add, const std::vector<Row>& rows, int64_t tokens, int64_t n,
              int64_t d) {
  const std::vector<float> h = Normal(tokens * n);
  std::vector<float> out(tokens * d, 1.0f);
  add(h.data(), tokens, n, rows.data(), n, d, d, out.data(), d);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t j = 0; j < d; ++j) {
      double want = 1;
      for (int64_t i = 0; i < n; ++i) want += static_cast<double>(h[t * n + i]) * Wide(rows[i * d + j]);
      Expect("add", out[t * d + j], want, n + 1);
    }
  }
}

double Number(const hire::Blocks& rows, int64_t i, int64_t j) {
  const int64_t half = rows.d / 2;
  if (!rows.narrow) return rows.integers[i * rows.d + j];
  const auto both = static_cast<uint8_t>(rows.integers[i * half + j % half]);
  const int own = j < half ? both & 15 : both >> 4;
  return !rows.minima && own > 7 ? own - 16 : own;
}

void CheckProducts(const char* what, const std::vector<double>& x, int64_t tokens,
                   const hire::Blocks& rows, const std::vector<float>& scale,
                   const std::vector<float>& minimum, const std::vector<float>& out) {
  const int64_t d = rows.d, n = scale.size() / rows.blocks;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < n; ++i) {
      double want = 0, size = 0;
      for (int64_t j = 0; j < d; ++j) {
        const int64_t b = i * rows.blocks + j * rows.blocks / d;
        const double number = Number(rows, i, j) * scale[b] + (minimum.empty() ? 0 : minimum[b]);
        want += x[t * d + j] * number;
        size += std::abs(x[t * d + j] * number);
      }
      Expect(what, out[t * n + i], want, size);
    }
  }
}

// Some rows, the last one twice, with all columns and with some.
void CheckPicked(const hire::Kernels& kernels, const hire::Blocks& rows,
                 const std::vector<float>& scale, const std::vector<float>& minimum) {
  const int64_t d = rows.d, n = scale.size() / rows.blocks, count = 3, pieces = rows.bytes / hire::kPiece;
  const std::vector<int32_t> picked = {static_cast<int32_t>(n - 1), 0, static_cast<int32_t>(n - 1)};
  const auto number = [&](int64_t i, int64_t j) {
    const int64_t b = picked[i] * rows.blocks + j * rows.blocks / d;
    return Number(rows, picked[i], j) * static_cast<double>(scale[b]) + (minimum.empty() ? 0 : minimum[b]);
  };
  const std::vector<float> x = Normal(d), h = Normal(count);
  std::vector<float> products(count);
  kernels.dot_picked(x.data(), rows, picked.data(), count, products.data());
  for (int64_t i = 0; i < count; ++i) {
    double want = 0, size = 0;
    for (int64_t j = 0; j < d; ++j) {
      want += x[j] * number(i, j);
      size += std::abs(x[j] * number(i, j));
    }
    Expect("dot of picked rows", products[i], want, size);
  }
  for (int64_t begin : {int64_t{0}, pieces / 2}) {
    std::vector<float> out(d, 1.0f);
    kernels.add_picked(h.data(), rows, picked.data(), count, begin, pieces, out.data());
    for (int64_t j = 0; j < d; ++j) {
      const bool there = j % rows.bytes >= begin * hire::kPiece;
      double want = 1, size = 1;
      for (int64_t i = 0; i < count && there; ++i) {
        want += h[i] * number(i, j);
        size += std::abs(h[i] * number(i, j));
      }
      Expect("sum of picked rows", out[j], want, size);
    }
  }
}

// `extreme`: all integers are the greatest that there are, so that sums are too.
template <typename Factor>
void CheckBlocks(const hire::Kernels& kernels, const Factor* hire::Factors::*type, int64_t tokens,
                 int64_t n, int64_t d, int64_t block, bool narrow, bool minima,
                 bool extreme = false) {
  const int64_t blocks = d / block;
  hire::Blocks rows = hire::BlocksOf(narrow, minima, d, blocks);
  const int8_t most = minima || !narrow ? -1 : 0x77, least = narrow ? most : -128;
  std::vector<int8_t> integers = Integers(n * rows.bytes, -128, 127);
  if (extreme) std::fill(integers.begin(), integers.end(), least);
  std::vector<float> scale = Normal(n * blocks), minimum = Normal(minima ? n * blocks : 0);
  const std::vector<Factor> scales = Rounded<Factor>(scale), lows = Rounded<Factor>(minimum);
  rows.integers = integers.data();
  rows.scale.*type = scales.data();
  if (minima) rows.minimum.*type = lows.data();
  std::vector<float> x = Normal(tokens * d), out(tokens * n);
  if (extreme) std::fill(x.begin(), x.end(), 1.0f);
  kernels.dot_blocks(x.data(), tokens, rows, 0, n / 2, out.data(), n);
  kernels.dot_blocks(x.data(), tokens, rows, n / 2, n, out.data(), n);
  CheckProducts("dot of blocks", {x.begin(), x.end()}, tokens, rows, scale, minimum, out);
  CheckPicked(kernels, rows, scale, minimum);

  std::vector<double> rounded(tokens * d);
  for (int64_t i = 0; i < tokens * d; i += 32) {
    float greatest = 0;
    for (int64_t j = i; j < i + 32; ++j) greatest = std::max(greatest, std::abs(x[j]));
    const float step = greatest * (1.0f / 127);
    for (int64_t j = i; j < i + 32; ++j) rounded[j] = std::nearbyint(x[j] / step) * step;
  }
  const std::unique_ptr<void, void (*)(void*)> room(
      std::aligned_alloc(hire::kLine, kernels.rounded_bytes(tokens, rows)), std::free);
  kernels.round(x.data(), tokens, 32, rows, room.get());
  kernels.dot_rounded(room.get(), tokens, rows, 0, n / 2, out.data(), n);
  kernels.dot_rounded(room.get(), tokens, rows, n / 2, n, out.data(), n);
  CheckProducts("dot of rounded tokens", rounded, tokens, rows, scale, minimum, out);
}

void CheckAllBlocks(const hire::Kernels& kernels, int64_t tokens) {
  for (bool narrow : {false, true}) {
    for (bool minima : {false, true}) {
      const auto check = [&](auto type, int64_t n, int64_t d, int64_t block, bool extreme = false) {
        CheckBlocks(kernels, type, tokens, n, d, block, narrow, minima, extreme);
      };
      check(&hire::Factors::float32, 3, 64, 32);
      check(&hire::Factors::bfloat16, 9, 576, 32);
      check(&hire::Factors::float16, 9, 576, 32);
      check(&hire::Factors::float16, 5, 192, 64);
      check(&hire::Factors::float16, 5, 192, 192);
      check(&hire::Factors::bfloat16, 4, 2368, 2368);
      check(&hire::Factors::float16, 6, 3072, 128);
      check(&hire::Factors::float32, 2, 1024, 1024, true);
    }
  }
}

void CheckTopK(const hire::Kernels& kernels, std::vector<float> scores, int64_t k) {
  const int64_t n = scores.size();
  std::vector<float> values(k);
  std::vector<int32_t> indices(k);
  hire::TopK(kernels, scores.data(), n, k, values.data(), indices.data());
  std::vector<int32_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return hire::Key(scores[a]) > hire::Key(scores[b]);
  });
  for (int64_t i = 0; i < k; ++i) {
    Expect("top_k's index", indices[i], order[i], 1);
    if (hire::Key(values[i]) != hire::Key(scores[order[i]])) Expect("top_k's value", i, -1, 0);
  }
  order.resize(k);
  std::sort(order.begin(), order.end());
  int64_t place = 0;
  hire::EachGreatest(kernels, scores.data(), n, k, [&](int64_t i, int32_t key) {
    Expect("a place of the greatest", i, order[place++], 1);
    if (key != hire::Key(scores[i])) Expect("a key of the greatest", i, -1, 0);
  });
  Expect("how many are the greatest", place, k, 0);
}

void CheckChoices(const hire::Kernels& kernels) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  for (int64_t n : {1, 5, 100, 5000, 40000}) {
    std::vector<float> scores = Normal(n), some = scores;
    for (int64_t i = 32; i < n; i += 64) some[i] += 100;
    for (int64_t k : {int64_t{1}, std::min<int64_t>(n, 60), n}) {
      CheckTopK(kernels, scores, k);
      CheckTopK(kernels, some, k);
      CheckTopK(kernels, std::vector<float>(n, 1.0f), k);
    }
  }
  const std::vector<float> special = {nan, -nan, inf, -inf, 0.0f, -0.0f, 1e-45f, -1e-45f, 1.0f, 1.0f};
  for (int64_t k = 1; k <= 10; ++k) CheckTopK(kernels, special, k);
}

void CheckKernels(const hire::Kernels& kernels) {
  for (int64_t tokens : {1, 2, 3, 4, 9}) {
    for (int64_t d : {1, 8, 31, 64, 100}) {
      for (int64_t n : {1, 2, 5}) {
        const std::vector<float> wide = Normal(n * d);
        std::vector<hire::BFloat16> narrow(n * d);
        std::transform(wide.begin(), wide.end(), narrow.begin(), Narrow);
        CheckDot(kernels.dot_f32, wide, tokens, n, d);
        CheckDot(kernels.dot_bf16, narrow, tokens, n, d);
        CheckDot(kernels.dot_i8, Integers(n * d, -127, 127), tokens, n, d);
        CheckAdd(kernels.add_f32, wide, tokens, n, d);
        CheckAdd(kernels.add_bf16, narrow, tokens, n, d);
      }
    }
    CheckAllBlocks(kernels, tokens);
  }
  CheckAllBlocks(kernels, 17);
  // More tokens than stay in the cache, and more columns than are widened together.
  CheckDot(kernels.dot_f32, Normal(5 * 4099), 37, 5, 4099);
  CheckDot(kernels.dot_i8, Integers(6 * 700, -127, 127), 9, 6, 700);
  CheckBlocks(kernels, &hire::Factors::float16, 37, 5, 4096, 32, true, true);
  CheckBlocks(kernels, &hire::Factors::float16, 1, 3, 32768, 32, true, true);
  CheckBlocks(kernels, &hire::Factors::float16, 2, 2, 65536, 32, false, false);
  CheckChoices(kernels);
}

// A pool whose threads begin late, or not before all is done.
struct Pool {
  std::vector<std::thread> threads;
  int64_t num_threads() const { return 4; }
  template <typename Task>
  void Schedule(Task task) {
    threads.emplace_back(task);
  }
  ~Pool() {
    for (std::thread& thread : threads) thread.join();
  }
};

void CheckShare(int64_t count, int64_t grain) {
  std::vector<int> done(count, 0);
  {
    Pool pool;
    hire::Share(pool, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ++done[i];
    });
    for (int64_t i = 0; i < count; ++i) Expect("share", done[i], 1, 0);
  }
}

// Several callers at once, so that threads end one's work while another has some to give.
void CheckCallers() {
  std::vector<std::thread> callers;
  for (int64_t caller = 0; caller < 3; ++caller) {
    callers.emplace_back([caller] {
      for (int64_t count = 1; count < 60; ++count) CheckShare(count, caller + 1);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

void CheckAllKernels() {
  CheckKernels(hire::kPortable);
#if defined(__x86_64__)
  if (hire::RunsAvx2()) CheckKernels(hire::kAvx2);
  if (hire::RunsVnni()) CheckKernels(hire::kVnni);
#endif
}

}  // namespace

// With an argument threads alone are checked: the kernels run on one.
int main(int arguments, char**) {
  if (arguments == 1) CheckAllKernels();
  for (int64_t count : {0, 1, 7, 1000}) {
    for (int64_t grain : {1, 3, 2000}) CheckShare(count, grain);
  }
  CheckCallers();
  return wrong;
}
