// The γ work of a training step: subgradient of the regularizer, clamp, and both fused into a step of SGD.
// The formula in plain torch: polarfast/kernels/eager_table.py.
//
// One thread: the γ of a ResNet-50 (26,560) take a few microseconds a pass, which is less than waking a second thread.
#include "coefficients.h"

namespace polarfast {

namespace {

template <class T, class S>
POLARFAST_INLINE inline void add_row(const T* gamma, T* grad, int64_t n, const S subgradient) {
  using C = Compute<T>;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    grad[i] = static_cast<T>(static_cast<C>(grad[i]) + subgradient(static_cast<C>(gamma[i])));
  }
}

// NaN stays NaN, as in torch.clamp: a comparison with NaN is false.
template <class C>
POLARFAST_INLINE inline C clamped(C x, C upper) {
  return x < C(0) ? C(0) : (x > upper ? upper : x);
}

template <class T, class C>
POLARFAST_INLINE inline void clamp_row(T* gamma, int64_t n, C upper) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) gamma[i] = static_cast<T>(clamped(static_cast<C>(gamma[i]), upper));
}

// SGD's constants in the type the loop computes in. A bound that there is not lies at infinity, so that there is one loop
// and not one for each set of options. What is switched off is no factor 0: 0 · ∞ would be NaN, and SGD has no such term.
template <class C>
struct SgdFactors {
  C grad, keep, fresh, weight_decay, lr, lower, upper;
  bool nesterov;

  explicit SgdFactors(const Sgd& sgd)
      : grad(static_cast<C>((sgd.maximize ? -1.0 : 1.0) / sgd.grad_scale)),
        keep(static_cast<C>(sgd.momentum)),
        fresh(static_cast<C>(1.0 - sgd.dampening)),
        weight_decay(static_cast<C>(sgd.weight_decay)),
        lr(static_cast<C>(sgd.lr)),
        lower(sgd.upper ? C(0) : -std::numeric_limits<C>::infinity()),
        upper(sgd.upper ? static_cast<C>(*sgd.upper) : std::numeric_limits<C>::infinity()),
        nesterov(sgd.nesterov) {}
};

enum class Buffer { none, first, running };

template <Buffer buffer, class T, class S, class C>
POLARFAST_INLINE inline void sgd_row(
    T* gamma,
    const T* grad,
    T* momentum,
    int64_t n,
    const S subgradient,
    const SgdFactors<C> f) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const C x = static_cast<C>(gamma[i]);
    C d = f.grad * static_cast<C>(grad[i]) + subgradient(x);
    d = f.weight_decay == C(0) ? d : d + f.weight_decay * x;
    if constexpr (buffer != Buffer::none) {
      C held = d;
      if constexpr (buffer == Buffer::running) held = f.keep * static_cast<C>(momentum[i]) + f.fresh * d;
      momentum[i] = static_cast<T>(held);
      d = f.nesterov ? d + f.keep * held : held;
    }
    const C moved = x - f.lr * d;
    gamma[i] = static_cast<T>(moved < f.lower ? f.lower : (moved > f.upper ? f.upper : moved));
  }
}

template <Buffer buffer, class T>
void sgd_rows(const Rows& rows, Kind kind, const std::vector<Coefficients>& found, const Sgd& sgd) {
  using C = Compute<T>;
  const SgdFactors<C> factors(sgd);
  for (int64_t l = 0; l < rows.count(); ++l) {
    if (rows.grads[l] == nullptr) continue;
    auto* gamma = static_cast<T*>(rows.gammas[l]);
    auto* grad = static_cast<const T*>(rows.grads[l]);
    auto* momentum = static_cast<T*>(rows.momenta[l]);
    const int64_t n = rows.sizes[l];
    with_subgradient<C>(kind, found[l], 1.0, [&](const auto& subgradient) {
      vectorized([&]() POLARFAST_INLINE { sgd_row<buffer>(gamma, grad, momentum, n, subgradient, factors); });
    });
  }
}

}  // namespace

void add_subgradient(const Rows& rows, const Penalty& penalty, double grad_scale) {
  const std::vector<Coefficients> found = coefficients(rows, penalty);
  dispatch(rows.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t l = 0; l < rows.count(); ++l) {
      if (rows.grads[l] == nullptr) continue;
      auto* gamma = static_cast<const T*>(rows.gammas[l]);
      auto* grad = static_cast<T*>(rows.grads[l]);
      with_subgradient<Compute<T>>(penalty.kind, found[l], grad_scale, [&](const auto& subgradient) {
        vectorized([&]() POLARFAST_INLINE { add_row(gamma, grad, rows.sizes[l], subgradient); });
      });
    }
  });
}

void clamp(const Rows& rows, double upper) {
  dispatch(rows.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t l = 0; l < rows.count(); ++l) {
      if (rows.grads[l] == nullptr) continue;
      auto* gamma = static_cast<T*>(rows.gammas[l]);
      vectorized([&]() POLARFAST_INLINE { clamp_row(gamma, rows.sizes[l], static_cast<Compute<T>>(upper)); });
    }
  });
}

void sgd_step(const Rows& rows, const Penalty& penalty, const Sgd& sgd) {
  const std::vector<Coefficients> found = coefficients(rows, penalty);
  dispatch(rows.dtype, [&](auto element) {
    using T = decltype(element);
    if (sgd.momentum == 0) return sgd_rows<Buffer::none, T>(rows, penalty.kind, found, sgd);
    if (sgd.first_step) return sgd_rows<Buffer::first, T>(rows, penalty.kind, found, sgd);
    sgd_rows<Buffer::running, T>(rows, penalty.kind, found, sgd);
  });
}

}  // namespace polarfast
