// The targets that XLA calls. `__init__.py` beside says what each computes.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
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

constexpr int64_t kGrain = 1 << 14;  // bytes of rows that a thread takes at least
constexpr int64_t kTogether = 4;     // rows whose sums have an order of their own

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
int64_t Grain(int64_t row_bytes, int64_t together = 1) {
  return std::max<int64_t>(1, kGrain / (std::max<int64_t>(1, row_bytes) * together)) * together;
}

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

// Scales or minima of a layer; false for a type that there is no code for.
bool SetFactors(ffi::AnyBuffer& buffer, int64_t before, Factors& factors) {
  if (buffer.element_count() == 0) return true;
  if (buffer.element_type() == ffi::F32) {
    factors.float32 = Data<float>(buffer) + before;
  } else if (buffer.element_type() == ffi::BF16) {
    factors.bfloat16 = Data<BFloat16>(buffer) + before;
  } else if (buffer.element_type() == ffi::F16) {
    factors.float16 = Data<Float16>(buffer) + before;
  } else {
    return false;
  }
  return true;
}

// A matrix of `BlockProduct`: its rows, which count on from those of the matrices before it, and
// where their products go. No piece of work begins between rows that belong together.
struct Matrix {
  Blocks rows;
  int64_t first, n;
  float* out;
};

// Rows of a layer of a stack.
ffi::Error SetRows(int64_t d, int64_t layer, S8 integers, ffi::AnyBuffer scale, ffi::AnyBuffer minimum,
                    Blocks& rows) {
  const int64_t n = integers.dimensions()[1], size = integers.dimensions()[2];
  const int64_t blocks = scale.dimensions()[2];
  if (size % kPiece || d % (blocks * kPiece) || d > kMaxColumns) {
    return ffi::Error::InvalidArgument("blocks must be of 32 columns, and rows of at most 65,536");
  }
  rows = BlocksOf(size != d, minimum.element_count() > 0, d, blocks);
  const int64_t last = integers.dimensions()[0] - 1;  // as XLA's slices take what lies outside
  const int64_t before = std::clamp<int64_t>(layer, 0, last) * n;
  rows.integers = integers.typed_data() + before * size;
  if (!SetFactors(scale, before * blocks, rows.scale) ||
      !SetFactors(minimum, before * blocks, rows.minimum)) {
    return ffi::Error::InvalidArgument("scales must be float32, bfloat16 or float16");
  }
  return ffi::Error::Success();
}

// The same tokens with several matrices of one form: integers, scale and minimum of each.
ffi::Error BlockProduct(ffi::ThreadPool pool, F32 x, S32 layer, ffi::RemainingArgs operands,
                        ffi::RemainingRets results, int64_t input_block) {
  const int64_t tokens = x.dimensions()[0], d = x.dimensions()[1];
  std::vector<Matrix> matrices(results.size());
  int64_t total = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const auto integers = operands.get<S8>(3 * i);
    const auto scale = operands.get<ffi::AnyBuffer>(3 * i + 1);
    const auto minimum = operands.get<ffi::AnyBuffer>(3 * i + 2);
    auto out = results.get<F32>(i);
    if (!integers || !scale || !minimum || !out) {
      return ffi::Error::InvalidArgument("a matrix is integers of 8 bits, scales and minima");
    }
    Matrix& matrix = matrices[i];
    const ffi::Error error = SetRows(d, layer.typed_data()[0], *integers, *scale, *minimum, matrix.rows);
    if (error.failure()) return error;
    matrix.first = total;
    matrix.n = integers->dimensions()[1];
    matrix.out = (*out)->typed_data();
    total += (matrix.n + kTogether - 1) / kTogether * kTogether;
  }
  const Blocks form = matrices[0].rows;
  for (const Matrix& matrix : matrices) {
    const Blocks& rows = matrix.rows;
    if (rows.bytes != form.bytes || rows.blocks != form.blocks || rows.minima != form.minima) {
      return ffi::Error::InvalidArgument("matrices must have equally many bits and blocks");
    }
  }
  if (input_block % kPiece || (input_block > 0 && d % input_block)) {
    return ffi::Error::InvalidArgument("blocks of tokens must be of 32 columns, and divide them");
  }
  const Kernels& best = Best();
  const float* from = x.typed_data();
  std::unique_ptr<char[]> room;
  void* rounded = nullptr;
  if (input_block > 0) {
    room = std::make_unique<char[]>(best.rounded_bytes(tokens, form) + kLine);
    rounded = room.get() + kLine - reinterpret_cast<uintptr_t>(room.get()) % kLine;
    best.round(from, tokens, input_block, form, rounded);
  }
  Share(pool, total, Grain(form.bytes + 2 * form.blocks, kTogether), [&](int64_t begin, int64_t end) {
    for (const Matrix& matrix : matrices) {
      const int64_t here = std::max(begin - matrix.first, int64_t{0});
      const int64_t there = std::min(end - matrix.first, matrix.n);
      if (here >= there) continue;
      if (rounded) {
        best.dot_rounded(rounded, tokens, matrix.rows, here, there, matrix.out, matrix.n);
      } else {
        best.dot_blocks(from, tokens, matrix.rows, here, there, matrix.out, matrix.n);
      }
    }
  });
  return ffi::Error::Success();
}

ffi::Error PickedProduct(ffi::ThreadPool pool, F32 x, S8 integers, ffi::AnyBuffer scale,
                         ffi::AnyBuffer minimum, S32 layer, S32 picked, Result out) {
  const int64_t d = x.dimensions()[1], tokens = picked.dimensions()[0], count = picked.dimensions()[1];
  Blocks rows;
  const ffi::Error error = SetRows(d, layer.typed_data()[0], integers, scale, minimum, rows);
  if (error.failure()) return error;
  Share(pool, tokens * count, Grain(rows.bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin, next; i < end; i = next) {
      const int64_t token = i / count;
      next = std::min(end, (token + 1) * count);
      Best().dot_picked(x.typed_data() + token * d, rows, picked.typed_data() + i, next - i,
                        out->typed_data() + i);
    }
  });
  return ffi::Error::Success();
}

ffi::Error PickedSum(ffi::ThreadPool pool, F32 onto, F32 h, S8 integers, ffi::AnyBuffer scale,
                     ffi::AnyBuffer minimum, S32 layer, S32 picked, Result out) {
  const int64_t d = onto.dimensions()[1], tokens = picked.dimensions()[0], count = picked.dimensions()[1];
  Blocks rows;
  const ffi::Error error = SetRows(d, layer.typed_data()[0], integers, scale, minimum, rows);
  if (error.failure()) return error;
  // Each thread has columns of its own: then the order of additions does not depend on threads.
  const int64_t pieces = rows.bytes / kPiece;
  Share(pool, tokens * pieces, Grain(count * kPiece), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin, next; i < end; i = next) {
      const int64_t token = i / pieces, first = i % pieces;
      next = std::min(end, (token + 1) * pieces);
      const int64_t last = first + next - i;
      const float* from = onto.typed_data() + token * d;
      float* to = out->typed_data() + token * d;
      for (int64_t half = 0; half < d; half += rows.bytes) {
        std::copy(from + half + first * kPiece, from + half + last * kPiece, to + half + first * kPiece);
      }
      Best().add_picked(h.typed_data() + token * count, rows, picked.typed_data() + token * count, count,
                        first, last, to);
    }
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
extern "C" int hire_version() { return 5; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_product, Product,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<ffi::AnyBuffer>()
                                  .Arg<S32>().Arg<F32>().Arg<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_block_product, BlockProduct,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<S32>()
                                  .RemainingArgs().RemainingRets().Attr<int64_t>("input_block"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_picked_product, PickedProduct,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<S8>()
                                  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<S32>().Arg<S32>()
                                  .Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_picked_sum, PickedSum,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Arg<S8>()
                                  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<S32>().Arg<S32>()
                                  .Ret<F32>());
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
