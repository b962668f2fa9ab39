// Linears with packed weights: the packed layout, and the arguments of each instruction set's loops.
//
// Rows of w are padded to whole panels of 32 rows, which are two tiles of 16; k is padded to whole steps of 32. A panel
// has five sections, each of whole cache lines: the codes [step][tile], the scales and the offsets of groups
// [step][tile][groups of a step][16 rows], and the scales and the offsets of super-groups [super-group][tile][16 rows].
//
// A tile of codes has the order that matrix units and pairwise dot products need: [16 pairs of k][16 rows][2 of k],
// which is 1 KiB in bfloat16, and 512 bytes in codes of 8 bits. Shorter codes are split into planes: the lower four bits
// (or two), then the upper two or one. A plane of b bits is b registers of 16 lanes, a lane for each row. The plane of 4
// bits has pairs 4 i .. 4 i + 3 in register i: the first number of pair 4 i + j from bit 4 j of the lane on, the second
// at the same place in its upper half. Call these places nibbles n = 0 .. 7. A register of a plane of 2 bits has eight
// pairs: nibble n of the four pairs 4 i .. from bit 8 (n / 2) + 4 (i % 2) + 2 (n % 2) on. The plane of 1 bit has all 16
// pairs: nibble n of four i at bit 8 (n / 2) + 2 i + n % 2. So one shift of a register moves a plane's bits of 32 numbers
// (of 16-bit halves) or 64 numbers (of bytes) to the place where they belong.
// Plain pointers and sizes, no torch.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace yoke::kernels {

// In the order of kernels.quant_linear.CODE_NAMES and KINDS. bf16, i8 and e4m3 (a float of 8 bits) are the numbers
// themselves; the other codes stand for the values of `code_values`.
enum class Codes : std::int64_t { bf16, i8, e4m3, i4, u4, iq4, e2m1, u2, i3, i5, u5, i6 };
constexpr std::int64_t kCodes = 12;
enum class Kind : std::int64_t { none, f16, f32, i8, u8, e8m0, e4m3, u4 };
constexpr std::int64_t kKinds = 8;

constexpr std::int64_t kTileRows = 16, kPanelRows = 2 * kTileRows, kStep = 32, kRowBlock = 4, kLineBytes = 64;

constexpr int bits_of(Codes codes) {
  constexpr int bits[kCodes] = {16, 8, 8, 4, 4, 4, 4, 2, 3, 5, 5, 6};
  return bits[static_cast<int>(codes)];
}

// The bytes of a tile of one step.
constexpr std::int64_t tile_bytes(int bits) { return bits * kTileRows * kStep / 8; }
constexpr std::int64_t tile_bytes(Codes codes) { return tile_bytes(bits_of(codes)); }

// The values of codes of up to 6 bits are integers of at most 8 bits times `value_unit`.
constexpr std::int8_t integer_value(Codes codes, int code) {
  constexpr std::int8_t iq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  constexpr std::int8_t e2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  switch (codes) {
    case Codes::iq4: return iq4[code & 15];
    case Codes::e2m1: return e2m1[code & 15];
    case Codes::i4: return static_cast<std::int8_t>(code - 8);
    case Codes::i3: return static_cast<std::int8_t>(code - 4);
    case Codes::i5: return static_cast<std::int8_t>(code - 16);
    case Codes::i6: return static_cast<std::int8_t>(code - 32);
    default: return static_cast<std::int8_t>(code);
  }
}
constexpr float value_unit(Codes codes) { return codes == Codes::e2m1 ? 0.5f : 1.0f; }

constexpr std::int64_t kind_bytes(Kind kind) {
  return kind == Kind::none ? 0 : kind == Kind::f16 ? 2 : kind == Kind::f32 ? 4 : 1;
}

// What a gated MLP applies to the output of the first half of w's rows (gate), before multiplying by the second (up).
enum class Activation { silu, gelu_tanh };

// The output instead of y: act(gate) * up, rounded, in the packed layout that the next matmul reads as x
// (`QuantKernels::pack`). Each half of w's rows must be whole panels.
struct Gate {
  Activation activation;
  std::uint8_t* hidden;
};

// y = x W^T + bias for a part of w, where w = scale * value(code) + offset; scale and offset are products of the factor
// of a group and that of a super-group, as far as they exist. x [m, k], bias [n] or null, y [m, n] with `stride` numbers
// from one row to the next.
struct QuantArgs {
  const bf16* x;
  const float* x_float;   // x as floats, or null: blocks of rows (see rows_of_block), [step][row][32]
  const float* x_sums;    // the sums of both halves of each step of x: blocks of rows, [step][row][2]
  const std::uint8_t* data;
  const bf16* bias;
  bf16* y;
  Codes codes;
  Kind group_kind, super_kind;
  std::int64_t group;                   // numbers of k in a group: 16, 32, or 0 if groups have no factors
  std::int64_t super_size, super_skip;  // of super-groups, or 0; the first begins `super_skip` numbers before w does
  bool offsets;
  std::int64_t m, n, k;                 // k is padded to whole steps
  std::int64_t stride;
  std::int64_t scales_at, offsets_at, super_scales_at, super_offsets_at, panel_bytes;  // sections within a panel
  const float* x_scale = nullptr;        // [m]: round x to int8 times this; null: do not
  const std::uint8_t* packed = nullptr;  // x as `pack` has packed it, or null
  const Gate* gate = nullptr;            // null: write y

  constexpr std::int64_t steps() const { return k / kStep; }
  const std::uint8_t* panel(std::int64_t i) const { return data + i * panel_bytes; }
  // The number of groups with a factor of their own in a step, or 1.
  constexpr std::int64_t groups_of_step() const { return group == kStep / 2 ? 2 : 1; }
  constexpr std::int64_t super_of(std::int64_t step) const {
    return super_size == 0 ? 0 : (super_skip + step * kStep) / super_size;
  }
  // One scale per row of w: the values can be multiplied, and the sums scaled once. (bf16 has no scale.)
  constexpr bool scaled_last() const {
    return codes != Codes::bf16 && group == 0 && !offsets && super_skip + k <= super_size;
  }
};

// Rows of x are multiplied kRowBlock at a time. Of the last ones, three are a block of four, so that there is no loop
// for three. The fourth has memory, but no numbers.
constexpr std::int64_t rows_of_block(std::int64_t left) { return left == 3 || left > kRowBlock ? kRowBlock : left; }
constexpr std::int64_t padded_rows(std::int64_t m) { return m % kRowBlock == 3 ? m + 1 : m; }

// The index of a row's step, in units of steps, in `x_float`, in `x_sums` and where `pack` packs few rows.
constexpr std::int64_t step_at(const QuantArgs& a, std::int64_t row, std::int64_t step) {
  const std::int64_t start = row / kRowBlock * kRowBlock;
  return start * a.steps() + step * rows_of_block(a.m - start) + row - start;
}
// Calls call.operator()<rows>(first row) for each block of rows of x.
template <class Call>
inline void each_block(std::int64_t m, const Call& call) {
  for (std::int64_t row = 0; row < m; row += kRowBlock) {
    switch (rows_of_block(m - row)) {
      case 1: call.template operator()<1>(row); break;
      case 2: call.template operator()<2>(row); break;
      default: call.template operator()<kRowBlock>(row); break;
    }
  }
}

struct QuantKernels {
  // Panels [first, last) of w, for any m. With a gate: these panels of the first half and of the second.
  void (*linear)(const QuantArgs&, std::int64_t first, std::int64_t last);
  // act(gate) * up of rows [first, last): both [m, 2 width] -> y [m, width].
  void (*gate)(Activation, const bf16* both, std::int64_t width, bf16* y, std::int64_t first, std::int64_t last);
  // Dequantizes panel `panel`, steps [first, last), into bf16 tiles [step][tile][16 pairs][16 rows][2], aligned to 64
  // bytes: scale and offset applied in float, rounded once; with `scaled_last`, the values. Or null.
  void (*dequantize)(const QuantArgs&, std::int64_t panel, std::int64_t first, std::int64_t last, bf16* tiles);
  // How x must be packed for `linear`: `kRowMajor`: not at all; `kWide`: `x_float` and `x_sums` are needed; `kSums`: only
  // `x_sums`; other numbers: by `pack`, which packs parts with the same number alike.
  int (*layout)(const QuantArgs&);
  // Packs x into `packed`, at most `packed_bytes`: rows [first, last) in units of 32 rows.
  void (*pack)(const QuantArgs&, std::uint8_t* packed, std::int64_t first, std::int64_t last) = nullptr;
  // Whether `linear` takes these arguments with a gate. Or null.
  bool (*gates)(const QuantArgs&) = nullptr;
};
enum Layout : int { kRowMajor, kWide, kSums, kPacked };  // kPacked, kPacked + 1, .. are packed by `pack`

extern const QuantKernels base_quant;
#if defined(__x86_64__)
// `pack` and `linear` of `QuantKernels`, for codes of at most 6 bits and a few rows of x; and whether they take a weight.
bool takes_bytes(const QuantArgs&);
void pack_bytes(const QuantArgs&, std::uint8_t* packed, std::int64_t first, std::int64_t last);
void linear_bytes(const QuantArgs&, std::int64_t first, std::int64_t last);
extern const QuantKernels avx2_quant;
extern const QuantKernels avx512_quant;
extern const QuantKernels avx512bf16_quant;
extern const QuantKernels amx_quant;
#endif

}  // namespace yoke::kernels
