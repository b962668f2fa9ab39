// AVX-512: shared by linears with packed weights: factors of 16 rows, and codes as bf16 tiles [16 pairs][16 rows][2].
// Compiled per instruction set (YOKE_ISA).
//
// Codes of up to 6 bits become numbers by looking them up: one permutation of 16-bit words looks 32 up in a table of 32
// (of 64 with two registers). It uses only the low bits of an index, so the bits above need not be cleared: tables of
// shorter codes are repeated. An index is a shift of each plane, and one operation that joins them.
#pragma once

#include <immintrin.h>

// GCC 12 warns of its intrinsics' own undefined registers, which no instruction reads.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

#include "lanes.h"
#include "quant.h"

namespace yoke::kernels::YOKE_ISA {
namespace {

// Looks a thread_local up once. Otherwise compilers repeat that in loops, and the call spills all vector registers.
template <class T>
inline T& this_threads(T& own) {
  T* found = &own;
  __asm__("" : "+r"(found));
  return *found;
}

inline __m512i line(const void* from) { return _mm512_loadu_si512(from); }

// The values of all codes as bf16, repeated to 64: exact, because they are integers of 8 bits, or halves of some.
struct ValueTables {
  std::uint16_t words[kCodes][64];
};
constexpr ValueTables make_value_tables() {
  ValueTables tables{};
  for (int codes = static_cast<int>(Codes::i4); codes < kCodes; ++codes) {
    const Codes own = static_cast<Codes>(codes);
    for (int i = 0; i < 64; ++i) {
      const float value = value_unit(own) * integer_value(own, i & ((1 << bits_of(own)) - 1));
      tables.words[codes][i] = static_cast<std::uint16_t>(__builtin_bit_cast(std::uint32_t, value) >> 16);
    }
  }
  return tables;
}
alignas(64) [[maybe_unused]] constexpr ValueTables kValueTables = make_value_tables();

// A byte shift of registers by a number that may be negative: to the right, or to the left.
template <int N>
inline __m512i shifted(__m512i x) {
  if constexpr (N > 0) return _mm512_srli_epi32(x, N);
  if constexpr (N < 0) return _mm512_slli_epi32(x, -N);
  return x;
}

// The bits of x that are set in `mask`, the others of y.
inline __m512i joined(__m512i x, __m512i y, __m512i mask) { return _mm512_ternarylogic_epi32(x, y, mask, 0xe4); }

// The planes of a tile of codes of B bits, in registers.
template <int B>
struct Planes {
  static constexpr int kLow = B < 4 ? 2 : 4, kHigh = B - kLow;
  __m512i low[kLow], high[kHigh == 0 ? 1 : kHigh];

  explicit Planes(const std::uint8_t* tile) {
    for (int i = 0; i < kLow; ++i) low[i] = line(tile + 64 * i);
    for (int i = 0; i < kHigh; ++i) high[i] = line(tile + 64 * (kLow + i));
  }

  // The register of a plane of P bits that has four pairs I, shifted so that nibble N is at bit `To` of its 16 bits.
  template <int P, int I, int N, int To>
  static __m512i at(const __m512i* plane) {
    constexpr int fours = 4 / P;
    return shifted<8 * (N / 2) + P * (2 * (I % fours) + N % 2) - To>(plane[I / fours]);
  }

  // The codes of pair 4 I + J of each row, in the lowest bits of 16-bit words; the bits above are garbage.
  template <int I, int J>
  __m512i words() const {
    const __m512i lower = at<kLow, I, J, 0>(low);
    if constexpr (kHigh == 0) {
      return lower;
    } else {
      return joined(lower, at<kHigh, I, J, kLow>(high), _mm512_set1_epi16((1 << kLow) - 1));
    }
  }

  // The codes of nibbles 2 B + J of four pairs I, B = 0 .. 3, in byte B of each row: clean.
  template <int I, int J>
  __m512i bytes() const {
    const __m512i lower = at<kLow, I, J, 0>(low), mask = _mm512_set1_epi8((1 << kLow) - 1);
    if constexpr (kHigh == 0) {
      return _mm512_and_si512(lower, mask);
    } else {
      const __m512i upper = at<kHigh, I, J, kLow>(high);
      return _mm512_and_si512(joined(lower, upper, mask), _mm512_set1_epi8((1 << B) - 1));
    }
  }
};

// 32 floats of 8 bits (E4M3) as bf16: exponent and mantissa move, 120 is added to the exponent; subnormal ones are
// looked up. What is not a number becomes 480.
inline __m512i bf16_of_e4m3(__m256i bytes) {
  // 0, 1/512 .. 7/512 as bf16, at the indexes that have only mantissa bits
  const __m512i table = _mm512_set_epi16(
      0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0, 0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0,
      0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0, 0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0);
  const __m512i words = _mm512_cvtepu8_epi16(bytes);
  const __m512i size = _mm512_slli_epi16(_mm512_and_si512(words, _mm512_set1_epi16(0x7f)), 4);
  const __mmask32 small = _mm512_cmplt_epu16_mask(size, _mm512_set1_epi16(0x80));
  const __m512i value = _mm512_mask_permutexvar_epi16(_mm512_add_epi16(size, _mm512_set1_epi16(0x3c00)), small, words, table);
  return joined(value, _mm512_slli_epi16(words, 8), _mm512_set1_epi16(0x7fff));
}

// 16 int8 as floats.
inline __m512 floats(const std::uint8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

// 16 factors from number `at` of a section on. `upper`: the upper halves of bytes that have two.
inline __m512 factors(Kind kind, const std::uint8_t* section, std::int64_t at, bool upper) {
  if (kind == Kind::f16) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(section + 2 * at)));
  }
  if (kind == Kind::f32) return _mm512_loadu_ps(section + 4 * at);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(section + at));
  if (kind == Kind::i8) return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  const __m512i numbers = _mm512_cvtepu8_epi32(bytes);
  switch (kind) {
    case Kind::u8: return _mm512_cvtepi32_ps(numbers);
    case Kind::u4: return _mm512_cvtepi32_ps(upper ? _mm512_srli_epi32(numbers, 4) : _mm512_and_si512(numbers, _mm512_set1_epi32(15)));
    case Kind::e8m0: {
      const __mmask16 tiny = _mm512_testn_epi32_mask(numbers, numbers);  // 2^-127 is not a normal number
      return _mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_slli_epi32(numbers, 23), tiny, _mm512_set1_epi32(0x00400000)));
    }
    case Kind::e4m3: {
      const __m512 size = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_and_si512(numbers, _mm512_set1_epi32(0x7f)), 20));
      const __m512 value = _mm512_mul_ps(size, _mm512_set1_ps(0x1p120f));
      const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(numbers, _mm512_set1_epi32(0x80)), 24);
      return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), sign));
    }
    default: return _mm512_set1_ps(1.0f);
  }
}

// The kinds of a weight's factors, for loops: known when they are compiled, or read from the arguments.
struct AnyKinds {
  static Kind group(const QuantArgs& a) { return a.group_kind; }
  static Kind super(const QuantArgs& a) { return a.super_kind; }
};
template <Kind G, Kind S>
struct Kinds {
  static constexpr Kind group(const QuantArgs&) { return G; }
  static constexpr Kind super(const QuantArgs&) { return S; }
};

// The factors of a panel, step by step.
template <class K = AnyKinds>
class Scaler {
 public:
  Scaler(const QuantArgs& a, const std::uint8_t* panel, std::int64_t step) : a_(&a), panel_(panel), step_(step) {
    super_ = a.super_of(step);
    left_ = a.super_size == 0 ? INT64_MAX : ((super_ + 1) * a.super_size - a.super_skip - step * kStep + kStep - 1) / kStep;
  }

  // The scale of each row of a tile, for group `group` of the step.
  __m512 scale(std::int64_t tile, std::int64_t group = 0) const {
    return product(a_->scales_at, a_->super_scales_at, tile, group, false);
  }
  __m512 offset(std::int64_t tile, std::int64_t group = 0) const {
    return product(a_->offsets_at, a_->super_offsets_at, tile, group, true);
  }

  // To the next step.
  void next() {
    ++step_;
    if (--left_ == 0) {
      left_ = a_->super_size / kStep;
      ++super_;
    }
  }
  // Whether the next step has the same factors as this one: both are in one large group.
  bool continues() const { return K::group(*a_) == Kind::none && left_ > 1; }

  // Prefetches the factors of groups `steps` steps ahead.
  void prefetch(std::int64_t steps) const {
    if (K::group(*a_) == Kind::none) return;
    const std::int64_t item = kind_bytes(K::group(*a_));
    const std::uint8_t* from = panel_ + a_->scales_at + ((step_ + steps) * 2 * a_->groups_of_step() * kTileRows) * item;
    _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T0);
    if (a_->offsets) _mm_prefetch(reinterpret_cast<const char*>(from + a_->offsets_at - a_->scales_at), _MM_HINT_T0);
  }

 private:
  __m512 product(std::int64_t section, std::int64_t super_section, std::int64_t tile, std::int64_t group, bool upper) const {
    const std::int64_t at = ((step_ * 2 + tile) * a_->groups_of_step() + group) * kTileRows;
    const __m512 own = factors(K::group(*a_), panel_ + section, at, upper);
    if (K::super(*a_) == Kind::none) return own;
    const __m512 above = factors(K::super(*a_), panel_ + super_section, (super_ * 2 + tile) * kTileRows, false);
    return K::group(*a_) == Kind::none ? above : _mm512_mul_ps(own, above);
  }

  const QuantArgs* a_;
  const std::uint8_t* panel_;
  std::int64_t step_, super_, left_;
};

// Adds the bias to the sums of 16 rows of w from n on, rounds them, and writes them to row m of y.
inline void finish(const QuantArgs& a, std::int64_t m, std::int64_t n, __m512 sums) {
  if (n >= a.n) return;
  const std::int64_t count = a.n - n < kTileRows ? a.n - n : kTileRows;
  alignas(64) bf16 bias[kTileRows] = {}, y[kTileRows];
  if (a.bias != nullptr) {
    memcpy(bias, a.bias + n, sizeof(bf16) * static_cast<std::size_t>(count));
    sums = _mm512_add_ps(sums, (__m512)load(reinterpret_cast<const brain*>(bias)));
  }
  store((Lanes)sums, reinterpret_cast<brain*>(y));
  memcpy(a.y + m * a.stride + n, y, sizeof(bf16) * static_cast<std::size_t>(count));
}

// Codes with the same planes differ only by their table: one of them stands for all.
#define YOKE_BY_CODES(codes, call)              \
  switch (codes) {                              \
    case Codes::bf16: break;                    \
    case Codes::i8: call(Codes::i8); break;     \
    case Codes::e4m3: call(Codes::e4m3); break; \
    case Codes::i4:                             \
    case Codes::u4:                             \
    case Codes::iq4:                            \
    case Codes::e2m1: call(Codes::u4); break;   \
    case Codes::u2: call(Codes::u2); break;     \
    case Codes::i3: call(Codes::i3); break;     \
    case Codes::i5:                             \
    case Codes::u5: call(Codes::u5); break;     \
    case Codes::i6: call(Codes::i6); break;     \
  }

#if defined(__AVX512BF16__)

// Two registers of floats, rounded to bf16, in memory order.
inline __m512i rounded(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

// Calls put(pair, words) for each pair of a tile: its 32 values as bf16.
template <int B, class Put>
inline void expand_codes(const std::uint8_t* tile, const std::uint16_t* table, const Put& put) {
  const Planes<B> planes(tile);
  const __m512i first = line(table), second = line(table + 32);
  const auto pair = [&]<int I, int J>() {
    const __m512i index = planes.template words<I, J>();
    put(4 * I + J, B == 6 ? _mm512_permutex2var_epi16(first, index, second) : _mm512_permutexvar_epi16(index, first));
  };
  const auto four = [&]<int I>() {
    pair.template operator()<I, 0>();
    pair.template operator()<I, 1>();
    pair.template operator()<I, 2>();
    pair.template operator()<I, 3>();
  };
  four.template operator()<0>();
  four.template operator()<1>();
  four.template operator()<2>();
  four.template operator()<3>();
}

// The same for all codes that are not bf16 already.
template <Codes C, class Put>
inline void expand(const std::uint8_t* tile, const std::uint16_t* table, const Put& put) {
  if constexpr (C == Codes::i8) {
#pragma GCC unroll 4
    for (int pair = 0; pair < 16; ++pair) put(pair, rounded(floats(tile + 32 * pair), floats(tile + 32 * pair + 16)));
  } else if constexpr (C == Codes::e4m3) {
#pragma GCC unroll 4
    for (int pair = 0; pair < 16; ++pair) {
      put(pair, bf16_of_e4m3(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + 32 * pair))));
    }
  } else {
    expand_codes<bits_of(C)>(tile, table, put);
  }
}

inline const std::uint16_t* table_of(Codes codes) { return kValueTables.words[static_cast<int>(codes)]; }

// The values of a tile, as bf16.
template <Codes C>
inline void expand_tile(const std::uint8_t* tile, const std::uint16_t* table, bf16* to) {
  expand<C>(tile, table, [&](int pair, __m512i words) { _mm512_store_si512(to + 32 * pair, words); });
}

// Scaled int8; lanes are 8 rows by the two numbers of a pair.
inline void dequantize_i8(const std::uint8_t* from, __m512 scale, __m512 offset, bf16* to) {
  const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 scale0 = _mm512_permutexvar_ps(low, scale), scale1 = _mm512_permutexvar_ps(high, scale);
  const __m512 offset0 = _mm512_permutexvar_ps(low, offset), offset1 = _mm512_permutexvar_ps(high, offset);
  for (int pair = 0; pair < 16; ++pair, from += 32, to += 32) {
    const __m512 first = _mm512_fmadd_ps(floats(from), scale0, offset0);
    _mm512_store_si512(to, rounded(first, _mm512_fmadd_ps(floats(from + 16), scale1, offset1)));
  }
}

// The tile of a step with scale and offset applied.
template <Codes C>
inline void dequantize_tile(const QuantArgs& a, const std::uint8_t* tile, const Scaler<>& scaler, std::int64_t t, bf16* to) {
  const __m512 zero = _mm512_setzero_ps();
  const __m512 scale = scaler.scale(t), offset = a.offsets ? scaler.offset(t) : zero;
  if constexpr (C == Codes::i8) {
    if (a.groups_of_step() == 1) return dequantize_i8(tile, scale, offset, to);
  }
  const bool two = a.groups_of_step() == 2;
  const __m512 scale1 = two ? scaler.scale(t, 1) : scale, offset1 = two && a.offsets ? scaler.offset(t, 1) : offset;
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                       5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  expand<C>(tile, table_of(a.codes), [&](int pair, __m512i words) {
    const __m512 s = pair < 8 ? scale : scale1, o = pair < 8 ? offset : offset1;
    const __m512 even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), s, o);
    const __m512 odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(words, upper)), s, o);
    _mm512_store_si512(to + 32 * pair, _mm512_permutexvar_epi16(zip, rounded(even, odd)));
  });
}

template <Codes C>
void dequantize_steps(const QuantArgs& a, std::int64_t panel, std::int64_t first, std::int64_t last, bf16* tiles) {
  constexpr std::int64_t kBytes = tile_bytes(C);
  const std::uint8_t* const start = a.panel(panel);
  const std::uint8_t* from = start + first * 2 * kBytes;
  const bool unscaled = a.scaled_last();
  Scaler<> scaler(a, start, first);
  for (std::int64_t step = first; step < last; ++step, scaler.next()) {
    for (std::int64_t t = 0; t < 2; ++t, from += kBytes, tiles += kTileRows * kStep) {
#pragma GCC unroll 8
      for (std::int64_t i = 0; i < kBytes; i += 64) {  // the next steps, which no other loop prefetches
        _mm_prefetch(reinterpret_cast<const char*>(from + 4 * 2 * kBytes + i), _MM_HINT_T0);
      }
      if (unscaled) {
        expand_tile<C>(from, table_of(a.codes), tiles);
      } else {
        dequantize_tile<C>(a, from, scaler, t, tiles);
      }
    }
  }
}

// See QuantKernels.
[[maybe_unused]] void dequantize(const QuantArgs& a, std::int64_t panel, std::int64_t first, std::int64_t last,
                                 bf16* tiles) {
#define YOKE_CALL(C) dequantize_steps<C>(a, panel, first, last, tiles)
  YOKE_BY_CODES(a.codes, YOKE_CALL)
#undef YOKE_CALL
}

#endif

}  // namespace
}  // namespace yoke::kernels::YOKE_ISA
