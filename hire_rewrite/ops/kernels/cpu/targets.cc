// The targets that XLA calls, but for those of rows in blocks. `__init__.py` beside says what each
// computes.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "targets.h"
#include "top_k.h"

namespace hire {
namespace {

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
  const int64_t last = rows.dimensions()[0] - 1;  // as XLA's slices take what lies outside
  const int64_t first = std::clamp<int64_t>(layer.typed_data()[0], 0, last) * n;
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
      TopK(Best(), scores.typed_data() + i * n, n, k, values->typed_data() + i * k, indices->typed_data() + i * k);
    }
  });
  return ffi::Error::Success();
}

// Of each token the values of the k groups of greatest score, and all values with those zero.
ffi::Error SetApart(ffi::ThreadPool pool, F32 values, F32 scores, ffi::Result<S32> places, Result apart,
                    Result others) {
  const int64_t n = values.dimensions()[1], groups = scores.dimensions()[1], k = places->dimensions()[1];
  const int64_t tokens = scores.dimensions()[0], group = groups ? n / groups : 0;
  Share(pool, tokens, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* from = values.typed_data() + t * n;
      float* rest = others->typed_data() + t * n;
      float* to = apart->typed_data() + t * k * group;
      int32_t* place = places->typed_data() + t * k;
      std::copy(from, from + n, rest);
      EachGreatest(Best(), scores.typed_data() + t * groups, groups, k, [&](int64_t i, int32_t) {
        *place++ = static_cast<int32_t>(i);
        to = std::copy(from + i * group, from + (i + 1) * group, to);
        std::fill(rest + i * group, rest + (i + 1) * group, 0.0f);
      });
    }
  });
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)

// Which operands the targets take; to be raised here and in `__init__.py` when these change.
extern "C" int hire_version() { return 7; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_product, Product,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<ffi::AnyBuffer>()
                                  .Arg<S32>().Arg<F32>().Arg<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_fetched_product, FetchedProduct,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<ffi::AnyBuffer>()
                                  .Arg<S32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_fetched_sum, FetchedSum,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<ffi::AnyBuffer>()
                                  .Arg<S32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_set_apart, SetApart,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>().Ret<S32>()
                                  .Ret<F32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_top_k, TopKOfRows,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Ret<F32>()
                                  .Ret<S32>());

#pragma GCC visibility pop

}  // namespace hire
