// The targets that XLA calls. `__init__.py` beside says what each computes.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "rows.h"
#include "threads.h"
#include "top_k.h"
#include "xla/ffi/api/ffi.h"

namespace hire {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kPiece = 1 << 17;  // bytes of rows that a thread takes at a time

using F32 = ffi::Buffer<ffi::F32>;
using S8 = ffi::Buffer<ffi::S8>;
using S32 = ffi::Buffer<ffi::S32>;
using BF16 = ffi::Buffer<ffi::BF16>;
using Result = ffi::Result<F32>;

// The fastest form that this processor runs, unless another is asked for.
const Kernels& Best() {
#if defined(__x86_64__)
  static const Kernels& best = []() -> const Kernels& {
    const char* variable = std::getenv("HIRE_REWRITE_KERNELS");
    const std::string asked = variable == nullptr ? "" : variable;
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool vnni = __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    if (asked == "portable" || !avx2) return kPortable;
    return asked == "avx2" || !vnni ? kAvx2 : kVnni;
  }();
  return best;
#else
  return kPortable;
#endif
}

int64_t Grain(int64_t row_bytes) { return std::max<int64_t>(1, kPiece / std::max<int64_t>(1, row_bytes)); }

template <typename Row>
const Row* Data(ffi::AnyBuffer& buffer) {
  return reinterpret_cast<const Row*>(buffer.untyped_data());
}

// Calls `run` with a null pointer of the rows' type, and the kernels for it.
template <typename Run>
ffi::Error ByType(ffi::DataType type, Run run) {
  const Kernels& best = Best();
  if (type == ffi::F32) {
    run(static_cast<const float*>(nullptr), best.dot_f32);
  } else if (type == ffi::BF16) {
    run(static_cast<const BFloat16*>(nullptr), best.dot_bf16);
  } else if (type == ffi::S8) {
    run(static_cast<const int8_t*>(nullptr), best.dot_i8);
  } else {
    return ffi::Error::InvalidArgument("rows must be float32, bfloat16 or int8");
  }
  return ffi::Error::Success();
}

ffi::Error Product(ffi::ThreadPool pool, F32 x, ffi::AnyBuffer rows, S32 layer, F32 scale, F32 offset,
                   Result out) {
  const int64_t tokens = x.dimensions()[0], d = x.dimensions()[1], n = rows.dimensions()[1];
  const int64_t first = layer.typed_data()[0] * n;
  const float* factors = scale.element_count() ? scale.typed_data() + first : nullptr;
  const float* terms = offset.element_count() ? offset.typed_data() + first : nullptr;
  return ByType(rows.element_type(), [&](auto* type, auto dot) {
    const auto* all = Data<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(rows) + first * d;
    Share(pool, n, Grain(d * sizeof(*type)), [&](int64_t begin, int64_t end) {
      dot(x.typed_data(), tokens, all + begin * d, end - begin, d, out->typed_data() + begin, n);
      for (int64_t t = 0; t < tokens; ++t) {
        float* own = out->typed_data() + t * n;
        for (int64_t i = begin; factors && i < end; ++i) own[i] *= factors[i];
        for (int64_t i = begin; terms && i < end; ++i) own[i] += terms[i];
      }
    });
  });
}

ffi::Error BlockProduct(ffi::ThreadPool pool, S8 x, F32 x_scale, S8 rows, BF16 scale, S32 layer,
                        Result out) {
  const int64_t tokens = x.dimensions()[0], d = x.dimensions()[1], n = rows.dimensions()[1];
  const int64_t blocks = scale.dimensions()[2], block = d / blocks;
  if (d > kMaxPieces * kBytes || block % kBytes || (d / 2) % block) {
    return ffi::Error::InvalidArgument("blocks must be of 32 numbers, and rows of at most 65,536");
  }
  std::vector<float> offset(tokens * blocks);
  for (int64_t b = 0; b < tokens * blocks; ++b) {
    const int8_t* first = x.typed_data() + b * block;
    offset[b] = 8.0f * std::accumulate(first, first + block, 0);
  }
  const Rounded rounded = {x.typed_data(), x_scale.typed_data(), offset.data(), tokens, d, block};
  const int64_t before = layer.typed_data()[0] * n;
  const int8_t* all = rows.typed_data() + before * (d / 2);
  const auto* scales = static_cast<const BFloat16*>(scale.untyped_data()) + before * blocks;
  Share(pool, n, Grain(d / 2 + 2 * blocks), [&](int64_t begin, int64_t end) {
    Best().dot_i4(rounded, all + begin * (d / 2), scales + begin * blocks, end - begin,
                  out->typed_data() + begin, n);
  });
  return ffi::Error::Success();
}

ffi::Error FetchedProduct(ffi::ThreadPool pool, F32 x, ffi::AnyBuffer rows, S32 index, Result out) {
  const int64_t tokens = x.dimensions()[0], d = x.dimensions()[1], members = rows.dimensions()[1];
  // One list for all tokens, or one for each.
  const int64_t lists = index.dimensions()[0], count = index.dimensions()[1];
  const int64_t together = lists == tokens ? 1 : tokens, width = count * members;
  return ByType(rows.element_type(), [&](auto* type, auto dot) {
    const auto* all = Data<std::remove_const_t<std::remove_pointer_t<decltype(type)>>>(rows);
    Share(pool, lists * count, Grain(members * d * sizeof(*type)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t list = i / count, place = i % count;
        dot(x.typed_data() + list * d, together, all + index.typed_data()[i] * members * d, members,
            d, out->typed_data() + list * width + place * members, width);
      }
    });
  });
}

ffi::Error FetchedSum(ffi::ThreadPool pool, F32 h, ffi::AnyBuffer rows, S32 index, Result out) {
  const int64_t tokens = h.dimensions()[0], members = rows.dimensions()[1], d = rows.dimensions()[2];
  const int64_t count = index.dimensions()[0];
  const ffi::DataType type = rows.element_type();
  if (type != ffi::F32 && type != ffi::BF16) {
    return ffi::Error::InvalidArgument("rows must be float32 or bfloat16");
  }
  // Each thread has columns of its own: then the order of additions does not depend on threads.
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t slice = std::max<int64_t>(64, (d / threads + 63) / 64 * 64);
  Share(pool, d, slice, [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < tokens; ++t) {
      std::fill(out->typed_data() + t * d + begin, out->typed_data() + t * d + end, 0.0f);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t offset = index.typed_data()[i] * members * d + begin;
      const float* own = h.typed_data() + i * members;
      float* sums = out->typed_data() + begin;
      const auto add = [&](auto run, auto* first) {
        run(own, tokens, count * members, first + offset, members, d, end - begin, sums, d);
      };
      if (type == ffi::F32) {
        add(Best().add_f32, Data<float>(rows));
      } else {
        add(Best().add_bf16, Data<BFloat16>(rows));
      }
    }
  });
  return ffi::Error::Success();
}

ffi::Error TopKOfRows(ffi::ThreadPool pool, F32 scores, ffi::Result<F32> values, ffi::Result<S32> indices) {
  const int64_t n = scores.dimensions().back(), k = values->dimensions().back();
  const int64_t rows = k ? values->element_count() / k : 0;
  Share(pool, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      TopK(scores.typed_data() + i * n, n, k, values->typed_data() + i * k, indices->typed_data() + i * k);
    }
  });
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)

// Which operands the targets take; to be raised here and in `__init__.py` when these change.
extern "C" int hire_version() { return 2; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_product, Product,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<ffi::AnyBuffer>()
                                  .Arg<S32>().Arg<F32>().Arg<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_block_product, BlockProduct,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<S8>().Arg<F32>()
                                  .Arg<S8>().Arg<BF16>().Arg<S32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_fetched_product, FetchedProduct,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<ffi::AnyBuffer>()
                                  .Arg<S32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_fetched_sum, FetchedSum,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<ffi::AnyBuffer>()
                                  .Arg<S32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_top_k, TopKOfRows,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Ret<F32>()
                                  .Ret<S32>());

#pragma GCC visibility pop

}  // namespace hire
