// The scaling factors γ of a network as rows of raw memory: what the kernels of the training step and the
// thresholds work on, and the element types that all kernels know.
#pragma once

#include "torch_target.h"

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace polarfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Row l is one γ tensor, one layer. `grads[l]` null: the row is frozen, it counts and is never written.
struct Rows {
  ScalarType dtype = ScalarType::Float;
  std::vector<int64_t> sizes;
  std::vector<double> weights;
  std::vector<double> tilts;  // what is added to t in each row
  std::vector<double> centers;  // for Kind::centered
  std::vector<void*> gammas;
  std::vector<void*> grads;
  std::vector<void*> momenta;

  int64_t count() const { return static_cast<int64_t>(sizes.size()); }
};

// As in polarfast/kernels/table.py, like Penalty and Sgd.
enum class Kind : int64_t { polarization = 0, l1 = 1, deephoyer = 2, centered = 3, squared = 4 };

struct Penalty {
  Kind kind;
  double lam;
  double t;
  bool per_layer;
  bool weighted;
  bool through;
};

// One step of torch.optim.SGD, in the names of its arguments.
struct Sgd {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  bool nesterov;
  bool maximize;
  std::optional<double> upper;
  bool first_step;
  double grad_scale;
};

void add_subgradient(const Rows& rows, const Penalty& penalty, double grad_scale);
void clamp(const Rows& rows, double upper);
// With momentum, every row that has a gradient must have a momentum buffer.
void sgd_step(const Rows& rows, const Penalty& penalty, const Sgd& sgd);
// Of the γ at these addresses, in place of those in `rows`. summary: [rows, 3] threshold, kept, non-finite; counts:
// [rows, 100].
void valley(const Rows& rows, const std::vector<int64_t>& gammas, double* summary, int64_t* counts);

// f(T{}) with T the element type of `dtype`: the only place that lists the types. `what` is refused in all others.
template <class F>
void dispatch(ScalarType dtype, const F& f, const char* what = "scaling factors") {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(c10::Half{});
    case ScalarType::BFloat16:
      return f(c10::BFloat16{});
    default:
      STD_TORCH_CHECK(false, "polarfast: ", what, " must be float32, float16, bfloat16 or float64");
  }
}

}  // namespace polarfast
