// Valley thresholds of all layers: histogram, first local minimum, kept count.
// The rule in plain torch: polarfast/kernels/eager_table.py.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "rows.h"
#include "simd.h"

namespace polarfast {

namespace {

constexpr int kBins = 100;
constexpr int kOutside = kBins;  // the bin of what numpy does not count: NaN and all beyond [0, 1]
constexpr int kBlock = 256;
// A layer that is not polarized puts every γ in one bin. Neighbours go to different tables, so that an increment need
// not wait for the one before it.
constexpr int kTables = 4;

using Histogram = std::array<std::array<int32_t, kBins + 1>, kTables>;

// numpy's float32 edges: linspace in double, rounded once. 100 * 0.01 is exactly 1.
POLARFAST_INLINE inline float edge(int32_t i) {
  return static_cast<float>(i * 0.01);
}

// Bin i holds edge(i) <= x < edge(i + 1), the last one its right edge too. The product is within one bin of the truth.
template <class T>
POLARFAST_INLINE inline void find_bins(const T* x, int64_t n, int32_t* bins) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float v = static_cast<float>(x[i]);
    const bool inside = v >= 0.0f && v <= 1.0f;
    int32_t bin = static_cast<int32_t>((inside ? v : 0.0f) * 100.0f);
    bin -= v < edge(bin) ? 1 : 0;
    bin += v >= edge(bin + 1) ? 1 : 0;
    bin = bin < kBins ? bin : kBins - 1;
    bins[i] = inside ? bin : kOutside;
  }
}

template <class T>
POLARFAST_INLINE inline int64_t count_above(const T* x, int64_t n, double threshold) {
  int32_t total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += static_cast<double>(x[i]) > threshold ? 1 : 0;
  return total;
}

template <class T>
POLARFAST_INLINE inline int64_t count_nonfinite(const T* x, int64_t n) {
  int32_t total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const auto v = static_cast<std::conditional_t<std::is_same_v<T, double>, double, float>>(x[i]);
    total += v - v == 0 ? 0 : 1;
  }
  return total;
}

template <class T>
void histogram(const T* x, int64_t n, int64_t* counts) {
  Histogram tables{};
  std::array<int32_t, kBlock> bins;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = std::min<int64_t>(kBlock, n - begin);
    vectorized([&]() POLARFAST_INLINE { find_bins(x + begin, size, bins.data()); });
    for (int64_t i = 0; i < size; ++i) ++tables[i % kTables][bins[i]];
  }
  for (int bin = 0; bin < kBins; ++bin) {
    counts[bin] = 0;
    for (const auto& table : tables) counts[bin] += table[bin];
  }
}

// The left edge of bin i+1 for the first i with counts[i+1] - counts[i] <= 0 <= counts[i+2] - counts[i+1].
double first_valley(const int64_t* counts) {
  for (int i = 0; i + 2 < kBins; ++i) {
    if (counts[i + 1] <= counts[i] && counts[i + 1] <= counts[i + 2]) return edge(i + 1);
  }
  return std::numeric_limits<double>::quiet_NaN();
}

}  // namespace

void valley(const Rows& rows, const std::vector<int64_t>& gammas, double* summary, int64_t* counts) {
  dispatch(rows.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t l = 0; l < rows.count(); ++l) {
      const auto* x = reinterpret_cast<const T*>(gammas[l]);
      const int64_t n = rows.sizes[l];
      histogram(x, n, counts + l * kBins);
      const double threshold = first_valley(counts + l * kBins);
      int64_t kept = n, nonfinite = 0;
      vectorized([&]() POLARFAST_INLINE {
        nonfinite = count_nonfinite(x, n);
        if (threshold == threshold) kept = count_above(x, n, threshold);
      });
      summary[l * 3] = threshold;
      summary[l * 3 + 1] = static_cast<double>(kept);
      summary[l * 3 + 2] = static_cast<double>(nonfinite);
    }
  });
}

}  // namespace polarfast
