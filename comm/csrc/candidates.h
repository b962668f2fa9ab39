// The largest entries of rows that are split over the ranks by column. Each rank finds its own and the
// ranks exchange those: never the rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "collectives.h"

namespace yoke {

constexpr std::int64_t kNoIndex = std::numeric_limits<std::int64_t>::max();

// NaN counts as the largest value, as in torch's own argmax, and of equal values the lower index comes
// first.
struct Candidate {
  float value;
  std::int64_t index;

  bool before(const Candidate& other) const;
};

// The index of a row's best entry; below 0 if that is not a finite number, so that nobody takes it for
// a choice: -1 for NaN, -2 for infinity, -3 for minus infinity.
std::int64_t chosen(const Candidate& best);

// The best `k` of each of `rows` rows over all ranks' columns, best first: best[rows * k], the same on
// every rank. This rank's columns, `columns` of them, start at `offset`. Where there are fewer than k in
// all, the index of the others is kNoIndex.
void best_candidates(const Collectives& c, const float* values, std::size_t rows, std::size_t columns, std::size_t k,
                     std::int64_t offset, Candidate* best);

}  // namespace yoke
