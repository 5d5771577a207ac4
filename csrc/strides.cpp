#include "strides.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <limits>

namespace polarfast {

using torch::stable::Tensor;

bool is_channels_last(const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  if (dim != 4 && dim != 5) return false;
  int64_t expected = 1;
  if (tensor.stride(1) != expected) return false;
  expected *= std::max<int64_t>(tensor.size(1), 1);
  for (int64_t d = dim - 1; d >= 2; --d) {
    if (tensor.stride(d) != expected) return false;
    expected *= std::max<int64_t>(tensor.size(d), 1);
  }
  return tensor.stride(0) == expected;
}

Tensor empty_as(const Tensor& like, const std::vector<int64_t>& sizes, bool channels_last) {
  const int64_t dim = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> strides(dim);
  int64_t stride = 1;
  const auto lay = [&](int64_t d) {
    const int64_t step = std::max<int64_t>(sizes[d], 1);
    STD_TORCH_CHECK(stride <= std::numeric_limits<int64_t>::max() / step, "polarfast: the result has too many elements");
    strides[d] = stride;
    stride *= step;
  };
  if (channels_last) lay(1);
  for (int64_t d = dim - 1; d >= 0; --d) {
    if (!channels_last || d != 1) lay(d);
  }
  // Through the C interface, which knows dtypes by number: also those that this build has no name for.
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

}  // namespace polarfast
