// Rotary embedding of queries and keys (Su et al., RoFormer, 2021). Each multiplication is rounded before the
// addition, as in torch's operators, so the bits equal torch's on any instruction set.
#pragma once

#include "attend.h"
#include "lanes.h"

namespace yoke::kernels::YOKE_ISA {
namespace {

// Keeps the compiler from fusing a multiplication and an addition into one instruction.
inline Lanes rounded(Lanes x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

template <class T>
inline Lanes some(const T* from, int64_t count) {
  return count >= kLanes ? load(from) : load(from, count);
}

template <class T>
inline void put(Lanes x, T* to, int64_t count) {
  if (count >= kLanes) {
    store(x, to);
  } else {
    store(x, to, count);
  }
}

template <class T>
void rotate_halves(const RotateArgs& a, const T* from, T* to) {
  for (int64_t d = 0; d < a.half; d += kLanes) {
    const int64_t left = a.half - d;
    const Lanes cos = some(a.cos + d, left), sin = some(a.sin + d, left);
    for (int64_t i = d; i < a.heads * a.h; i += a.h) {
      const Lanes x = some(from + i, left), y = some(from + i + a.half, left);
      put(rounded(x * cos) - rounded(y * sin), to + i, left);
      put(rounded(y * cos) + rounded(x * sin), to + i + a.half, left);
    }
  }
}

inline Lanes neighbors(Lanes x) {  // swaps the two numbers of each pair
  typedef uint64_t Pairs __attribute__((vector_size(4 * kLanes)));
  const Pairs pairs = as<Pairs>(x);
  return as<Lanes>((pairs >> 32) | (pairs << 32));
}

template <class T>
void rotate_pairs(const RotateArgs& a, const T* from, T* to) {
  for (int64_t d = 0; d < 2 * a.half; d += kLanes) {
    const int64_t left = 2 * a.half - d;
    Lanes cos = {}, sin = {};
    for (int64_t i = 0; i < kLanes && i < left; ++i) {
      cos[i] = a.cos[(d + i) / 2];
      sin[i] = i % 2 == 0 ? -a.sin[(d + i) / 2] : a.sin[(d + i) / 2];
    }
    for (int64_t i = d; i < a.heads * a.h; i += a.h) {
      const Lanes x = some(from + i, left);
      put(rounded(x * cos) + rounded(neighbors(x) * sin), to + i, left);
    }
  }
}

template <class T>
void rotate_as(const RotateArgs& a) {
  const T* from = static_cast<const T*>(a.from);
  T* to = static_cast<T*>(a.to);
  if (a.interleaved) {
    rotate_pairs(a, from, to);
  } else {
    rotate_halves(a, from, to);
  }
  const int64_t rotated = 2 * a.half;
  if (rotated == a.h) return;
  for (int64_t i = rotated; i < a.heads * a.h; i += a.h) {
    memcpy(to + i, from + i, sizeof(T) * static_cast<size_t>(a.h - rotated));
  }
}

void rotate(const RotateArgs& a) {
  switch (a.type) {
    case Type::bf16: return rotate_as<brain>(a);
    case Type::f16: return rotate_as<half>(a);
    default: return rotate_as<float>(a);
  }
}

}  // namespace
}  // namespace yoke::kernels::YOKE_ISA
