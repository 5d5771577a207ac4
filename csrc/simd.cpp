#include "simd.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace polarfast {

namespace {

SimdLevel detect() {
#if defined(__GNUC__) && defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return SimdLevel::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return SimdLevel::avx2;
#endif
  return SimdLevel::baseline;
}

SimdLevel choose() {
  const SimdLevel best = detect();
  const char* asked = std::getenv("POLARFAST_SIMD");
  if (asked == nullptr) return best;
  for (SimdLevel level : {SimdLevel::baseline, SimdLevel::avx2}) {
    if (std::strcmp(asked, simd_name(level)) == 0) return std::min(level, best);
  }
  return best;
}

}  // namespace

SimdLevel simd_level() {
  static const SimdLevel level = choose();
  return level;
}

const char* simd_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::avx512:
      return "avx512";
    case SimdLevel::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace polarfast
