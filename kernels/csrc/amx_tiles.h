// AMX: shared by the tile matmuls with quantized and with bfloat16 weights: the sizes of cache blocks, and the packed
// layout of x.
#pragma once

#include "quant_tiles.h"

namespace yoke::kernels::isa_amx {
namespace {

constexpr std::int64_t kSums = kTileRows * kTileRows;    // in a tile
constexpr std::int64_t kLine = 64, kTile = 16 * kLine;   // bytes
constexpr std::int64_t kFewRows = 64;                    // up to so many rows of x, bf16 matmuls read w only once
constexpr std::int64_t kPiece = 16;                      // steps: a panel of w is 32 KiB of the 48 KiB L1 cache
constexpr std::int64_t kBlock = 512;                     // rows of x: a piece is 512 KiB of the 2 MiB L2 cache
constexpr std::int64_t kWaiting = 1 << 20;               // sums kept for the next piece of k: 4 MiB

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

  // All tiles but 6 and 7, the weights', have `rows` rows; tiles 6 and 7 have 16.
  [[maybe_unused]] static constexpr TileConfig of(std::uint8_t rows) {
    TileConfig config;
    for (int i = 0; i < 6; ++i) config.rows[i] = rows;
    return config;
  }
};
// A global constant, because compilers do not see that the instruction reads all of it.
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

// The offset of a panel of x's tiles (x has m rows) from `step` on, which is the first step of a piece. The layout is
// [piece][panel][step][2], so that data that is used together is stored together.
inline std::int64_t place(std::int64_t m, std::int64_t steps, std::int64_t panel, std::int64_t step) {
  return (step * parts(m, kPanelRows) + panel * least(kPiece, steps - step)) * 2 * kTile;
}

template <class T>
inline std::int64_t place(const QuantArgs& a, std::int64_t panel, std::int64_t step) {
  return place(a.m, steps_of<T>(a), panel, step);
}

// Tiles 0 to 3 are sums: [B of x][2 of w].
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

// A thread's buffers for a matmul. They are kept between calls, so that they are in the caches already.
struct Scratch {
  alignas(4096) float sums[kWaiting + 4 * kSums];  // or int32
  alignas(4096) std::uint8_t w[kPiece * 2 * kTile];  // a piece of a panel of w, dequantized into tiles
};

// The calling thread's buffers.
Scratch& scratch();

// The linear with bf16 weights: see packed_amx.cpp. The caller has configured the tiles.
void linear_packed(const QuantArgs& a, std::int64_t first, std::int64_t last);

}  // namespace yoke::kernels::isa_amx
