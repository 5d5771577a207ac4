#include "rows.h"

namespace polarfast {

namespace {

std::vector<void*> addresses(const std::vector<Tensor>& tensors, const std::vector<Tensor>& gammas, const char* what) {
  STD_TORCH_CHECK(tensors.size() <= gammas.size(), "polarfast: more ", what, " than scaling factors");
  std::vector<void*> found(gammas.size(), nullptr);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    STD_TORCH_CHECK(tensor.is_cpu(), "polarfast: ", what, "[", i, "] is not a CPU tensor");
    STD_TORCH_CHECK(tensor.is_contiguous(), "polarfast: ", what, "[", i, "] is not contiguous");
    STD_TORCH_CHECK(
        tensor.scalar_type() == gammas[0].scalar_type(), "polarfast: ", what, "[", i, "] is of another dtype");
    STD_TORCH_CHECK(tensor.numel() == gammas[i].numel(), "polarfast: ", what, "[", i, "] has another size than its γ");
    found[i] = tensor.data_ptr();
  }
  return found;
}

}  // namespace

Rows rows_of(
    const std::vector<Tensor>& gammas,
    const std::vector<double>& weights,
    const std::vector<Tensor>& grads,
    const std::vector<Tensor>& momenta) {
  STD_TORCH_CHECK(!gammas.empty(), "polarfast: no scaling factors given");
  Rows rows;
  rows.dtype = gammas[0].scalar_type();
  rows.gammas = addresses(gammas, gammas, "gammas");
  rows.grads = addresses(grads, gammas, "grads");
  rows.momenta = addresses(momenta, gammas, "momenta");
  rows.weights = weights.empty() ? std::vector<double>(gammas.size(), 1.0) : weights;
  STD_TORCH_CHECK(rows.weights.size() == gammas.size(), "polarfast: one weight for each scaling factor is needed");
  for (const Tensor& gamma : gammas) rows.sizes.push_back(gamma.numel());
  return rows;
}

Penalty penalty_of(int64_t kind, double lam, double t, bool per_layer) {
  STD_TORCH_CHECK(kind >= 0 && kind <= 2, "polarfast: no regularizer has the kind ", kind);
  return {static_cast<Kind>(kind), lam, t, per_layer};
}

double scalar_or(const std::optional<Tensor>& tensor, double otherwise) {
  if (!tensor) return otherwise;
  STD_TORCH_CHECK(
      tensor->is_cpu() && tensor->numel() == 1 && tensor->scalar_type() == ScalarType::Float,
      "polarfast: grad_scale and found_inf must be float32 CPU tensors of one element");
  return *tensor->const_data_ptr<float>();
}

}  // namespace polarfast
