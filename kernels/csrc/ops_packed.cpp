// torch.ops.yoke_kernels.pack_rows: pack bfloat16 rows in the layout of quant.h.
//
// It only moves data. Plain loops are memory-bound, so all instruction sets share them.

#include <algorithm>
#include <cstring>
#include <string_view>
#include <vector>

#include "quant.h"
#include "tensor.h"

namespace yoke::kernels {
namespace {

constexpr std::int64_t kPairs = kStep / 2, kTile = tile_bytes(Codes::bf16);

void check_data(const Tensor& data, const char* name) {
  YOKE_CHECK(data.scalar_type() == Scalar::u8 && data.dim() == 4 && data.size(2) == 2 && data.size(3) == kTile &&
                  data.is_contiguous(),
              name, ": packed bfloat16 must be uint8 and contiguous [panels, steps, 2, ", kTile, "], not ",
              data.scalar_type(), " ", data.sizes());
}

// The offset of a row's first pair. The row's other pairs follow at a distance of kTileRows pairs, those of the next
// step at a distance of two tiles.
std::int64_t row_at(std::int64_t row, std::int64_t steps) {
  return row / kPanelRows * steps * 2 * kTile + row / kTileRows % 2 * kTile + row % kTileRows * 4;
}

typedef std::uint32_t Quad __attribute__((vector_size(16)));

// Packs four rows of 16 pairs, `stride` numbers apart, into a tile; the first row's place is `to`.
void pack_quad(const bf16* from, std::int64_t stride, std::uint8_t* to) {
  for (std::int64_t i = 0; i < kPairs; i += 4, from += 8, to += 4 * 4 * kTileRows) {
    Quad rows[4];
    for (int r = 0; r < 4; ++r) std::memcpy(&rows[r], from + r * stride, sizeof rows[r]);
    const Quad low = __builtin_shuffle(rows[0], rows[1], Quad{0, 4, 1, 5});
    const Quad high = __builtin_shuffle(rows[0], rows[1], Quad{2, 6, 3, 7});
    const Quad low2 = __builtin_shuffle(rows[2], rows[3], Quad{0, 4, 1, 5});
    const Quad high2 = __builtin_shuffle(rows[2], rows[3], Quad{2, 6, 3, 7});
    const Quad pairs[4] = {
        __builtin_shufflevector(low, low2, 0, 1, 4, 5), __builtin_shufflevector(low, low2, 2, 3, 6, 7),
        __builtin_shufflevector(high, high2, 0, 1, 4, 5), __builtin_shufflevector(high, high2, 2, 3, 6, 7)};
    for (int j = 0; j < 4; ++j) std::memcpy(to + j * 4 * kTileRows, &pairs[j], sizeof pairs[j]);
  }
}

// Packs the rows of `weight` [r, k] as rows first, first + 1, .. of `data`. Columns past k are zeros.
void pack_rows(const Tensor& data, const Tensor& weight, std::int64_t first) {
  check_data(data, "pack_rows");
  YOKE_CHECK(weight.scalar_type() == Scalar::bf16 && weight.dim() == 2, "pack_rows: takes 2-D bfloat16, not ",
              weight.scalar_type(), " ", weight.sizes());
  const std::int64_t rows = weight.size(0), k = weight.size(1), steps = data.size(1);
  YOKE_CHECK((k + kStep - 1) / kStep == steps && first >= 0 && first + rows <= data.size(0) * kPanelRows, "pack_rows: ",
              rows, " rows of ", k, " numbers from row ", first, " on do not fit into ", data.sizes());
  const Tensor whole = weight.stride(1) == 1 || k == 1 ? weight.view() : weight.contiguous();
  const std::int64_t stride = whole.stride(0);
  const auto* from = whole.const_data_ptr<bf16>();
  auto* to = data.mutable_data_ptr<std::uint8_t>();
  const std::int64_t begin = first / kTileRows, end = (first + rows + kTileRows - 1) / kTileRows;
  // Tile by tile, 16 rows each: a tile stays in the L1 cache while it is written, from one cache line of each row.
  parallel_for(begin, end, std::max<std::int64_t>(1, 65536 / (kTileRows * k + 1)), [&](std::int64_t t0, std::int64_t t1) {
    for (std::int64_t t = t0; t < t1; ++t) {
      const std::int64_t r0 = std::max(t * kTileRows, first), r1 = std::min((t + 1) * kTileRows, first + rows);
      for (std::int64_t step = 0; step < steps; ++step) {
        const std::int64_t count = std::min(kStep, k - step * kStep);
        for (std::int64_t r = r0; r < r1;) {
          const bf16* row = from + (r - first) * stride + step * kStep;
          std::uint8_t* place = to + row_at(r, steps) + step * 2 * kTile;
          if (count == kStep && r % 4 == 0 && r + 4 <= r1) {
            pack_quad(row, stride, place);
            r += 4;
            continue;
          }
          std::uint32_t pairs[kPairs] = {};
          std::memcpy(pairs, row, static_cast<std::size_t>(count) * sizeof(bf16));
          for (std::int64_t i = 0; i < kPairs; ++i) std::memcpy(place + i * 4 * kTileRows, &pairs[i], 4);
          ++r;
        }
      }
    }
  });
}

// Whether matmuls with packed bfloat16 are faster, for few rows and for many.
bool prefers_packed() { return std::string_view(current().name) == "amx"; }

const Operators operators(
    "yoke_kernels",
    {
        op<pack_rows>("pack_rows(Tensor(a!) data, Tensor weight, int first) -> ()"),
    },
    {
        op<prefers_packed>("prefers_packed() -> bool"),
    });

}  // namespace
}  // namespace yoke::kernels
