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
// DeepHoyer: a·sgn(γ_j)·c·((k − b·|γ_j|) − mean).
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

// Of DeepHoyer, in double whatever the type of γ: the subgradient is as large as 1/γ, and is a difference that is 0 where
// all γ of the row that are not 0 are equal.
template <class C>
struct HoyerSubgradient {
  double a, b, c, k, mean;

  HoyerSubgradient(const Coefficients& from, double scale)
      : a(from.a * scale), b(from.b), c(from.c), k(from.k), mean(from.mean) {}

  POLARFAST_INLINE C operator()(C x) const {
    const double wide = x;
    const double away = (k - b * std::abs(wide)) - mean;
    const double size = away == 0 || wide == 0 ? 0 : a * (c * away);  // 0 · ∞ would be NaN
    return static_cast<C>(wide < 0 ? -size : size);
  }
};

// f(subgradient) with the form that a row's coefficients are in.
template <class C, class F>
void with_subgradient(Kind kind, const Coefficients& row, double scale, const F& f) {
  if (kind == Kind::deephoyer) return f(HoyerSubgradient<C>(row, scale));
  f(Subgradient<C>(row, scale));
}

// One for each row, reduced in double.
std::vector<Coefficients> coefficients(const Rows& rows, const Penalty& penalty);

}  // namespace polarfast
