#include "coefficients.h"

namespace polarfast {

namespace {

template <class T>
double sum(const void* x, int64_t n) {
  double total = 0;
  vectorized([&]() POLARFAST_INLINE {
    total = lane_sum(static_cast<const T*>(x), n, [](T v) POLARFAST_INLINE { return double(Compute<T>(v)); });
  });
  return total;
}

template <class T>
POLARFAST_INLINE inline double largest(const T* x, int64_t n) {
  double most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) {
    const double size = std::abs(double(Compute<T>(x[i])));
    most = size > most ? size : most;
  }
  return most;
}

template <class T, class C>
POLARFAST_INLINE inline int64_t count_signs(const T* x, int64_t n, C below, C above) {
  int32_t total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const C v = static_cast<C>(x[i]);
    total += (v > below ? 1 : 0) - (v < above ? 1 : 0);
  }
  return total;
}

// Σ sgn(γ_i − mean) over a row: an integer, hence exact in any order.
template <class T>
int64_t sign_sum(const void* x, int64_t n, double mean) {
  Coefficients at_mean;
  at_mean.mean = mean;
  const Subgradient<Compute<T>> bounds(at_mean, 1.0);
  int64_t total = 0;
  vectorized([&]() POLARFAST_INLINE {
    total = count_signs(static_cast<const T*>(x), n, bounds.below, bounds.above);
  });
  return total;
}

// Eq. 2 and its form with squares. What each γ counts for in the mean is 1, or its layer's weight.
template <class T>
void polarization_coefficients(const Rows& rows, const Penalty& penalty, std::vector<Coefficients>& found) {
  const int64_t count = rows.count();
  const bool squared = penalty.kind == Kind::squared;
  const auto counts_for = [&](int64_t l) { return penalty.weighted ? rows.weights[l] : 1.0; };
  std::vector<double> totals(count);
  double mass = 0, total = 0;
  for (int64_t l = 0; l < count; ++l) {
    totals[l] = sum<T>(rows.gammas[l], rows.sizes[l]);
    mass += counts_for(l) * rows.sizes[l];
    total += counts_for(l) * totals[l];
  }
  const double mean = mass == 0 ? 0 : total / mass;
  double pull = 0;  // on the mean: Σ w_i·φ'(γ_i − mean)
  for (int64_t l = 0; l < count; ++l) {
    Coefficients& row = found[l];
    const double strength = penalty.lam * rows.weights[l];
    row.mean = penalty.per_layer ? totals[l] / rows.sizes[l] : mean;
    const double slopes = squared ? 2 * (totals[l] - rows.sizes[l] * row.mean)
                                  : sign_sum<T>(rows.gammas[l], rows.sizes[l], row.mean);
    pull += rows.weights[l] * slopes;
    row.a = strength * (penalty.t + rows.tilts[l]);
    if (squared) {
      row.b = -2 * strength;
      row.k = 2 * strength * row.mean;
    } else {
      row.c = -strength;
    }
    if (penalty.through && penalty.per_layer) row.k += strength * slopes / rows.sizes[l];
  }
  if (!penalty.through || penalty.per_layer || mass == 0) return;
  for (int64_t l = 0; l < count; ++l) found[l].k += penalty.lam * counts_for(l) * pull / mass;
}

// With y = s·|γ|, s a power of two, Y the largest y, q = Σ y(Y − y) / Σ y and m = Y − q, which is Σ y² / Σ y:
//
//     ∂(‖γ‖₁²/‖γ‖₂²)/∂γ_j = 2s/m · sgn(γ_j) · ((Y − y_j) − q) / m
//
// No two numbers that are almost equal are subtracted but those of the γ themselves, and with s no square leaves the
// range of double.
template <class T>
void deephoyer_coefficients(const Rows& rows, const Penalty& penalty, std::vector<Coefficients>& found) {
  for (int64_t l = 0; l < rows.count(); ++l) {
    const auto* x = static_cast<const T*>(rows.gammas[l]);
    const int64_t n = rows.sizes[l];
    double most = 0, total = 0, spread = 0;
    vectorized([&]() POLARFAST_INLINE { most = largest(x, n); });
    const double scale = most < 0x1p-340 ? 0x1p600 : (most > 0x1p340 ? 0x1p-600 : 1);
    const double top = most * scale;
    vectorized([&]() POLARFAST_INLINE {
      total = lane_sum(x, n, [=](T v) POLARFAST_INLINE { return std::abs(double(Compute<T>(v))) * scale; });
      spread = lane_sum(x, n, [=](T v) POLARFAST_INLINE {
        const double size = std::abs(double(Compute<T>(v))) * scale;
        return size * (top - size);
      });
    });
    if (total == 0) continue;  // ‖γ‖₁²/‖γ‖₂² has no derivative at 0; 0 leaves such a layer where it is
    const double mean = spread / total, middle = top - mean;
    found[l] = {2 * penalty.lam * rows.weights[l] / middle * scale, scale, 1 / middle, top, mean};
  }
}

}  // namespace

std::vector<Coefficients> coefficients(const Rows& rows, const Penalty& penalty) {
  std::vector<Coefficients> found(rows.count());
  if (penalty.kind == Kind::l1) {
    for (int64_t l = 0; l < rows.count(); ++l) found[l].a = penalty.lam * rows.weights[l];
    return found;
  }
  if (penalty.kind == Kind::centered) {
    for (int64_t l = 0; l < rows.count(); ++l) {
      const double strength = penalty.lam * rows.weights[l];
      found[l] = {strength * (penalty.t + rows.tilts[l]), 0, -strength, 0, rows.centers[l]};
    }
    return found;
  }
  dispatch(rows.dtype, [&](auto element) {
    using T = decltype(element);
    if (penalty.kind == Kind::deephoyer) return deephoyer_coefficients<T>(rows, penalty, found);
    polarization_coefficients<T>(rows, penalty, found);
  });
  return found;
}

}  // namespace polarfast
