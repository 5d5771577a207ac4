// What the ops look like to the dispatcher. Each kernel file registers its own implementation.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(polarfast, m) {
  // grads[i] belongs to gammas[i]; gammas beyond len(grads) are frozen: counted, never moved.
  m.def(
      "add_subgradient_(Tensor[] gammas, Tensor(a!)[] grads, float[] weights, int kind, float lam, float t, "
      "bool per_layer, Tensor? grad_scale=None) -> ()");
  m.def("clamp_(Tensor(a!)[] gammas, float upper, Tensor? found_inf=None) -> ()");
  // weights: of gammas, then of frozen. momenta: empty when momentum is 0.
  m.def(
      "sgd_step_(Tensor(a!)[] gammas, Tensor[] grads, Tensor(b!)[] momenta, Tensor[] frozen, float[] weights, "
      "int kind, float lam, float t, bool per_layer, float lr, float momentum, float dampening, "
      "float weight_decay, bool nesterov, bool maximize, float? upper, bool first_step, "
      "Tensor? grad_scale=None, Tensor? found_inf=None) -> ()");
  // summary: float64 [rows, 3]; counts: int64 [rows, 100].
  m.def("valley(Tensor[] gammas) -> (Tensor summary, Tensor counts)");
  m.def("gather_channels(Tensor weight, Tensor? out_index, Tensor? in_index) -> Tensor");
  m.def("put_back(Tensor kept, Tensor index, Tensor constant) -> Tensor");
  m.def(
      "put_back_norm(Tensor input, Tensor index, Tensor constant, Tensor weight, Tensor? bias, Tensor mean, "
      "Tensor var, float eps) -> Tensor");
}
