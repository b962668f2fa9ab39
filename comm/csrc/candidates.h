// The largest entries of rows that are split over the ranks by column. Each rank finds its own largest
// entries, and the ranks exchange only these, never the rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "collectives.h"

namespace yoke {

constexpr std::int64_t kNoIndex = std::numeric_limits<std::int64_t>::max();

// An entry of a row. NaN counts as the largest value, as in torch's argmax. Of equal values the lower
// index comes first.
struct Candidate {
  float value;
  std::int64_t index;

  bool before(const Candidate& other) const;
};

// The index of a row's best entry, or a code below 0 if its value is not finite, so that it cannot be mistaken
// for an index: -1 for NaN, -2 for infinity, -3 for minus infinity.
std::int64_t chosen(const Candidate& best);

// The best `k` entries of each row over all ranks' columns, best first: best[rows * k], the same on every
// rank. This rank holds `columns` columns of each row, from `offset` on. If all ranks together have fewer
// than k columns, the index of the missing entries is kNoIndex.
void best_candidates(const Collectives& c, const float* values, std::size_t rows, std::size_t columns, std::size_t k,
                     std::int64_t offset, Candidate* best);

}  // namespace yoke
