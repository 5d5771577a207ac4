// Instruction sets, chosen when the program runs.
//
// One binary serves every x86-64 machine: `vectorized(f)` runs the same loop body compiled for AVX-512, AVX2 or the
// baseline. A wheel built with -march=native would die of an illegal instruction elsewhere. Elsewhere than x86-64
// (aarch64: NEON is baseline) the body is compiled once.
//
// The sets never change a result: sums go through `lane_sum`, whose order is fixed, and the build forbids the
// contraction of a*b+c into a fused multiply-add (-ffp-contract=off).
#pragma once

#include <cstdint>

#if defined(__GNUC__)
#define POLARFAST_INLINE __attribute__((always_inline))
#else
#define POLARFAST_INLINE
#endif

namespace polarfast {

enum class SimdLevel { baseline, avx2, avx512 };

// The best set of this machine, or the one named in the environment variable POLARFAST_SIMD if that is lower.
SimdLevel simd_level();
const char* simd_name(SimdLevel level);

#if defined(__GNUC__) && defined(__x86_64__)

// `f` must be an always-inline lambda: it is then compiled with the attributes of the function it lands in.
template <class F>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,prefer-vector-width=512"))) void run_avx512(const F& f) {
  f();
}

template <class F>
__attribute__((target("avx2,f16c"))) void run_avx2(const F& f) {
  f();
}

template <class F>
void vectorized(const F& f) {
  switch (simd_level()) {
    case SimdLevel::avx512:
      return run_avx512(f);
    case SimdLevel::avx2:
      return run_avx2(f);
    case SimdLevel::baseline:
      return f();
  }
}

#else

template <class F>
void vectorized(const F& f) {
  f();
}

#endif

// Σ f(x_i) in double, always in the same order: element i goes to lane i mod 16, then the lanes are added in a tree.
template <class T, class F>
POLARFAST_INLINE inline double lane_sum(const T* x, int64_t n, F f) {
  constexpr int kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int k = 0; k < kLanes; ++k) lanes[k] += f(x[i + k]);
  }
  for (int k = 0; i < n; ++i, ++k) lanes[k] += f(x[i]);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  }
  return lanes[0];
}

}  // namespace polarfast
