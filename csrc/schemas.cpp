// What the ops look like to the dispatcher. Each kernel file registers its own implementation.
#include "torch_target.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(polarfast, m) {
  m.def("gather_channels(Tensor weight, Tensor? out_index, Tensor? in_index) -> Tensor");
  m.def("put_back(Tensor kept, Tensor index, Tensor constant) -> Tensor");
  m.def(
      "put_back_norm(Tensor input, Tensor index, Tensor constant, Tensor weight, Tensor? bias, Tensor mean, "
      "Tensor var, float eps) -> Tensor");
}
