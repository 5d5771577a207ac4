// weight[out_index][:, in_index] in one pass.
//
// Every weight is seen as [out][middle][in][inner] in memory: contiguous tensors have middle = 1 and inner = the kernel
// positions; channels_last ones have middle = the kernel positions and inner = 1.
#include "torch_target.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "rows.h"
#include "strides.h"

namespace polarfast {

namespace {

// Bytes that a thread should have to copy before it is worth waking.
constexpr int64_t kGrainBytes = 1 << 16;

// How much memory is asked for at once: it should still be in the cache when it is written to.
constexpr int64_t kTouchedBytes = 1 << 18;

// Runs of channels shorter than this, on average, are not worth a call of memcpy each.
constexpr int64_t kShortRun = 32;

// A run of channels that lie side by side in the source, in bytes.
struct Run {
  int64_t from;
  int64_t size;
};

// How many channels an index selects; without one, all.
int64_t selected(const std::optional<Tensor>& index, int64_t channels, const char* name) {
  if (!index) return channels;
  STD_TORCH_CHECK(
      index->is_cpu() && index->dim() == 1 && index->scalar_type() == ScalarType::Long,
      "polarfast: ", name, " must be a 1-D int64 tensor on the weight's device");
  return index->numel();
}

// Reads an index once, into numbers known to be in range: nothing is read from the weight before that. With `keep`
// false they are only checked: an expanded index may claim more places than there is memory for.
std::vector<int64_t> checked(const Tensor& index, int64_t channels, const char* name, bool keep) {
  std::vector<int64_t> found;
  int64_t count = index.numel();
  if (count == 0) return found;
  const int64_t stride = index.stride(0);
  if (!keep && stride == 0) count = 1;  // one number, however often
  if (keep) found.reserve(count);
  const int64_t* values = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t channel = values[i * stride];
    STD_TORCH_CHECK(
        channel >= 0 && channel < channels,
        "polarfast: ", name, "[", i, "] is ", channel, ", outside the weight's ", channels, " channels");
    if (keep) found.push_back(channel);
  }
  return found;
}

std::vector<Run> runs_of(const std::vector<int64_t>& channels, int64_t bytes) {
  std::vector<Run> runs;
  for (int64_t channel : channels) {
    if (!runs.empty() && runs.back().from + runs.back().size == channel * bytes) {
      runs.back().size += bytes;
    } else {
      runs.push_back({channel * bytes, bytes});
    }
  }
  return runs;
}

// What to copy for one output channel: `middle` times the input channels, as runs or, where these are short, one by one.
// All channels are one run, and listed only where that is a short one.
struct Row {
  int64_t middle;
  int64_t from_stride;  // bytes between two of the `middle`
  const std::vector<int64_t>& channels;
  const std::vector<Run>& runs;
};

void copy_runs(char* to, const char* from, const Row& row) {
  for (int64_t m = 0; m < row.middle; ++m, from += row.from_stride) {
    for (const Run& run : row.runs) {
      std::memcpy(to, from + run.from, run.size);
      to += run.size;
    }
  }
}

// `bytes` is known when this is compiled, so that a channel is one or a few moves and not a call of memcpy.
template <int64_t bytes>
void copy_channels(char* to, const char* from, const Row& row) {
  for (int64_t m = 0; m < row.middle; ++m, from += row.from_stride) {
    for (const int64_t channel : row.channels) {
      std::memcpy(to, from + channel * bytes, bytes);
      to += bytes;
    }
  }
}

using CopyRow = void (*)(char*, const char*, const Row&);

// The bytes of one channel in all dtypes of a 1×1 kernel, and of a 3×3 kernel in float32 and half precision.
CopyRow copier(int64_t channel_bytes, const Row& row) {
  if (row.channels.empty()) return copy_runs;
  const int64_t run_bytes = channel_bytes * static_cast<int64_t>(row.channels.size() / row.runs.size());
  if (run_bytes > kShortRun) return copy_runs;
  switch (channel_bytes) {
    case 1:
      return copy_channels<1>;
    case 2:
      return copy_channels<2>;
    case 4:
      return copy_channels<4>;
    case 8:
      return copy_channels<8>;
    case 16:
      return copy_channels<16>;
    case 18:
      return copy_channels<18>;
    case 36:
      return copy_channels<36>;
    default:
      return copy_runs;
  }
}

// Fresh memory costs more than the copy into it, when it is handed out page by page as each is first written to. Linux
// 5.14 and later does it for a whole block at once; where it is refused nothing is lost.
void touch([[maybe_unused]] char* begin, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_POPULATE_WRITE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) / kPage * kPage;
  if (last < first + kTouchedBytes / 2) return;
  unsigned char resident = 0;  // memory that was used before is better left alone: even looking at each page costs
  mincore(reinterpret_cast<void*>(last - kPage), kPage, &resident);
  if (!(resident & 1)) madvise(reinterpret_cast<void*>(first), last - first, MADV_POPULATE_WRITE);
#endif
}

Tensor gather_channels_op(
    const Tensor& given, const std::optional<Tensor>& out_index, const std::optional<Tensor>& in_index) {
  const int64_t dim = given.dim();
  STD_TORCH_CHECK(dim >= 1 && dim <= 5, "polarfast: a weight of 1 to 5 dimensions is expected, not of ", dim);
  STD_TORCH_CHECK(dim >= 2 || !in_index, "polarfast: a 1-D weight has no input channels to select");
  const int64_t in_channels = dim >= 2 ? given.size(1) : 1;
  std::vector<int64_t> sizes(dim);
  for (int64_t d = 0; d < dim; ++d) sizes[d] = given.size(d);
  sizes[0] = selected(out_index, given.size(0), "out_index");
  if (dim >= 2) sizes[1] = selected(in_index, in_channels, "in_index");
  const bool channels_last = is_channels_last(given);
  Tensor result = empty_as(given, sizes, channels_last);
  const bool any = result.numel() != 0;
  std::vector<int64_t> out, in;
  if (out_index) out = checked(*out_index, given.size(0), "out_index", any);
  if (in_index) in = checked(*in_index, in_channels, "in_index", any);
  if (!any) return result;
  const Tensor weight = channels_last || given.is_contiguous() ? given : torch::stable::contiguous(given);

  int64_t positions = 1;
  for (int64_t d = 2; d < dim; ++d) positions *= sizes[d];
  const int64_t element = static_cast<int64_t>(weight.element_size());
  const int64_t middle = channels_last ? positions : 1;
  const int64_t channel_bytes = channels_last ? element : element * positions;
  if (!in_index) {
    for (int64_t i = 0; i < in_channels && in_channels * channel_bytes <= kShortRun; ++i) in.push_back(i);
  }
  const std::vector<Run> runs =
      in.empty() ? std::vector<Run>{{0, in_channels * channel_bytes}} : runs_of(in, channel_bytes);
  const Row row{middle, in_channels * channel_bytes, in, runs};
  const int64_t from_row = middle * row.from_stride;
  const int64_t to_row = middle * (dim >= 2 ? sizes[1] : 1) * channel_bytes;
  const CopyRow copy = copier(channel_bytes, row);
  const auto* from = static_cast<const char*>(weight.const_data_ptr());
  auto* to = static_cast<char*>(result.mutable_data_ptr());
  torch::stable::parallel_for(
      0, sizes[0], std::max<int64_t>(1, kGrainBytes / to_row), [&](int64_t begin, int64_t end) {
        const int64_t block = std::max<int64_t>(1, kTouchedBytes / to_row);
        for (int64_t first = begin; first < end; first += block) {
          const int64_t last = std::min(first + block, end);
          touch(to + first * to_row, (last - first) * to_row);
          for (int64_t o = first; o < last; ++o) copy(to + o * to_row, from + (out_index ? out[o] : o) * from_row, row);
        }
      });
  return result;
}

}  // namespace

}  // namespace polarfast

STABLE_TORCH_LIBRARY_IMPL(polarfast, CPU, m) {
  m.impl("gather_channels", TORCH_BOX(&polarfast::gather_channels_op));
}
