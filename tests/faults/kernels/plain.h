// Cases of the targets that know no blocks.

#ifndef HIRE_REWRITE_PLAIN_H_
#define HIRE_REWRITE_PLAIN_H_

#include "reference.h"

#define HIRE_TARGET(name) extern "C" XLA_FFI_Error* name(XLA_FFI_CallFrame*)
HIRE_TARGET(hire_product);
HIRE_TARGET(hire_fetched_product);
HIRE_TARGET(hire_fetched_sum);
HIRE_TARGET(hire_listed_product);
HIRE_TARGET(hire_listed_sum);
HIRE_TARGET(hire_listed);
HIRE_TARGET(hire_top_k);
HIRE_TARGET(hire_set_apart);

namespace fuzz {
namespace {

constexpr auto F32 = XLA_FFI_DataType_F32;

struct Sizes {
  int64_t threads, tokens, rows, columns, layers;

  explicit Sizes(Bytes& bytes) {
    const bool many = bytes.Next(7) == 7;  // enough for several threads
    threads = 1 + bytes.Next(5);
    tokens = bytes.Next(19);
    rows = bytes.Next(21) * (many ? 8 : 1);
    columns = bytes.Next(70) * (many ? 11 : 1);
    layers = 1 + bytes.Next(2);
  }
};

// A number of a layer, perhaps one that is not there.
Array LayerOf(Bytes& bytes, int64_t layers, int64_t* here) {
  Array layer(XLA_FFI_DataType_S32, 4, {1});
  const int64_t number = bytes.Next(layers + 3) - 2;
  layer.data<int32_t>()[0] = static_cast<int32_t>(number);
  *here = std::clamp<int64_t>(number, 0, layers - 1);
  return layer;
}

void Expect(const std::string& error) {
  if (error.empty()) return;
  std::fprintf(stderr, "%s\n", error.c_str());
  std::abort();
}

XLA_FFI_DataType RowType(Bytes& bytes, bool integers) {
  const XLA_FFI_DataType types[] = {F32, XLA_FFI_DataType_BF16, XLA_FFI_DataType_S8};
  return types[bytes.Next(integers ? 2 : 1)];
}

void Product(Bytes& bytes) {
  const Sizes s(bytes);
  const auto type = RowType(bytes, true);
  int64_t here;
  Array layer = LayerOf(bytes, s.layers, &here);
  Array x = Floats(bytes, F32, {s.tokens, s.columns}), rows = Floats(bytes, type, {s.layers, s.rows, s.columns});
  Array scale = Floats(bytes, F32, {s.layers, bytes.Flag() ? s.rows : 0});
  Array offset = Floats(bytes, F32, {s.layers, bytes.Flag() ? s.rows : 0});
  Array out(F32, 4, {s.tokens, s.rows});
  Expect(Call(hire_product, s.threads, {&x, &rows, &layer, &scale, &offset}, {&out}));
  for (int64_t i = 0; i < out.count(); ++i) {
    const int64_t t = i / s.rows, row = here * s.rows + i % s.rows;
    const double factor = scale.count() ? scale.data<float>()[row] : 1;
    const double term = offset.count() ? offset.data<float>()[row] : 0;
    Sum plain, sum;
    for (int64_t j = 0; j < s.columns; ++j) {
      plain.Add(x.data<float>()[t * s.columns + j], Number(rows, type, row * s.columns + j));
    }
    sum.total = plain.total * factor + term;
    sum.size = plain.size * std::abs(factor) + std::abs(term);
    sum.odd = plain.odd || !std::isfinite(factor) || !std::isfinite(term);
    Check("product", i, out.data<float>()[i], sum, std::max(plain.size, std::abs(factor)), true);
  }
}

void FetchedProduct(Bytes& bytes) {
  const Sizes s(bytes);
  const auto type = RowType(bytes, true);
  const int64_t members = 1 + bytes.Next(8), groups = 1 + s.rows, count = bytes.Next(6), d = s.columns;
  const int64_t lists = bytes.Flag() ? s.tokens : 1;
  Array x = Floats(bytes, F32, {s.tokens, d}), rows = Floats(bytes, type, {groups, members, d});
  Array index = Places(bytes, {lists, count}, groups), out(F32, 4, {s.tokens, count * members});
  Expect(Call(hire_fetched_product, s.threads, {&x, &rows, &index}, {&out}));
  for (int64_t i = 0; i < out.count(); ++i) {
    const int64_t t = i / (count * members), place = i % (count * members);
    const int64_t group = index.data<int32_t>()[(lists == 1 ? 0 : t) * count + place / members];
    Sum sum;
    for (int64_t j = 0; j < d; ++j) {
      sum.Add(x.data<float>()[t * d + j], Number(rows, type, (group * members + place % members) * d + j));
    }
    Check("fetched product", i, out.data<float>()[i], sum);
  }
}

void FetchedSum(Bytes& bytes) {
  const Sizes s(bytes);
  const auto type = RowType(bytes, false);
  const int64_t members = 1 + bytes.Next(8), groups = 1 + s.rows, count = bytes.Next(6), d = s.columns;
  Array h = Floats(bytes, F32, {s.tokens, count, members}), rows = Floats(bytes, type, {groups, members, d});
  Array index = Places(bytes, {count}, groups), out(F32, 4, {s.tokens, d});
  Expect(Call(hire_fetched_sum, s.threads, {&h, &rows, &index}, {&out}));
  for (int64_t i = 0; i < out.count(); ++i) {
    Sum sum;
    for (int64_t j = 0; j < count * members; ++j) {
      const int64_t row = index.data<int32_t>()[j / members] * members + j % members;
      sum.Add(h.data<float>()[i / d * count * members + j], Number(rows, type, row * d + i % d));
    }
    Check("fetched sum", i, out.data<float>()[i], sum);
  }
}

void ListedProduct(Bytes& bytes) {
  const Sizes s(bytes);
  const auto type = RowType(bytes, true);
  const int64_t count = bytes.Next(20), d = s.columns;
  int64_t here;
  Array layer = LayerOf(bytes, s.layers, &here), x = Floats(bytes, F32, {s.tokens, d});
  Array rows = Floats(bytes, type, {s.layers, s.rows, d}), lists = Lists(bytes, s.tokens, count, s.rows);
  Array out(F32, 4, {s.tokens, count});
  Expect(Call(hire_listed_product, s.threads, {&x, &rows, &layer, &lists}, {&out}));
  for (int64_t i = 0; i < out.count(); ++i) {
    const int64_t row = lists.data<int32_t>()[i];
    Sum sum;
    for (int64_t j = 0; row >= 0 && j < d; ++j) {
      sum.Add(x.data<float>()[i / count * d + j], Number(rows, type, (here * s.rows + row) * d + j));
    }
    Check("listed product", i, out.data<float>()[i], sum);
  }
}

void ListedSum(Bytes& bytes) {
  const Sizes s(bytes);
  const auto type = RowType(bytes, false);
  const int64_t count = bytes.Next(20), d = s.columns;
  int64_t here;
  Array layer = LayerOf(bytes, s.layers, &here), onto = Floats(bytes, F32, {s.tokens, d});
  Array h = Floats(bytes, F32, {s.tokens, count}), rows = Floats(bytes, type, {s.layers, s.rows, d});
  Array lists = Lists(bytes, s.tokens, count, s.rows), out(F32, 4, {s.tokens, d});
  Expect(Call(hire_listed_sum, s.threads, {&onto, &h, &rows, &layer, &lists}, {&out}));
  for (int64_t i = 0; i < out.count(); ++i) {
    Sum sum;
    sum.Add(onto.data<float>()[i], 1);
    for (int64_t j = i / d * count; j < (i / d + 1) * count && lists.data<int32_t>()[j] >= 0; ++j) {
      const int64_t row = here * s.rows + lists.data<int32_t>()[j];
      // A row of weight zero is not read, whatever it holds.
      if (h.data<float>()[j] != 0) sum.Add(h.data<float>()[j], Number(rows, type, row * d + i % d));
    }
    Check("listed sum", i, out.data<float>()[i], sum);
  }
}

void Listed(Bytes& bytes) {
  const Sizes s(bytes);
  const int64_t n = s.columns, k = bytes.Next(70), every = 1 + bytes.Next(9);
  Array mask(XLA_FFI_DataType_PRED, 1, {s.tokens, n}, bytes.Next(7));
  for (int64_t i = 0; i < mask.count(); ++i) mask.data<uint8_t>()[i] = bytes.Random() % every == 0;
  Array places(XLA_FFI_DataType_S32, 4, {s.tokens, k}), counts(XLA_FFI_DataType_S32, 4, {s.tokens});
  Expect(Call(hire_listed, s.threads, {&mask}, {&places, &counts}));
  for (int64_t t = 0; t < s.tokens; ++t) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (!mask.data<uint8_t>()[t * n + i]) continue;
      if (count < k) CheckEqual("listed", count, places.data<int32_t>()[t * k + count], i);
      ++count;
    }
    CheckEqual("how many are listed", t, counts.data<int32_t>()[t], count);
    for (; count < k; ++count) CheckEqual("end of a list", count, places.data<int32_t>()[t * k + count], -1);
  }
}

void TopK(Bytes& bytes) {
  const Sizes s(bytes);
  const int64_t n = 1 + s.columns * (bytes.Next(7) == 7 ? 80 : 1), k = bytes.Next(255) % (n + 1);
  Array scores = Floats(bytes, F32, {s.tokens, n});
  Array values(F32, 4, {s.tokens, k}), indices(XLA_FFI_DataType_S32, 4, {s.tokens, k});
  Expect(Call(hire_top_k, s.threads, {&scores}, {&values, &indices}));
  for (int64_t t = 0; t < s.tokens; ++t) {
    const float* own = scores.data<float>() + t * n;
    const std::vector<int32_t> order = Order(own, n);
    for (int64_t i = 0; i < k; ++i) {
      CheckEqual("top_k's index", i, indices.data<int32_t>()[t * k + i], order[i]);
      CheckBits("top_k's value", i, values.data<float>()[t * k + i], own[order[i]]);
    }
  }
}

void SetApart(Bytes& bytes) {
  const Sizes s(bytes);
  const int64_t groups = 1 + s.columns, group = 1 + bytes.Next(8), n = groups * group;
  const int64_t k = bytes.Next(255) % (groups + 1);
  Array values = Floats(bytes, F32, {s.tokens, n}), scores = Floats(bytes, F32, {s.tokens, groups});
  Array places(XLA_FFI_DataType_S32, 4, {s.tokens, k}), apart(F32, 4, {s.tokens, k * group});
  Array others(F32, 4, {s.tokens, n});
  Expect(Call(hire_set_apart, s.threads, {&values, &scores}, {&places, &apart, &others}));
  for (int64_t t = 0; t < s.tokens; ++t) {
    const float* own = values.data<float>() + t * n;
    std::vector<int32_t> order = Order(scores.data<float>() + t * groups, groups);
    order.resize(k);
    std::sort(order.begin(), order.end());
    std::vector<float> rest(own, own + n);
    for (int64_t i = 0; i < k; ++i) {
      CheckEqual("a place apart", i, places.data<int32_t>()[t * k + i], order[i]);
      for (int64_t j = 0; j < group; ++j) {
        float& number = rest[order[i] * group + j];
        CheckBits("apart", i, apart.data<float>()[(t * k + i) * group + j], number);
        number = 0;
      }
    }
    for (int64_t i = 0; i < n; ++i) CheckBits("the others", i, others.data<float>()[t * n + i], rest[i]);
  }
}

}  // namespace
}  // namespace fuzz

#endif  // HIRE_REWRITE_PLAIN_H_
