// Products with quantized weights: the layout that they are read in, and what the loops of each instruction set take.
//
// Rows of w are padded to whole panels of 32, two tiles of 16 rows; k is a multiple of 32, a step. The data lies
// [panel][step][tile], so a panel is one stream, and inside a tile as matrix units and products of pairs want it:
// [16 pairs of k][16 rows][2 of k]. As bfloat16 that is 1 KiB; as int8 512 bytes in the same order. Of int4 the 256
// bytes are four registers of 16 lanes: lane r of register i has the pairs 4 i .. 4 i + 3 of row r, the first of
// pair 4 i + j in bits 4 j of the lower half and the second in those of the upper. Scales and offsets lie
// [panel][group][tile][16 rows].
// Plain pointers and sizes, nothing of torch.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace yoke::kernels {

enum class Format { bf16, i8, i4 };

constexpr std::int64_t kTileRows = 16, kPanelRows = 2 * kTileRows, kStep = 32, kRowBlock = 4;

// Of a tile and step.
constexpr std::int64_t tile_bytes(Format format) {
  return format == Format::bf16 ? 1024 : format == Format::i8 ? 512 : 256;
}

// What a gated MLP does with the first half of the rows of w, before the second half is multiplied with it.
enum class Activation { silu, gelu_tanh };

// In place of y: act(gate) * up, rounded, as the x of the next product lies (`QuantKernels::pack`). The halves are
// whole panels.
struct Gate {
  Activation activation;
  std::uint8_t* hidden;
};

// y = x W^T + bias, where w = scale * q + offset, and without offsets w = scale * q (int8), scale * (q - 8) (int4),
// or the numbers themselves (bf16, without scales). x [m, k], bias [n] or null, y [m, n].
struct QuantArgs {
  const bf16* x;
  const float* x_float;   // x once more, or null: see QuantKernels; blocks of kRowBlock rows, [step][row][32]
  const float* x_sums;    // sums of x's steps: blocks of so many rows, [step][row]
  const std::uint8_t* data;
  const void* scale;      // all float16 or all float
  const void* offset;     // or null
  const bf16* bias;
  bf16* y;
  Format format;
  bool half;              // scales and offsets are float16
  std::int64_t m, n, k, group;  // numbers of k that share a scale: a multiple of 32
  const float* x_scale = nullptr;        // [m], where x is to be rounded to int8 times this
  const std::uint8_t* packed = nullptr;  // x once more as `pack` has laid it out, or null
  const Gate* gate = nullptr;            // or y is wanted

  constexpr std::int64_t steps() const { return k / kStep; }
  constexpr std::int64_t groups() const { return k / group; }
  constexpr std::int64_t panel_bytes() const { return steps() * 2 * tile_bytes(format); }
  // One scale a row: whole numbers can be multiplied, and the sums scaled once.
  constexpr bool scaled_last() const { return format == Format::i8 && offset == nullptr && group == k; }
};

// Where `x_sums` has that of a row and step.
constexpr std::int64_t sums_at(const QuantArgs& a, std::int64_t row, std::int64_t step) {
  const std::int64_t start = row / kRowBlock * kRowBlock, rows = a.m - start < kRowBlock ? a.m - start : kRowBlock;
  return start * a.steps() + step * rows + row - start;
}

struct QuantKernels {
  // The rows of w of panels [first, last), for any m; with a gate of those of the first half, and of the second.
  void (*linear)(const QuantArgs&, std::int64_t first, std::int64_t last);
  // act(gate) * up of rows [first, last): both [m, 2 width] -> y [m, width].
  void (*gate)(Activation, const bf16* both, std::int64_t width, bf16* y, std::int64_t first, std::int64_t last);
  std::int64_t wide_rows;  // up to so many rows of x it wants them as floats too
  // Weights of panel `panel` and steps [first, last) -> bf16 tiles [step][tile][16 pairs][16 rows][2], on a border of
  // 64 bytes: scale and offset applied in float, rounded once; with `scaled_last`, whole numbers. Or null.
  void (*dequantize)(const QuantArgs&, std::int64_t panel, std::int64_t first, std::int64_t last, bf16* tiles);
  // Whether x is to be laid out for a product. Or null.
  bool (*packs)(const QuantArgs&) = nullptr;
  // Lays 32 rows of x out in `packed`, two bytes a number at most, and those after them: [first, last) in units of 32.
  void (*pack)(const QuantArgs&, std::uint8_t* packed, std::int64_t first, std::int64_t last) = nullptr;
  // Whether `linear` takes these with a gate. Or null.
  bool (*gates)(const QuantArgs&) = nullptr;
};

extern const QuantKernels base_quant;
#if defined(__x86_64__)
// Of int4 weights and a few rows of x, as `QuantKernels` has them.
void pack_bytes(const QuantArgs&, std::uint8_t* packed, std::int64_t first, std::int64_t last);
void linear_bytes(const QuantArgs&, std::int64_t first, std::int64_t last);
extern const QuantKernels avx2_quant;
extern const QuantKernels avx512_quant;
extern const QuantKernels avx512bf16_quant;
extern const QuantKernels amx_quant;
#endif

}  // namespace yoke::kernels
