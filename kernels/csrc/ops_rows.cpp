// torch.ops.yoke_kernels.pack_codes, packed_rows: codes into the layout of quant.h, and rows of packed weights, as an
// embedding looks them up.
//
// Plain loops, which all instruction sets share: packing is done once, and few rows are looked up.

#include <algorithm>
#include <cstring>
#include <vector>

#define YOKE_ISA isa_rows
#include "lanes.h"
#include "ops_quant.h"

namespace yoke::kernels {
namespace {

using isa_rows::as;
using isa_rows::brain;
using isa_rows::half;

constexpr std::int64_t kFours = 4, kNibbles = 8;  // of a row in a step: see quant.h

// Nibble n of four pairs i in a plane of `bits`: the register, and the lowest bit in its lane.
constexpr std::int64_t word_of(int bits, std::int64_t i) { return i / (4 / bits); }
constexpr int shift_of(int bits, std::int64_t i, std::int64_t n) {
  return static_cast<int>(8 * (n / 2) + bits * (2 * (i % (4 / bits)) + n % 2));
}
// The column of nibble n of four pairs i.
constexpr std::int64_t column_of(std::int64_t i, std::int64_t n) { return 8 * i + 2 * (n % 4) + n / 4; }

// Packs bits [From, From + Own) of the 32 codes of a row into its lanes of a plane; `to`: the row's lane of the first
// register. The loops are unrolled: all shifts are known.
template <int Own, int From>
inline void pack_plane(const std::uint8_t* codes, std::uint8_t* to) {
  std::uint32_t words[4] = {};
#pragma GCC unroll 4
  for (std::int64_t i = 0; i < kFours; ++i) {
#pragma GCC unroll 8
    for (std::int64_t n = 0; n < kNibbles; ++n) {
      const std::uint32_t code = codes[column_of(i, n)] >> From & ((1u << Own) - 1);
      words[word_of(Own, i)] |= code << shift_of(Own, i, n);
    }
  }
  for (int word = 0; word < Own; ++word) std::memcpy(to + word * 4 * kTileRows, &words[word], 4);
}

// The inverse of `pack_plane`: adds the bits to the codes.
template <int Own, int From>
inline void unpack_plane(const std::uint8_t* from, std::uint8_t* codes) {
  std::uint32_t words[4];
  for (int word = 0; word < Own; ++word) std::memcpy(&words[word], from + word * 4 * kTileRows, 4);
#pragma GCC unroll 4
  for (std::int64_t i = 0; i < kFours; ++i) {
#pragma GCC unroll 8
    for (std::int64_t n = 0; n < kNibbles; ++n) {
      const std::uint32_t code = words[word_of(Own, i)] >> shift_of(Own, i, n) & ((1u << Own) - 1);
      codes[column_of(i, n)] = static_cast<std::uint8_t>((From == 0 ? 0 : codes[column_of(i, n)]) | code << From);
    }
  }
}

// Packs the 32 codes of a row into its lanes of a tile.
void pack_step(const std::uint8_t* codes, int bits, std::uint8_t* to) {
  constexpr std::int64_t kPlane = 4 * kTileRows;  // the bytes of a plane of one bit
  switch (bits) {
    case 2: return pack_plane<2, 0>(codes, to);
    case 3: pack_plane<2, 0>(codes, to); return pack_plane<1, 2>(codes, to + 2 * kPlane);
    case 4: return pack_plane<4, 0>(codes, to);
    case 5: pack_plane<4, 0>(codes, to); return pack_plane<1, 4>(codes, to + 4 * kPlane);
    case 6: pack_plane<4, 0>(codes, to); return pack_plane<2, 4>(codes, to + 4 * kPlane);
    default:
      for (std::int64_t pair = 0; pair < kStep / 2; ++pair) std::memcpy(to + pair * 2 * kTileRows, codes + 2 * pair, 2);
  }
}

// The inverse of `pack_step`.
void unpack_step(const std::uint8_t* from, int bits, std::uint8_t* codes) {
  constexpr std::int64_t kPlane = 4 * kTileRows;
  switch (bits) {
    case 2: return unpack_plane<2, 0>(from, codes);
    case 3: unpack_plane<2, 0>(from, codes); return unpack_plane<1, 2>(from + 2 * kPlane, codes);
    case 4: return unpack_plane<4, 0>(from, codes);
    case 5: unpack_plane<4, 0>(from, codes); return unpack_plane<1, 4>(from + 4 * kPlane, codes);
    case 6: unpack_plane<4, 0>(from, codes); return unpack_plane<2, 4>(from + 4 * kPlane, codes);
    default:
      for (std::int64_t pair = 0; pair < kStep / 2; ++pair) std::memcpy(codes + 2 * pair, from + pair * 2 * kTileRows, 2);
  }
}

// Packs codes, one per byte, [n, k], into the rows of `to` [panels, bytes of the codes of a panel], whose rows may be
// parts of larger ones. Rows and columns that pad are zeros.
void pack_codes(const Tensor& to, const Tensor& codes, std::int64_t kind) {
  YOKE_CHECK(kind > 0 && kind < kCodes, "pack_codes: no codes ", kind);
  YOKE_CHECK(codes.dim() == 2 && codes.is_contiguous() && codes.element_size() == 1,
             "pack_codes: codes must be bytes and contiguous [n, k], not ", codes.scalar_type(), " ", codes.sizes());
  const int bits = bits_of(static_cast<Codes>(kind));
  const std::int64_t n = codes.size(0), k = codes.size(1), steps = (k + kStep - 1) / kStep, bytes = tile_bytes(bits);
  YOKE_CHECK(to.scalar_type() == Scalar::u8 && to.dim() == 2 && to.stride(1) == 1 && to.size(0) == panels_of(n) &&
                 to.size(1) == steps * 2 * bytes,
             "pack_codes: ", n, " rows of ", k, " codes do not fit ", to.sizes());
  const auto* from = codes.const_data_ptr<std::uint8_t>();
  auto* start = to.mutable_data_ptr<std::uint8_t>();
  const std::int64_t row_bytes = bits == 8 ? 2 : 4;
  const std::int64_t grain = std::max<std::int64_t>(1, 65536 / (kPanelRows * k + 1)), stride = to.stride(0);
  parallel_for(0, panels_of(n), grain, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t panel = first; panel < last; ++panel) {
      std::uint8_t* tile = start + panel * stride;
      for (std::int64_t step = 0; step < steps; ++step) {
        const std::int64_t count = std::min(kStep, k - step * kStep);
        for (std::int64_t t = 0; t < 2; ++t, tile += bytes) {
          for (std::int64_t r = 0; r < kTileRows; ++r) {
            const std::int64_t row = panel * kPanelRows + t * kTileRows + r;
            std::uint8_t some[kStep] = {};
            if (row < n) std::memcpy(some, from + row * k + step * kStep, static_cast<std::size_t>(count));
            pack_step(some, bits, tile + r * row_bytes);
          }
        }
      }
    }
  });
}

float float_of_e4m3(std::uint8_t bits) {
  const float value = as<float>(static_cast<std::uint32_t>(bits & 0x7f) << 20) * 0x1p120f;
  return (bits & 0x80) != 0 ? -value : value;
}

// Factor `at` of a section. `upper`: the upper half of a byte that has two.
float factor(Kind kind, const std::uint8_t* section, std::int64_t at, bool upper) {
  switch (kind) {
    case Kind::none: return 1;
    case Kind::f16: return isa_rows::to_float(reinterpret_cast<const half*>(section)[at]);
    case Kind::f32: return reinterpret_cast<const float*>(section)[at];
    case Kind::i8: return static_cast<std::int8_t>(section[at]);
    case Kind::u8: return section[at];
    case Kind::e8m0: return as<float>(section[at] == 0 ? 0x00400000u : static_cast<std::uint32_t>(section[at]) << 23);
    case Kind::e4m3: return float_of_e4m3(section[at]);
    case Kind::u4: return upper ? section[at] >> 4 : section[at] & 15;
  }
  return 0;
}

float value_of(Codes codes, std::uint8_t code) {
  if (codes == Codes::i8) return static_cast<std::int8_t>(code);
  if (codes == Codes::e4m3) return float_of_e4m3(code);
  return value_unit(codes) * integer_value(codes, code);
}

// Row `row` of a part: k numbers.
void look_up(const QuantArgs& a, std::int64_t row, std::int64_t k, bf16* to) {
  const std::uint8_t* panel = a.panel(row / kPanelRows);
  const std::int64_t tile = row / kTileRows % 2, r = row % kTileRows, groups = a.groups_of_step();
  for (std::int64_t step = 0; step < a.steps(); ++step) {
    const std::uint8_t* from = panel + (step * 2 + tile) * tile_bytes(a.codes);
    bf16 some[kStep];
    if (a.codes == Codes::bf16) {
      for (std::int64_t pair = 0; pair < kStep / 2; ++pair) {
        std::memcpy(some + 2 * pair, from + (pair * kTileRows + r) * 4, 4);
      }
    } else {
      std::uint8_t codes[kStep];
      unpack_step(from + r * (bits_of(a.codes) == 8 ? 2 : 4), bits_of(a.codes), codes);
      for (std::int64_t group = 0; group < groups; ++group) {
        const std::int64_t at = ((step * 2 + tile) * groups + group) * kTileRows + r;
        const std::int64_t above = (a.super_of(step) * 2 + tile) * kTileRows + r;
        const float scale = factor(a.group_kind, panel + a.scales_at, at, false) *
                            factor(a.super_kind, panel + a.super_scales_at, above, false);
        const float offset = !a.offsets ? 0
                                        : factor(a.group_kind, panel + a.offsets_at, at, true) *
                                              factor(a.super_kind, panel + a.super_offsets_at, above, false);
        for (std::int64_t j = group * kStep / groups; j < (group + 1) * kStep / groups; ++j) {
          brain rounded;
          isa_rows::store(value_of(a.codes, codes[j]) * scale + offset, &rounded);
          some[j] = rounded.bits;
        }
      }
    }
    const std::int64_t left = std::min(kStep, k - step * kStep);
    std::memcpy(to + step * kStep, some, static_cast<std::size_t>(left) * sizeof(bf16));
  }
}

// Looks up tokens in a part of an embedding table: token t gets row t - start of the packed weight, dequantized, or zeros
// if that is not in [0, count). tokens int64 [...] -> bf16 [..., k].
Tensor packed_rows(const Tensor& tokens, const Tensor& data, Sizes parts, std::int64_t start, std::int64_t count) {
  const Weight w = weight_of("packed_rows", data, parts);
  YOKE_CHECK(tokens.scalar_type() == Scalar::i64, "packed_rows: tokens must be int64, not ", tokens.scalar_type());
  YOKE_CHECK(count >= 0 && count <= w.n && w.is_single(), "packed_rows: ", count, " rows of a table of ", w.n);
  std::vector<std::int64_t> shape(tokens.sizes().begin(), tokens.sizes().end());
  shape.push_back(w.k);
  Tensor rows = empty(shape, Scalar::bf16);
  const Tensor wanted = tokens.contiguous();
  const std::int64_t* token = wanted.const_data_ptr<std::int64_t>();
  auto* to = rows.mutable_data_ptr<bf16>();
  parallel_for(0, wanted.numel(), 4, [&](std::int64_t t0, std::int64_t t1) {
    for (std::int64_t t = t0; t < t1; ++t) {
      const std::int64_t local = token[t] - start;
      if (local < 0 || local >= count) {
        std::memset(to + t * w.k, 0, static_cast<std::size_t>(w.k) * sizeof(bf16));
      } else {
        look_up(w.parts[0], local, w.k, to + t * w.k);
      }
    }
  });
  return rows;
}

const Operators operators(
    "yoke_kernels",
    {
        op<pack_codes>("pack_codes(Tensor(a!) to, Tensor codes, int kind) -> ()"),
        op<packed_rows>("packed_rows(Tensor tokens, Tensor data, int[] parts, int start, int count) -> Tensor"),
    });

}  // namespace
}  // namespace yoke::kernels
