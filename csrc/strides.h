// Memory formats of CPU tensors of any dtype.
#pragma once

#include "torch_target.h"

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace polarfast {

// Whether a tensor of 4 or 5 dimensions lies in memory with its channels side by side. By its strides alone: where all
// spatial sizes are 1 it may pass for contiguous too.
bool is_channels_last(const torch::stable::Tensor& tensor);

// A new tensor of the dtype of `like`.
torch::stable::Tensor empty_as(
    const torch::stable::Tensor& like, const std::vector<int64_t>& sizes, bool channels_last);

}  // namespace polarfast
