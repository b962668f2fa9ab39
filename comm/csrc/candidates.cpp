#include "candidates.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace yoke {
namespace {

bool better(const Candidate& a, const Candidate& b) { return a.before(b); }

// The best `k` entries of one row, unordered; fewer if the row is shorter.
void best_of_row(const float* values, std::size_t columns, std::size_t k, std::int64_t offset,
                 std::vector<Candidate>& heap) {
  heap.clear();  // the worst kept entry is on top
  for (std::size_t column = 0; column < columns; ++column) {
    const float value = values[column];
    // Most entries are below the worst kept one, at one comparison each (false for NaN, which goes on).
    if (heap.size() == k && value <= heap.front().value) continue;
    const Candidate next{value, offset + static_cast<std::int64_t>(column)};
    if (heap.size() == k) {
      if (!next.before(heap.front())) continue;
      std::pop_heap(heap.begin(), heap.end(), better);
      heap.back() = next;
    } else {
      heap.push_back(next);
    }
    std::push_heap(heap.begin(), heap.end(), better);
  }
}

}  // namespace

bool Candidate::before(const Candidate& other) const {
  const bool mine = std::isnan(value), theirs = std::isnan(other.value);
  if (mine != theirs) return mine;
  if (!mine && value != other.value) return value > other.value;
  return index < other.index;
}

std::int64_t chosen(const Candidate& best) {
  if (std::isfinite(best.value)) return best.index;
  if (std::isnan(best.value)) return -1;
  return best.value > 0 ? -2 : -3;
}

void best_candidates(const Collectives& c, const float* values, std::size_t rows, std::size_t columns, std::size_t k,
                     std::int64_t offset, Candidate* best) {
  const Candidate none{-std::numeric_limits<float>::infinity(), kNoIndex};
  std::vector<Candidate> mine(rows * k, none);
  const std::size_t grain = 1 + 16384 / (columns + 1);  // the fewest rows that are worth a thread
  c.parallel_for(rows, grain, [&](std::size_t begin, std::size_t end) {
    std::vector<Candidate> heap;
    heap.reserve(k);
    for (std::size_t row = begin; row < end; ++row) {
      best_of_row(values + row * columns, columns, k, offset, heap);
      std::copy(heap.begin(), heap.end(), mine.begin() + static_cast<std::ptrdiff_t>(row * k));
    }
  });
  const auto world = static_cast<std::size_t>(c.channel.world());
  std::vector<Candidate> all(world * rows * k);
  all_gather(c, mine.data(), all.data(), mine.size() * sizeof(Candidate), DType::kBytes, kCandidates);
  std::vector<Candidate> of_row(world * k);
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t rank = 0; rank < world; ++rank) {
      std::copy_n(all.begin() + static_cast<std::ptrdiff_t>((rank * rows + row) * k), k,
                  of_row.begin() + static_cast<std::ptrdiff_t>(rank * k));
    }
    std::partial_sort(of_row.begin(), of_row.begin() + static_cast<std::ptrdiff_t>(k), of_row.end(), better);
    std::copy_n(of_row.begin(), k, best + row * k);
  }
}

}  // namespace yoke
