// The targets for rows in blocks. `__init__.py` beside says what each computes.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "targets.h"

namespace hire {
namespace {

constexpr int64_t kTogether = 4;  // rows whose sums have an order of their own

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

// Rows of a layer of a stack. A minimum of one axis is one number: how many scales each of them is.
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
  const bool ratio = minimum.dimensions().size() == 1;
  if (ratio && (minimum.element_count() != 1 || minimum.element_type() != ffi::F32)) {
    return ffi::Error::InvalidArgument("the ratio of minima to scales is one number of float32");
  }
  if (!SetFactors(scale, before * blocks, rows.scale) ||
      (!ratio && !SetFactors(minimum, before * blocks, rows.minimum))) {
    return ffi::Error::InvalidArgument("scales must be float32, bfloat16 or float16");
  }
  if (ratio) rows.ratio = *Data<float>(minimum);
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
  const Lists lists(picked.typed_data(), tokens, count);
  std::fill(out->typed_data(), out->typed_data() + out->element_count(), 0.0f);
  Share(pool, lists.total(), Grain(rows.bytes), [&](int64_t begin, int64_t end) {
    lists.Each(begin, end, [&](int64_t token, const int32_t* list, int64_t first, int64_t last) {
      Best().dot_picked(x.typed_data() + token * d, rows, list + first, last - first,
                        out->typed_data() + token * count + first);
    });
  });
  return ffi::Error::Success();
}

// The same rows' numbers of several matrices: of each what is added to, integers, scale and minimum.
ffi::Error PickedSum(ffi::ThreadPool pool, F32 h, S32 layer, S32 picked, ffi::RemainingArgs operands,
                     ffi::RemainingRets results) {
  const int64_t tokens = picked.dimensions()[0], count = picked.dimensions()[1];
  struct Sum {
    Blocks rows;
    int64_t first, pieces;  // its pieces, which count on from those of the matrices before it
    const float* onto;
    float* out;
  };
  std::vector<Sum> sums(results.size());
  int64_t total = 0;
  for (size_t i = 0; i < sums.size(); ++i) {
    const auto onto = operands.get<F32>(4 * i);
    const auto integers = operands.get<S8>(4 * i + 1);
    const auto scale = operands.get<ffi::AnyBuffer>(4 * i + 2);
    const auto minimum = operands.get<ffi::AnyBuffer>(4 * i + 3);
    auto out = results.get<F32>(i);
    if (!onto || !integers || !scale || !minimum || !out) {
      return ffi::Error::InvalidArgument("a sum begins with float32, and a matrix is integers of 8 bits, "
                                         "scales and minima");
    }
    Sum& sum = sums[i];
    const int64_t d = onto->dimensions()[1];
    const ffi::Error error = SetRows(d, layer.typed_data()[0], *integers, *scale, *minimum, sum.rows);
    if (error.failure()) return error;
    sum.first = total;
    sum.pieces = sum.rows.bytes / kPiece;
    sum.onto = onto->typed_data();
    sum.out = (*out)->typed_data();
    total += sum.pieces;
  }
  const Lists lists(picked.typed_data(), tokens, count);
  // Each thread has columns of its own: then the order of additions does not depend on threads.
  Share(pool, tokens * total, Grain(count * kPiece), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin / total; token * total < end; ++token) {
      for (const Sum& sum : sums) {
        const int64_t here = token * total + sum.first;
        const int64_t first = std::max(begin - here, int64_t{0});
        const int64_t last = std::min(end - here, sum.pieces);
        if (first >= last) continue;
        const float* from = sum.onto + token * sum.rows.d;
        float* to = sum.out + token * sum.rows.d;
        for (int64_t half = 0; half < sum.rows.d; half += sum.rows.bytes) {
          std::copy(from + half + first * kPiece, from + half + last * kPiece, to + half + first * kPiece);
        }
        Best().add_picked(h.typed_data() + token * count, sum.rows, picked.typed_data() + token * count,
                          lists.length(token), first, last, to);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_block_product, BlockProduct,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<S32>()
                                  .RemainingArgs().RemainingRets().Attr<int64_t>("input_block"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_picked_product, PickedProduct,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<S8>()
                                  .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<S32>().Arg<S32>()
                                  .Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_picked_sum, PickedSum,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<S32>().Arg<S32>()
                                  .RemainingArgs().RemainingRets());

#pragma GCC visibility pop

}  // namespace hire
