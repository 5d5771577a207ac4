// A network's kept channels at their places among constants, in one pass; as they are, or normalized on the way (a batch
// norm in eval mode).
//
// A contiguous tensor is seen as rows of one channel's positions, a channels_last one as rows of one position's
// channels.
#include "torch_target.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "rows.h"
#include "simd.h"
#include "strides.h"

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#define POLARFAST_EXPANDS
#endif

namespace polarfast {

namespace {

// Elements that a thread should have to write before it is worth waking.
constexpr int64_t kGrain = 1 << 15;

// Arithmetic is in float for half precision, as in torch.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Where each output channel comes from (-1: it is constant). Checked before anything is read from `input`.
std::vector<int64_t> sources(const Tensor& index, int64_t kept, int64_t width) {
  STD_TORCH_CHECK(
      index.is_cpu() && index.dim() == 1 && index.scalar_type() == ScalarType::Long && index.is_contiguous(),
      "polarfast: index must be a contiguous 1-D int64 tensor on the CPU");
  STD_TORCH_CHECK(
      index.numel() == kept, "polarfast: index has ", index.numel(), " places for ", kept, " channels");
  std::vector<int64_t> from(width, -1);
  const int64_t* places = index.const_data_ptr<int64_t>();
  for (int64_t k = 0; k < kept; ++k) {
    STD_TORCH_CHECK(
        places[k] >= 0 && places[k] < width, "polarfast: index[", k, "] is ", places[k], ", outside the ", width,
        " channels");
    STD_TORCH_CHECK(from[places[k]] < 0, "polarfast: index[", k, "] is ", places[k], " for the second time");
    from[places[k]] = k;
  }
  return from;
}

// The numbers of a vector of any floating dtype.
template <class W>
std::vector<W> numbers(const Tensor& tensor, int64_t size, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cpu() && tensor.is_contiguous() && tensor.dim() == 1 && tensor.numel() == size,
      "polarfast: ", name, " must be a contiguous CPU tensor of ", size, " elements");
  std::vector<W> found(size);
  dispatch(tensor.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T* values = tensor.const_data_ptr<T>();
    for (int64_t i = 0; i < size; ++i) found[i] = static_cast<W>(values[i]);
  }, name);
  return found;
}

// y = x·scale + shift of each kept channel; empty: y = x.
template <class W>
struct Affine {
  std::vector<W> scale;
  std::vector<W> shift;
};

// A batch norm in eval mode; without `var`, none.
struct Norm {
  std::optional<Tensor> weight;
  std::optional<Tensor> bias;
  std::optional<Tensor> mean;
  std::optional<Tensor> var;
  double eps = 0;
};

template <class W>
Affine<W> affine_of(const Norm& norm, int64_t kept) {
  if (!norm.var) return {};
  const auto weight = numbers<W>(*norm.weight, kept, "weight");
  const auto mean = numbers<W>(*norm.mean, kept, "mean"), var = numbers<W>(*norm.var, kept, "var");
  const auto bias = norm.bias ? numbers<W>(*norm.bias, kept, "bias") : std::vector<W>(kept, W(0));
  Affine<W> found{std::vector<W>(kept), std::vector<W>(kept)};
  for (int64_t k = 0; k < kept; ++k) {
    found.scale[k] = weight[k] / std::sqrt(var[k] + static_cast<W>(norm.eps));
    found.shift[k] = bias[k] - mean[k] * found.scale[k];
  }
  return found;
}

template <class T>
struct Work {
  const T* input;
  T* out;
  int64_t kept;
  int64_t width;
  int64_t positions;  // of one sample
  const std::vector<int64_t>& from;
  const std::vector<T>& constant;
  const Affine<Wide<T>>& affine;
};

// Rows [begin, end) of `positions` elements, of one channel each.
template <class T>
void planes(const Work<T>& work, int64_t begin, int64_t end) {
  using W = Wide<T>;
  const int64_t n = work.positions;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t channel = row % work.width, k = work.from[channel];
    T* to = work.out + row * n;
    const T* x = k < 0 ? nullptr : work.input + (row / work.width * work.kept + k) * n;
    vectorized([&]() POLARFAST_INLINE {
      if (k < 0) {
        std::fill_n(to, n, work.constant[channel]);
      } else if (work.affine.scale.empty()) {
        std::copy_n(x, n, to);
      } else {
        const W scale = work.affine.scale[k], shift = work.affine.shift[k];
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(static_cast<W>(x[i]) * scale + shift);
      }
    });
  }
}

// Rows [begin, end) of `width` elements, of one position each.
template <class T>
void pixels(const Work<T>& work, const int64_t* places, int64_t begin, int64_t end) {
  using W = Wide<T>;
  const bool plain = work.affine.scale.empty();
  const W* scale = work.affine.scale.data();
  const W* shift = work.affine.shift.data();
  vectorized([&]() POLARFAST_INLINE {
    for (int64_t row = begin; row < end; ++row) {
      T* to = work.out + row * work.width;
      const T* x = work.input + row * work.kept;
      std::copy_n(work.constant.data(), work.width, to);
      if (plain) {
        for (int64_t k = 0; k < work.kept; ++k) to[places[k]] = x[k];
      } else {
        for (int64_t k = 0; k < work.kept; ++k) {
          to[places[k]] = static_cast<T>(static_cast<W>(x[k]) * scale[k] + shift[k]);
        }
      }
    }
  });
}

#ifdef POLARFAST_EXPANDS

struct Floats {
  using T = float;
  using Mask = __mmask16;
  static constexpr int64_t kLanes = 16;
};

struct Doubles {
  using T = double;
  using Mask = __mmask8;
  static constexpr int64_t kLanes = 8;
};

#define POLARFAST_AVX512 __attribute__((target("avx512f"), always_inline)) inline
POLARFAST_AVX512 __m512 expand(__mmask16 lanes, const float* x) { return _mm512_maskz_expandloadu_ps(lanes, x); }
POLARFAST_AVX512 __m512d expand(__mmask8 lanes, const double* x) { return _mm512_maskz_expandloadu_pd(lanes, x); }
POLARFAST_AVX512 __m512 load(const float* x) { return _mm512_loadu_ps(x); }
POLARFAST_AVX512 __m512d load(const double* x) { return _mm512_loadu_pd(x); }
POLARFAST_AVX512 __m512 affine(__m512 x, __m512 scale, __m512 shift) {
  return _mm512_add_ps(_mm512_mul_ps(x, scale), shift);
}
POLARFAST_AVX512 __m512d affine(__m512d x, __m512d scale, __m512d shift) {
  return _mm512_add_pd(_mm512_mul_pd(x, scale), shift);
}
POLARFAST_AVX512 __m512 choose(__mmask16 lanes, __m512 x, __m512 other) { return _mm512_mask_mov_ps(other, lanes, x); }
POLARFAST_AVX512 __m512d choose(__mmask8 lanes, __m512d x, __m512d other) {
  return _mm512_mask_mov_pd(other, lanes, x);
}
POLARFAST_AVX512 void store(float* to, __mmask16 lanes, __m512 x) { _mm512_mask_storeu_ps(to, lanes, x); }
POLARFAST_AVX512 void store(double* to, __mmask8 lanes, __m512d x) { _mm512_mask_storeu_pd(to, lanes, x); }

// As `pixels`, for kept channels in ascending order: those of a vector's places lie side by side in the input, and one
// instruction spreads them over their lanes: as fast as a norm of the full width (benchmarks/bench_putback.py).
template <class L>
__attribute__((target("avx512f"))) void spread_pixels(const Work<typename L::T>& work, int64_t begin, int64_t end) {
  using T = typename L::T;
  using Mask = typename L::Mask;
  const int64_t vectors = (work.width + L::kLanes - 1) / L::kLanes;
  const bool plain = work.affine.scale.empty();
  std::vector<Mask> lanes(vectors), all(vectors);
  std::vector<int64_t> first(vectors);  // kept channels before
  std::vector<T> scale(vectors * L::kLanes), shift(vectors * L::kLanes), constant(vectors * L::kLanes);
  int64_t seen = 0;
  for (int64_t c = 0; c < work.width; ++c) {
    const int64_t vector = c / L::kLanes, k = work.from[c];
    const Mask lane = static_cast<Mask>(1u << (c % L::kLanes));
    if (c % L::kLanes == 0) first[vector] = seen;
    all[vector] |= lane;
    constant[c] = work.constant[c];
    if (k < 0) continue;
    lanes[vector] |= lane;
    ++seen;
    if (!plain) {
      scale[c] = work.affine.scale[k];
      shift[c] = work.affine.shift[k];
    }
  }
  for (int64_t row = begin; row < end; ++row) {
    T* to = work.out + row * work.width;
    const T* x = work.input + row * work.kept;
    for (int64_t v = 0; v < vectors; ++v) {
      auto y = expand(lanes[v], x + first[v]);
      const int64_t c = v * L::kLanes;
      if (!plain) y = affine(y, load(&scale[c]), load(&shift[c]));
      store(to + c, all[v], choose(lanes[v], y, load(&constant[c])));
    }
  }
}

#endif

// Rows [begin, end) of `width` elements, of one position each, the fastest way.
template <class T>
void any_pixels(const Work<T>& work, const int64_t* places, int64_t begin, int64_t end) {
#ifdef POLARFAST_EXPANDS
  if (simd_level() == SimdLevel::avx512 && std::is_sorted(places, places + work.kept)) {
    if constexpr (std::is_same_v<T, float>) return spread_pixels<Floats>(work, begin, end);
    if constexpr (std::is_same_v<T, double>) return spread_pixels<Doubles>(work, begin, end);
  }
#endif
  pixels(work, places, begin, end);
}

Tensor put_back(const Tensor& input, const Tensor& index, const Tensor& constant, const Norm& norm) {
  const int64_t dim = input.dim();
  STD_TORCH_CHECK(input.is_cpu() && dim >= 2, "polarfast: input must be a CPU tensor [samples, channels, ...]");
  STD_TORCH_CHECK(
      constant.is_cpu() && constant.dim() == 1 && constant.is_contiguous(),
      "polarfast: constant must be a contiguous CPU tensor of one dimension");
  const bool channels_last = !input.is_contiguous() && is_channels_last(input);
  STD_TORCH_CHECK(channels_last || input.is_contiguous(), "polarfast: input must be contiguous or channels_last");
  const int64_t kept = input.size(1), width = constant.numel();
  const std::vector<int64_t> from = sources(index, kept, width);
  std::vector<int64_t> sizes(dim);
  int64_t positions = 1;
  for (int64_t d = 0; d < dim; ++d) {
    sizes[d] = d == 1 ? width : input.size(d);
    if (d >= 2) positions *= sizes[d];
  }
  Tensor out = empty_as(input, sizes, channels_last);
  dispatch(input.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using W = Wide<T>;
    const std::vector<W> wide = numbers<W>(constant, width, "constant");
    std::vector<T> constants(width);
    for (int64_t c = 0; c < width; ++c) constants[c] = static_cast<T>(wide[c]);
    const Affine<W> affine = affine_of<W>(norm, kept);
    if (out.numel() == 0) return;
    const Work<T> work{
        input.const_data_ptr<T>(), out.mutable_data_ptr<T>(), kept, width, positions, from, constants, affine};
    const bool by_pixel = channels_last || positions == 1;
    const int64_t rows = sizes[0] * (by_pixel ? positions : width);
    const int64_t grain = std::max<int64_t>(1, kGrain / (by_pixel ? width : positions));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      by_pixel ? any_pixels(work, index.const_data_ptr<int64_t>(), begin, end) : planes(work, begin, end);
    });
  }, "input");
  return out;
}

Tensor put_back_op(const Tensor& kept, const Tensor& index, const Tensor& constant) {
  return put_back(kept, index, constant, {});
}

Tensor put_back_norm_op(
    const Tensor& input,
    const Tensor& index,
    const Tensor& constant,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const Tensor& mean,
    const Tensor& var,
    double eps) {
  STD_TORCH_CHECK(eps >= 0, "polarfast: eps must be 0 or more, not ", eps);
  return put_back(input, index, constant, {weight, bias, mean, var, eps});
}

}  // namespace

}  // namespace polarfast

STABLE_TORCH_LIBRARY_IMPL(polarfast, CPU, m) {
  m.impl("put_back", TORCH_BOX(&polarfast::put_back_op));
  m.impl("put_back_norm", TORCH_BOX(&polarfast::put_back_norm_op));
}
