// The targets that XLA calls, but for those of rows in blocks. `__init__.py` beside says what each
// computes.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

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
  const int64_t first = Layer(rows, layer) * n;
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

// The products of each token with the rows on its list.
ffi::Error ListedProduct(ffi::ThreadPool pool, F32 x, ffi::AnyBuffer rows, S32 layer, S32 lists, Result out) {
  const int64_t d = x.dimensions()[1], n = rows.dimensions()[1], count = lists.dimensions()[1];
  const Lists all(lists.typed_data(), lists.dimensions()[0], count);
  std::fill(out->typed_data(), out->typed_data() + out->element_count(), 0.0f);
  return ByType(rows.element_type(), [&](auto* type, auto dot) {
    using Row = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const Row* first = Data<Row>(rows) + Layer(rows, layer) * n * d;
    Share(pool, all.total(), Grain(d * sizeof(Row)), [&](int64_t begin, int64_t end) {
      all.Each(begin, end, [&](int64_t token, const int32_t* list, int64_t i, int64_t last) {
        for (; i < last; ++i) {
          if (i + 1 < last) Prefetch(first + list[i + 1] * d, d);
          dot(x.typed_data() + token * d, 1, first + list[i] * d, 1, d,
              out->typed_data() + token * count + i, count);
        }
      });
    });
  });
}

// The sum of the rows on each token's list, with its weights h. Rows of weight zero are not read, so
// that none may hold a NaN.
ffi::Error ListedSum(ffi::ThreadPool pool, F32 onto, F32 h, ffi::AnyBuffer rows, S32 layer, S32 lists,
                     Result out) {
  const int64_t n = rows.dimensions()[1], d = rows.dimensions()[2], count = lists.dimensions()[1];
  const int64_t tokens = lists.dimensions()[0];
  const Lists all(lists.typed_data(), tokens, count);
  const auto sum = [&](auto* type, auto add) {
    using Row = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const Row* first = Data<Row>(rows) + Layer(rows, layer) * n * d;
    // Each thread has columns of its own: then the order of additions does not depend on threads.
    const int64_t threads = std::max<int64_t>(1, pool.num_threads());
    const int64_t slice = std::max<int64_t>(64, (d / threads + 63) / 64 * 64);
    Share(pool, d, slice, [&](int64_t begin, int64_t end) {
      for (int64_t token = 0; token < tokens; ++token) {
        const float* from = onto.typed_data() + token * d;
        float* to = out->typed_data() + token * d;
        std::copy(from + begin, from + end, to + begin);
        const float* own = h.typed_data() + token * count;
        const int32_t* list = lists.typed_data() + token * count;
        const int64_t last = all.length(token);
        for (int64_t i = 0; i < last; ++i) {
          if (i + 1 < last) Prefetch(first + list[i + 1] * d + begin, end - begin);
          if (own[i] != 0) add(own + i, 1, count, first + list[i] * d + begin, 1, d, end - begin, to + begin, d);
        }
      }
    });
  };
  if (rows.element_type() == ffi::F32) {
    sum(static_cast<const float*>(nullptr), Best().add_f32);
  } else if (rows.element_type() == ffi::BF16) {
    sum(static_cast<const BFloat16*>(nullptr), Best().add_bf16);
  } else {
    return ffi::Error::InvalidArgument("rows must be float32 or bfloat16");
  }
  return ffi::Error::Success();
}

// Where each token's mask is true, in ascending order, and −1 behind; and how often it is.
ffi::Error Listed(ffi::Buffer<ffi::PRED> mask, ffi::Result<S32> places, ffi::Result<S32> counts) {
  const int64_t tokens = mask.dimensions()[0], n = mask.dimensions()[1], k = places->dimensions()[1];
  for (int64_t token = 0; token < tokens; ++token) {
    const auto* own = reinterpret_cast<const uint8_t*>(mask.untyped_data()) + token * n;
    int32_t* to = places->typed_data() + token * k;
    int64_t found = 0;
    const auto take = [&](int64_t i) {
      if (found < k) to[found] = static_cast<int32_t>(i);
      ++found;
    };
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      uint64_t eight;
      std::memcpy(&eight, own + i, sizeof(eight));
      for (int64_t j = i; eight && j < i + 8; ++j) {
        if (own[j]) take(j);
      }
    }
    for (; i < n; ++i) {
      if (own[i]) take(i);
    }
    std::fill(to + std::min(found, k), to + k, -1);
    counts->typed_data()[token] = static_cast<int32_t>(found);
  }
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_listed_product, ListedProduct,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<ffi::AnyBuffer>()
                                  .Arg<S32>().Arg<S32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_listed_sum, ListedSum,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<F32>().Arg<F32>()
                                  .Arg<ffi::AnyBuffer>().Arg<S32>().Arg<S32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(hire_listed, Listed,
                              ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::PRED>>().Ret<S32>().Ret<S32>());

// Which operands the targets take; to be raised here and in `__init__.py` when these change.
extern "C" int hire_version() { return 8; }

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
