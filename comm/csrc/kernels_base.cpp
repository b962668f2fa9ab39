// Plain C++, which the compiler vectorizes for the architecture's baseline: SSE2 on x86, NEON on Arm. Also
// the choice among the instruction sets that were built.
#include "kernels.h"

#include <cstring>
#include <initializer_list>

namespace yoke {
namespace {

#include "kernels_scalar.h"

constexpr std::size_t kLanes = 16;
struct V {
  float lane[kLanes];
};

template <DType type, class T>
inline void load_pair(const T* from, V& a, V& b) {
  for (std::size_t i = 0; i < kLanes; ++i) a.lane[i] = to_float<type>(from[i]);
  for (std::size_t i = 0; i < kLanes; ++i) b.lane[i] = to_float<type>(from[kLanes + i]);
}
template <DType type, class T>
inline void store_pair(T* to, const V& a, const V& b) {
  for (std::size_t i = 0; i < kLanes; ++i) to[i] = from_float<type>(a.lane[i]);
  for (std::size_t i = 0; i < kLanes; ++i) to[kLanes + i] = from_float<type>(b.lane[i]);
}
template <DType type, class T>
inline void store_rounded(T* to, const V& a, const V& b) {
  store_pair<type>(to, a, b);
}
template <DType type>
inline V rounded(const V& v) {
  V r;
  for (std::size_t i = 0; i < kLanes; ++i) r.lane[i] = to_float<type>(from_float<type>(v.lane[i]));
  return r;
}
inline V add(V a, const V& b) {
  for (std::size_t i = 0; i < kLanes; ++i) a.lane[i] += b.lane[i];
  return a;
}
inline V mul(V a, const V& b) {
  for (std::size_t i = 0; i < kLanes; ++i) a.lane[i] *= b.lane[i];
  return a;
}
inline V broadcast(float x) {
  V v;
  for (std::size_t i = 0; i < kLanes; ++i) v.lane[i] = x;
  return v;
}
inline V zero() { return broadcast(0.0f); }
inline float horizontal_sum(const V& v) {
  float total = 0.0f;
  for (std::size_t i = 0; i < kLanes; ++i) total += v.lane[i];
  return total;
}

#include "kernels_impl.h"

constexpr Kernels kBase = make_kernels("base");

}  // namespace

#if defined(__x86_64__) && YOKE_LEVEL >= 1
extern const Kernels kernels_avx2;
#endif
#if defined(__x86_64__) && YOKE_LEVEL >= 2
extern const Kernels kernels_avx512;
#endif
#if defined(__x86_64__) && YOKE_LEVEL >= 3
extern const Kernels kernels_avx512bf16;
#endif

const Kernels* find_kernels(const char* name) {
  if (std::strcmp(name, "base") == 0) return &kBase;
#if defined(__x86_64__) && YOKE_LEVEL >= 1
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (std::strcmp(name, "avx2") == 0) return avx2 ? &kernels_avx2 : nullptr;
#if YOKE_LEVEL >= 2
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (std::strcmp(name, "avx512") == 0) return avx512 ? &kernels_avx512 : nullptr;
#endif
#if YOKE_LEVEL >= 3
  if (std::strcmp(name, "avx512bf16") == 0) {
    return avx512 && __builtin_cpu_supports("avx512bf16") ? &kernels_avx512bf16 : nullptr;
  }
#endif
#endif
  return nullptr;
}

const Kernels& best_kernels() {
  static const Kernels* const best = [] {
    for (const char* name : {"avx512bf16", "avx512", "avx2"}) {
      if (const Kernels* found = find_kernels(name)) return found;
    }
    return &kBase;
  }();
  return *best;
}

}  // namespace yoke
