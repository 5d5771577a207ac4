// The coefficients of each regularizer's subgradient: the one form in which all kernels know them.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "rows.h"
#include "simd.h"

namespace polarfast {

// float64 γ are computed in double, all others in float.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// ∂R/∂γ_j = a·sgn(γ_j) + b·γ_j + c·sgn(γ_j − mean) + k, the coefficients being those of γ_j's row.
struct Coefficients {
  double a = 0, b = 0, c = 0, k = 0, mean = 0;
};

// Coefficients in the type that the loop computes in. x > mean iff x > below, x < mean iff x < above, both exact:
// below and above are mean rounded down and up, so the float loop compares as if in double.
template <class C>
struct Subgradient {
  C a, b, c, k, below, above;

  Subgradient(const Coefficients& from, double scale)
      : a(static_cast<C>(from.a * scale)),
        b(static_cast<C>(from.b * scale)),
        c(static_cast<C>(from.c * scale)),
        k(static_cast<C>(from.k * scale)),
        below(static_cast<C>(from.mean)),
        above(static_cast<C>(from.mean)) {
    constexpr C inf = std::numeric_limits<C>::infinity();
    if (below > from.mean) below = std::nextafter(below, -inf);
    if (above < from.mean) above = std::nextafter(above, inf);
  }

  POLARFAST_INLINE C operator()(C x) const {
    const C linear = b == C(0) ? C(0) : b * x;  // 0 · ∞ would be NaN
    return a * (C(x > C(0)) - C(x < C(0))) + linear + c * (C(x > below) - C(x < above)) + k;
  }
};

// One for each row, reduced in double.
std::vector<Coefficients> coefficients(const Rows& rows, const Penalty& penalty);

}  // namespace polarfast
