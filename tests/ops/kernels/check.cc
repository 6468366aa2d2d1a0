// Calls the kernels on arrays that end where their memory ends, for the compiler's sanitizers.
// Prints what is wrong, and returns whether anything is.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
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

// `extreme`: all numbers are the greatest that there are, so that sums are too.
void CheckBlocks(const hire::Kernels& kernels, int64_t tokens, int64_t n, int64_t d, int64_t block,
                 bool extreme = false) {
  const int64_t blocks = d / block, half = d / 2;
  const std::vector<int8_t> x = Integers(tokens * d, extreme ? 127 : -127, 127);
  const std::vector<int8_t> rows = Integers(n * half, extreme ? 0x77 : -128, extreme ? 0x77 : 127);
  const std::vector<float> x_scale = Normal(tokens * blocks), wide = Normal(n * blocks);
  std::vector<float> offset(tokens * blocks), out(tokens * n);
  std::vector<hire::BFloat16> scale(n * blocks);
  std::transform(wide.begin(), wide.end(), scale.begin(), Narrow);
  for (int64_t i = 0; i < tokens * d; ++i) offset[i / block] += 8.0f * x[i];
  const hire::Rounded rounded = {x.data(), x_scale.data(), offset.data(), tokens, d, block};
  kernels.dot_i4(rounded, rows.data(), scale.data(), n, out.data(), n);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < n; ++i) {
      double want = 0;
      for (int64_t j = 0; j < d; ++j) {
        const int8_t both = rows[i * half + j % half];
        const int own = j < half ? static_cast<int8_t>(both * 16) >> 4 : both >> 4;
        const int64_t b = j / block;
        want += static_cast<double>(own) * Wide(scale[i * blocks + b]) * x[t * d + j] *
                x_scale[t * blocks + b];
      }
      Expect("dot of blocks", out[t * n + i], want, 1000.0 * d);
    }
  }
}

void CheckTopK(std::vector<float> scores, int64_t k) {
  const int64_t n = scores.size();
  std::vector<float> values(k);
  std::vector<int32_t> indices(k);
  hire::TopK(scores.data(), n, k, values.data(), indices.data());
  std::vector<int32_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return hire::Key(scores[a]) > hire::Key(scores[b]);
  });
  for (int64_t i = 0; i < k; ++i) {
    Expect("top_k's index", indices[i], order[i], 1);
    if (hire::Key(values[i]) != hire::Key(scores[order[i]])) Expect("top_k's value", i, -1, 0);
  }
}

void CheckKernels(const hire::Kernels& kernels) {
  for (int64_t tokens : {1, 2, 3, 4, 7, 8, 9}) {
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
    CheckBlocks(kernels, tokens, 3, 64, 32);
    CheckBlocks(kernels, tokens, 2, 576, 32);
    CheckBlocks(kernels, tokens, 2, 384, 64);
    CheckBlocks(kernels, tokens, 2, 1024, 64);
    CheckBlocks(kernels, tokens, 2, 1024, 128, true);
  }
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

}  // namespace

int main() {
  CheckKernels(hire::kPortable);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) CheckKernels(hire::kAvx2);
  if (__builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
    CheckKernels(hire::kVnni);
  }
#endif
  const float inf = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  for (int64_t n : {1, 5, 100, 5000, 40000}) {
    std::vector<float> scores = Normal(n), some = scores;
    for (int64_t i = 32; i < n; i += 64) some[i] += 100;
    for (int64_t k : {int64_t{1}, std::min<int64_t>(n, 60), n}) {
      CheckTopK(scores, k);
      CheckTopK(some, k);
      CheckTopK(std::vector<float>(n, 1.0f), k);
    }
  }
  CheckTopK({nan, -nan, inf, -inf, 0.0f, -0.0f, 1e-45f, -1e-45f, 1.0f, 1.0f}, 10);
  for (int64_t count : {0, 1, 7, 1000}) {
    for (int64_t grain : {1, 3, 2000}) CheckShare(count, grain);
  }
  return wrong;
}
