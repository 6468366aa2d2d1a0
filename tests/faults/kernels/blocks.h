// Cases of the targets for rows in blocks.

#ifndef HIRE_REWRITE_BLOCKS_H_
#define HIRE_REWRITE_BLOCKS_H_

#include "plain.h"

HIRE_TARGET(hire_block_product);
HIRE_TARGET(hire_picked_product);
HIRE_TARGET(hire_picked_sum);

namespace fuzz {
namespace {

// Rows in blocks: a stack of matrices [layers, n, d].
struct Matrix {
  int64_t n, d, blocks;
  bool narrow, ratio;
  XLA_FFI_DataType scales, minima;
  Array integers, scale, minimum;

  // form: 0 for no minima, 1 for some, 2 for one number.
  Matrix(Bytes& bytes, int64_t layers, int64_t n, int64_t d, int64_t blocks, bool narrow, int64_t form)
      : n(n), d(d), blocks(blocks), narrow(narrow), ratio(form == 2), scales(Type(bytes)),
        minima(form == 2 ? F32 : Type(bytes)),
        integers(Floats(bytes, XLA_FFI_DataType_S8, {layers, n, narrow ? d / 2 : d})),
        scale(Floats(bytes, scales, {layers, n, blocks})),
        minimum(form == 2 ? Floats(bytes, F32, {1})
                          : Floats(bytes, minima, {layers, n, form == 1 ? blocks : 0})) {}
  static XLA_FFI_DataType Type(Bytes& bytes) {
    const XLA_FFI_DataType types[] = {F32, XLA_FFI_DataType_BF16, XLA_FFI_DataType_F16};
    return types[bytes.Next(2)];
  }
  // A number as its two terms, which both may be huge where their sum is not.
  void Terms(int64_t row, int64_t j, double* first, double* second) const {
    const int64_t b = row * blocks + j * blocks / d, half = d / 2;
    const bool has = minimum.count() > 0;
    double integer = integers.data<int8_t>()[narrow ? row * half + j % half : row * d + j];
    if (narrow) {
      const auto both = static_cast<uint8_t>(integer);
      const int own = j < half ? both & 15 : both >> 4;
      integer = !has && own > 7 ? own - 16 : own;
    }
    const double step = Number(scale, scales, b);
    *first = integer * step;
    *second = ratio ? Number(minimum, F32, 0) * step : has ? Number(minimum, minima, b) : 0;
  }
};

std::vector<Matrix> Matrices(Bytes& bytes, const Sizes& s, int64_t count, bool alike) {
  std::vector<Matrix> matrices;
  const bool many = s.columns > 70;
  int64_t blocks = 1 + bytes.Next(2), pieces = (1 + bytes.Next(3)) * (many ? 8 : 1);
  const bool narrow = bytes.Flag() && blocks * pieces % 2 == 0;
  const int64_t form = bytes.Next(2);
  matrices.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t d = blocks * pieces * 32, own = alike ? std::max(std::min<int64_t>(1, s.rows), s.rows - i) : s.rows;
    matrices.emplace_back(bytes, s.layers, own, d, blocks, narrow, form);
  }
  return matrices;
}

// x as it is rounded to 8 bits, a scale for every `block` columns.
std::vector<double> RoundedInputs(const Array& x, int64_t block) {
  std::vector<double> rounded(x.count());
  for (int64_t i = 0; i < x.count(); i += block) {
    float greatest = 0;
    bool finite = true;
    for (int64_t j = i; j < i + block; ++j) {
      finite = finite && std::isfinite(x.data<float>()[j]);
      greatest = std::max(greatest, std::abs(x.data<float>()[j]));
    }
    const float scale = greatest * (1.0f / 127), step = scale == 0 ? 1 : scale;
    for (int64_t j = i; j < i + block; ++j) {
      rounded[j] = finite ? static_cast<double>(std::nearbyint(x.data<float>()[j] / step)) * scale : std::nan("");
    }
  }
  return rounded;
}

// Products of both terms, which the kernels may add before or after they multiply.
void AddBoth(Sum& sum, double x, const Matrix& matrix, int64_t row, int64_t j, double* greatest) {
  double first, second;
  matrix.Terms(row, j, &first, &second);
  sum.Add(x, first + second);
  sum.odd = sum.odd || !std::isfinite(first) || !std::isfinite(second);
  sum.size += std::abs(x) * (std::abs(first) + std::abs(second));
  *greatest = std::max({*greatest, std::abs(first), std::abs(second), std::abs(x)});
}

void BlockProduct(Bytes& bytes) {
  const Sizes s(bytes);
  std::vector<Matrix> matrices = Matrices(bytes, s, 1 + bytes.Next(2), true);
  const int64_t d = matrices[0].d, input_block = bytes.Flag() ? 0 : (d % 64 == 0 && bytes.Flag() ? 64 : 32);
  int64_t here;
  Array layer = LayerOf(bytes, s.layers, &here), x = Floats(bytes, F32, {s.tokens, d});
  std::vector<Array> outs;
  std::vector<Array*> operands = {&x, &layer}, results;
  for (Matrix& m : matrices) {
    outs.emplace_back(F32, 4, std::vector<int64_t>{s.tokens, m.n});
    operands.insert(operands.end(), {&m.integers, &m.scale, &m.minimum});
  }
  for (Array& out : outs) results.push_back(&out);
  Expect(Call(hire_block_product, s.threads, operands, results, &input_block));
  std::vector<double> inputs(x.data<float>(), x.data<float>() + x.count());
  if (input_block) inputs = RoundedInputs(x, input_block);
  for (size_t m = 0; m < matrices.size(); ++m) {
    for (int64_t i = 0; i < outs[m].count(); ++i) {
      const int64_t n = matrices[m].n, row = here * n + i % n;
      Sum sum;
      double greatest = 0;
      for (int64_t j = 0; j < d; ++j) AddBoth(sum, inputs[i / n * d + j], matrices[m], row, j, &greatest);
      Check("block product", i, outs[m].data<float>()[i], sum, 128 * d * greatest, true);
    }
  }
}

void PickedProduct(Bytes& bytes) {
  const Sizes s(bytes);
  std::vector<Matrix> matrices = Matrices(bytes, s, 1, false);
  Matrix& m = matrices[0];
  const int64_t count = bytes.Next(12);
  int64_t here;
  Array layer = LayerOf(bytes, s.layers, &here), x = Floats(bytes, F32, {s.tokens, m.d});
  Array picked = Lists(bytes, s.tokens, count, m.n), out(F32, 4, {s.tokens, count});
  Expect(Call(hire_picked_product, s.threads, {&x, &m.integers, &m.scale, &m.minimum, &layer, &picked}, {&out}));
  for (int64_t i = 0; i < out.count(); ++i) {
    const int64_t row = picked.data<int32_t>()[i];
    Sum sum;
    double greatest = 0;
    for (int64_t j = 0; row >= 0 && j < m.d; ++j) {
      AddBoth(sum, x.data<float>()[i / count * m.d + j], m, here * m.n + row, j, &greatest);
    }
    Check("picked product", i, out.data<float>()[i], sum, 128 * m.d * greatest, true);
  }
}

void PickedSum(Bytes& bytes) {
  const Sizes s(bytes);
  std::vector<Matrix> matrices = Matrices(bytes, s, 1 + bytes.Next(2), false);
  const int64_t count = bytes.Next(12), n = matrices[0].n, d = matrices[0].d;
  int64_t here;
  Array layer = LayerOf(bytes, s.layers, &here), h = Floats(bytes, F32, {s.tokens, count});
  Array picked = Lists(bytes, s.tokens, count, n);
  std::vector<Array> ontos, outs;
  std::vector<Array*> operands = {&h, &layer, &picked}, results;
  ontos.reserve(matrices.size());
  for (Matrix& m : matrices) {
    ontos.push_back(Floats(bytes, F32, {s.tokens, d}));
    outs.emplace_back(F32, 4, std::vector<int64_t>{s.tokens, d});
    operands.insert(operands.end(), {&ontos.back(), &m.integers, &m.scale, &m.minimum});
  }
  for (Array& out : outs) results.push_back(&out);
  Expect(Call(hire_picked_sum, s.threads, operands, results));
  for (size_t m = 0; m < matrices.size(); ++m) {
    for (int64_t i = 0; i < outs[m].count(); ++i) {
      const int64_t t = i / d;
      Sum sum;
      double greatest = 0;
      sum.Add(ontos[m].data<float>()[i], 1);
      for (int64_t j = t * count; j < (t + 1) * count && picked.data<int32_t>()[j] >= 0; ++j) {
        AddBoth(sum, h.data<float>()[j], matrices[m], here * n + picked.data<int32_t>()[j], i % d, &greatest);
      }
      Check("picked sum", i, outs[m].data<float>()[i], sum, 128 * (count + 1) * greatest, true);
    }
  }
}

}  // namespace
}  // namespace fuzz

#endif  // HIRE_REWRITE_BLOCKS_H_
