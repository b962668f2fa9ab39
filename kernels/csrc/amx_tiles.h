// AMX: what products in tiles share, those with quantized weights and those with bfloat16: blocks for the caches, and
// where the rows of x lie.
#pragma once

#include "quant_tiles.h"

namespace yoke::kernels::isa_amx {
namespace {

constexpr std::int64_t kSums = kTileRows * kTileRows;    // of a tile
constexpr std::int64_t kLine = 64, kTile = 16 * kLine;   // bytes
constexpr std::int64_t kFewRows = 64;                    // of x, up to which products with bf16 take w by once
constexpr std::int64_t kPiece = 16;                      // steps: a panel of w is 32 KiB of the first cache's 48
constexpr std::int64_t kBlock = 512;                     // rows of x: a piece is 512 KiB of the second's 2 MiB
constexpr std::int64_t kWaiting = 1 << 20;               // sums that wait for the next piece: 4 MiB

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

  // All but the two of weights, 6 and 7, with so many rows.
  [[maybe_unused]] static constexpr TileConfig of(std::uint8_t rows) {
    TileConfig config;
    for (int i = 0; i < 6; ++i) config.rows[i] = rows;
    return config;
  }
};
// In memory for good: compilers do not see that the instruction reads all of it.
const TileConfig kConfig;

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

inline std::int64_t parts(std::int64_t a, std::int64_t size) { return (a + size - 1) / size; }

inline __mmask32 first_of(std::int64_t count) {
  return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << (count < 0 ? 0 : count)) - 1;
}

template <class T>
inline std::int64_t steps_of(const QuantArgs& a) {
  return parts(a.k, T::kNumbers);
}

// Where the tiles of a panel of m rows of x lie from `step` of `steps` on, the first of a piece: as
// [piece][panel][step][2], so that what is used together lies together.
inline std::int64_t place(std::int64_t m, std::int64_t steps, std::int64_t panel, std::int64_t step) {
  return (step * parts(m, kPanelRows) + panel * least(kPiece, steps - step)) * 2 * kTile;
}

template <class T>
inline std::int64_t place(const QuantArgs& a, std::int64_t panel, std::int64_t step) {
  return place(a.m, steps_of<T>(a), panel, step);
}

// The first tiles are sums: [B of x][2 of w].
template <int B>
inline void clear() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (B > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

template <int B>
inline void keep(float* sums) {
  _tile_stored(0, sums, kLine);
  _tile_stored(1, sums + kSums, kLine);
  if constexpr (B > 1) {
    _tile_stored(2, sums + 2 * kSums, kLine);
    _tile_stored(3, sums + 3 * kSums, kLine);
  }
}

}  // namespace

// What a thread needs while it multiplies, kept, so that it is in the caches already.
struct Scratch {
  alignas(4096) float sums[kWaiting + 4 * kSums];  // or int32
  alignas(4096) std::uint8_t w[kPiece * 2 * kTile];  // a piece of a panel, where tiles are made
};

// This thread's.
Scratch& scratch();

// Of weights of bf16: see packed_amx.cpp. Tiles are configured.
void linear_packed(const QuantArgs& a, std::int64_t first, std::int64_t last);

}  // namespace yoke::kernels::isa_amx
