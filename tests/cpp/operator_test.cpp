// torch.ops.tcurlora.* from C++, with no Python in the process: forward, gradients and errors against the definition.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdio>
#include <exception>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace {

using torch::Tensor;
using LinearType = Tensor(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& col, const Tensor& core,
    const Tensor& row, int64_t first_slice, int64_t num_slices, double scale, c10::string_view transform,
    c10::string_view backend);

int failures = 0;

void expect(bool holds, const std::string& what) {
  std::printf("%s  %s\n", holds ? "ok    " : "FAILED", what.c_str());
  failures += holds ? 0 : 1;
}

Tensor random(at::IntArrayRef shape) { return torch::randn(shape, torch::kDouble); }

// The slice transform of docs/maths.md (S, S), orthonormal, from its definition.
Tensor transform_matrix(int64_t slices) {
  Tensor matrix = torch::zeros({slices, slices}, torch::kDouble);
  const double pi = std::acos(-1.0);
  for (int64_t l = 0; l < slices; ++l) {
    matrix[0][l] = std::sqrt(1.0 / slices);
    for (int64_t k = 1; 2 * k < slices; ++k) {
      matrix[2 * k - 1][l] = std::sqrt(2.0 / slices) * std::cos(2 * pi * k * l / slices);
      matrix[2 * k][l] = -std::sqrt(2.0 / slices) * std::sin(2 * pi * k * l / slices);
    }
    if (slices % 2 == 0) matrix[slices - 1][l] = std::sqrt(1.0 / slices) * (l % 2 == 0 ? 1.0 : -1.0);
  }
  return matrix;
}

// What `row` and `col` carry beside the orthonormal blocks: they hold the unnormalised DFT.
Tensor spectrum_norms(int64_t slices) {
  Tensor norms = torch::full({slices, 1}, std::sqrt(slices / 2.0), torch::kDouble);
  norms[0] = std::sqrt(static_cast<double>(slices));
  if (slices % 2 == 0) norms[slices - 1] = std::sqrt(static_cast<double>(slices));
  return norms;
}

struct Problem {
  int64_t slices, out, in, c, r, first, n;
  Tensor C, U, R, x, weight, bias;
  double scale = 0.7;

  Problem(int64_t slices_, int64_t out_, int64_t in_, int64_t c_, int64_t r_, int64_t first_, int64_t n_)
      : slices(slices_), out(out_), in(in_), c(c_), r(r_), first(first_), n(n_),
        C(random({slices_, out_, c_})), U(random({slices_, c_, r_})), R(random({slices_, r_, in_})),
        x(random({3, 5, in_})), weight(random({n_ * out_, in_})), bias(random({n_ * out_})) {}

  Tensor folded(const Tensor& tube, bool unnormalised) const {
    Tensor matrix = transform_matrix(slices);
    if (unnormalised) matrix = matrix * spectrum_norms(slices);
    return torch::tensordot(matrix, tube, {1}, {0});
  }
  // [Re C_k, -Im C_k] over the frequencies k, where row is [Re R_k; Im R_k].
  Tensor col() const {
    Tensor blocks = folded(C, true);
    for (int64_t k = 1; 2 * k < slices; ++k) blocks[2 * k].neg_();
    return blocks.permute({1, 0, 2}).reshape({out, slices * c});
  }
  Tensor row() const { return folded(R, true).reshape({slices * r, in}); }
  Tensor core() const { return folded(U, false); }

  // W + scale * C * U * R by circular convolution over the slices.
  Tensor definition() const {
    std::vector<Tensor> rows;
    for (int64_t l = first; l < first + n; ++l) {
      Tensor delta = torch::zeros({out, in}, torch::kDouble);
      for (int64_t i = 0; i < slices; ++i) {
        for (int64_t j = 0; j < slices; ++j) {
          const int64_t k = ((l - i - j) % slices + slices) % slices;
          delta = delta + C[i].mm(U[j]).mm(R[k]);
        }
      }
      rows.push_back(scale * delta);
    }
    return torch::nn::functional::linear(x, weight + torch::cat(rows), bias);
  }

  Tensor operator_output(const Tensor& x_, const Tensor& core_, const std::string& backend = "auto") const {
    static const auto linear = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("tcurlora::linear", "")
                                   .typed<LinearType>();
    return linear.call(x_, weight, bias, col(), core_, row(), first, n, scale, "dft", backend);
  }
};

void compare(const Problem& problem, const std::string& name) {
  Tensor x = problem.x.clone().requires_grad_(), core = problem.core().requires_grad_();
  const Tensor y = problem.operator_output(x, core);
  expect(torch::allclose(y, problem.definition(), 1e-10, 1e-10), name + ": forward");

  const Tensor g = torch::randn_like(y);
  const auto found = torch::autograd::grad({y}, {x, core}, {g});
  Problem copy = problem;
  copy.x = problem.x.clone().requires_grad_();
  copy.U = problem.U.clone().requires_grad_();
  const auto right = torch::autograd::grad({copy.definition()}, {copy.x, copy.U}, {g});
  expect(torch::allclose(found[0], right[0], 1e-9, 1e-9), name + ": gradient of x");
  // An orthonormal transform: the core's gradient is that of U, transformed.
  expect(torch::allclose(found[1], problem.folded(right[1], false), 1e-9, 1e-9), name + ": gradient of the core");
}

void expect_error(const std::string& part, const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    expect(std::string(error.what()).find(part) != std::string::npos, "an error that says: " + part);
    return;
  }
  expect(false, "an error that says: " + part);
}

}  // namespace

int main() {
  torch::manual_seed(0);
  compare(Problem(1, 4, 5, 2, 3, 0, 1), "one slice");
  compare(Problem(5, 6, 7, 3, 2, 3, 1), "odd stack");
  compare(Problem(6, 6, 7, 2, 2, 3, 3), "even stack, three slices in one layer");

  const Problem problem(4, 6, 7, 2, 2, 0, 1);
  expect_error("core is torch.int64", [&] { problem.operator_output(problem.x, problem.core().to(torch::kLong)); });
  expect_error("x has shape", [&] { problem.operator_output(problem.x.slice(-1, 0, 6), problem.core()); });
  expect_error("'cuda' is unknown", [&] { problem.operator_output(problem.x, problem.core(), "cuda"); });
  std::printf("%s\n", failures == 0 ? "all passed" : "some FAILED");
  return failures == 0 ? 0 : 1;
}
