// Linears with packed weights: the packed layout, and the arguments of each instruction set's loops.
//
// Rows of w are padded to whole panels of 32 rows, which are two tiles of 16; k is a multiple of a step of 32. The
// layout is [panel][step][tile], so a panel is one stream. A tile has the order that matrix units and pairwise dot
// products need: [16 pairs of k][16 rows][2 of k]. That is 1 KiB in bfloat16, and 512 bytes in int8 in the same order.
// In int4 a tile is 256 bytes, four registers of 16 lanes: lane r of register i has pairs 4 i .. 4 i + 3 of row r,
// the first number of pair 4 i + j from bit 4 j of its lower half on, the second at the same place in its upper half.
// The layout of scales and offsets is [panel][group][tile][16 rows].
// Plain pointers and sizes, no torch.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace yoke::kernels {

enum class Format { bf16, i8, i4 };

constexpr std::int64_t kTileRows = 16, kPanelRows = 2 * kTileRows, kStep = 32, kRowBlock = 4;

// The bytes of a tile of one step.
constexpr std::int64_t tile_bytes(Format format) {
  return format == Format::bf16 ? 1024 : format == Format::i8 ? 512 : 256;
}

// What a gated MLP applies to the output of the first half of w's rows (gate), before multiplying by the second (up).
enum class Activation { silu, gelu_tanh };

// The output instead of y: act(gate) * up, rounded, in the packed layout that the next matmul reads as x
// (`QuantKernels::pack`). Each half of w's rows must be whole panels.
struct Gate {
  Activation activation;
  std::uint8_t* hidden;
};

// y = x W^T + bias, where w = scale * q + offset. Without offsets w = scale * q (int8), scale * (q - 8) (int4), or the
// numbers themselves (bf16, without scales). x [m, k], bias [n] or null, y [m, n].
struct QuantArgs {
  const bf16* x;
  const float* x_float;   // x as floats, or null (see wide_rows): blocks of kRowBlock rows, [step][row][32]
  const float* x_sums;    // the sum of each step of x: blocks of kRowBlock rows, [step][row]
  const std::uint8_t* data;
  const void* scale;      // all float16 or all float
  const void* offset;     // or null
  const bf16* bias;
  bf16* y;
  Format format;
  bool half;              // scales and offsets are float16
  std::int64_t m, n, k, group;  // numbers of k that share a scale: a multiple of 32
  const float* x_scale = nullptr;        // [m]: round x to int8 times this; null: do not
  const std::uint8_t* packed = nullptr;  // x as `pack` has packed it, or null
  const Gate* gate = nullptr;            // null: write y

  constexpr std::int64_t steps() const { return k / kStep; }
  constexpr std::int64_t groups() const { return k / group; }
  constexpr std::int64_t panel_bytes() const { return steps() * 2 * tile_bytes(format); }
  // One scale per row of w: the integers can be multiplied, and the sums scaled once.
  constexpr bool scaled_last() const { return format == Format::i8 && offset == nullptr && group == k; }
};

// The index in `x_sums` of a row and step.
constexpr std::int64_t sums_at(const QuantArgs& a, std::int64_t row, std::int64_t step) {
  const std::int64_t start = row / kRowBlock * kRowBlock, rows = a.m - start < kRowBlock ? a.m - start : kRowBlock;
  return start * a.steps() + step * rows + row - start;
}

struct QuantKernels {
  // Panels [first, last) of w, for any m. With a gate: these panels of the first half and of the second.
  void (*linear)(const QuantArgs&, std::int64_t first, std::int64_t last);
  // act(gate) * up of rows [first, last): both [m, 2 width] -> y [m, width].
  void (*gate)(Activation, const bf16* both, std::int64_t width, bf16* y, std::int64_t first, std::int64_t last);
  std::int64_t wide_rows;  // up to so many rows of x, `linear` needs x_float
  // Dequantizes panel `panel`, steps [first, last), into bf16 tiles [step][tile][16 pairs][16 rows][2], aligned to 64
  // bytes: scale and offset applied in float, rounded once; with `scaled_last`, the integers. Or null.
  void (*dequantize)(const QuantArgs&, std::int64_t panel, std::int64_t first, std::int64_t last, bf16* tiles);
  // Whether x must be packed for `linear`. Or null.
  bool (*packs)(const QuantArgs&) = nullptr;
  // Packs x into `packed`, at most two bytes per number: rows [first, last) in units of 32 rows.
  void (*pack)(const QuantArgs&, std::uint8_t* packed, std::int64_t first, std::int64_t last) = nullptr;
  // Whether `linear` takes these arguments with a gate. Or null.
  bool (*gates)(const QuantArgs&) = nullptr;
};

extern const QuantKernels base_quant;
#if defined(__x86_64__)
// `pack` and `linear` of `QuantKernels`, for int4 weights and a few rows of x.
void pack_bytes(const QuantArgs&, std::uint8_t* packed, std::int64_t first, std::int64_t last);
void linear_bytes(const QuantArgs&, std::int64_t first, std::int64_t last);
extern const QuantKernels avx2_quant;
extern const QuantKernels avx512_quant;
extern const QuantKernels avx512bf16_quant;
extern const QuantKernels amx_quant;
#endif

}  // namespace yoke::kernels
