// The scaling factors γ of a network as rows of raw memory: what every CPU kernel here works on, whoever calls it
// (the pointer table of kernels/table.py, or an op on lists of tensors).
#pragma once

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
  std::vector<void*> gammas;
  std::vector<void*> grads;
  std::vector<void*> momenta;

  int64_t count() const { return static_cast<int64_t>(sizes.size()); }
};

// The same numbers as KIND_* in polarfast/kernels/polarize_ref.py.
enum class Kind : int64_t { polarization = 0, l1 = 1, deephoyer = 2 };

struct Penalty {
  Kind kind;
  double lam;
  double t;
  bool per_layer;
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
// summary: [rows, 3] threshold, kept, non-finite; counts: [rows, 100].
void valley(const Rows& rows, double* summary, int64_t* counts);

// Rows of checked CPU tensors. `grads` and `momenta` belong to the first rows, in order; no weights: all 1.
Rows rows_of(
    const std::vector<Tensor>& gammas,
    const std::vector<double>& weights = {},
    const std::vector<Tensor>& grads = {},
    const std::vector<Tensor>& momenta = {});

Penalty penalty_of(int64_t kind, double lam, double t, bool per_layer);

// The value of a 0-d float32 tensor such as GradScaler's grad_scale and found_inf.
double scalar_or(const std::optional<Tensor>& tensor, double otherwise);

// f(T{}) with T the element type of `dtype`: the only place that lists the types.
template <class F>
void dispatch(ScalarType dtype, const F& f) {
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
      STD_TORCH_CHECK(false, "polarfast: scaling factors must be float32, float16, bfloat16 or float64");
  }
}

}  // namespace polarfast
