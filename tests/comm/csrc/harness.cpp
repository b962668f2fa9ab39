// The collectives without torch and without processes: ranks are threads over one memory region, so that
// a sanitizer sees every access. Every result is compared, bit for bit, with sums that are computed here in
// another way. tests/comm/test_core.py builds this with several compilers' flags and runs it.
//
//   harness random SEED CASES   all operators in random order, worlds 1 to 8, in small and large buffers;
//                               every rank with another instruction set
//   harness plain SEED CASES    the same without instruction sets, as on a processor that has none
//   harness many SEED CASES     with 64 ranks
//   harness kernels SEED        every instruction set against the plain one and against the reference
//   harness faults              ranks that are dead, late, or call something else
//
// The last line of its output says what was checked. Any error ends it with exit code 1.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "candidates.h"
#include "channel.h"
#include "collectives.h"
#include "kernels.h"

namespace {

using namespace yoke;
using Bytes = std::vector<unsigned char>;
using Random = std::mt19937_64;

[[noreturn]] void fail(const std::string& what) {
  static std::mutex one;
  const std::lock_guard<std::mutex> lock(one);
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::fflush(stderr);
  std::_Exit(1);
}

void check(bool holds, const std::string& what) {
  if (!holds) fail(what);
}

std::size_t below(Random& random, std::size_t limit) { return static_cast<std::size_t>(random() % limit); }

// ---- The reference: converts numbers to bits by arithmetic, not by shifting. ---------------------------

struct Format {
  int exponent_bits, mantissa_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
};
constexpr Format kHalf{5, 10}, kBrain{8, 7};

double decode(Format f, std::uint16_t bits) {
  const int mantissa = bits & ((1 << f.mantissa_bits) - 1);
  const int exponent = (bits >> f.mantissa_bits) & ((1 << f.exponent_bits) - 1);
  const double sign = bits >> 15 ? -1.0 : 1.0;
  if (exponent == (1 << f.exponent_bits) - 1) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - f.bias() - f.mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << f.mantissa_bits), exponent - f.bias() - f.mantissa_bits);
}

// To nearest, ties to even (the default rounding mode of a process).
std::uint16_t encode(Format f, double value) {
  const int top = (1 << f.exponent_bits) - 1;
  const auto sign = static_cast<std::uint16_t>(std::signbit(value) ? 0x8000 : 0);
  const auto with = [&](int exponent, int mantissa) {
    return static_cast<std::uint16_t>(sign | (exponent << f.mantissa_bits) | mantissa);
  };
  if (std::isnan(value)) return with(top, 1 << (f.mantissa_bits - 1));
  if (std::isinf(value)) return with(top, 0);
  if (value == 0.0) return with(0, 0);
  const int exponent = std::max(std::ilogb(value), 1 - f.bias());
  // In units of the last place; it may round up to the next power of two.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(value), f.mantissa_bits - exponent)));
  int place = exponent + f.bias(), mantissa = units;
  if (units >= (2 << f.mantissa_bits)) {
    ++place;
    mantissa = units / 2;
  }
  if (mantissa < (1 << f.mantissa_bits)) return with(0, mantissa);
  return place >= top ? with(top, 0) : with(place, mantissa - (1 << f.mantissa_bits));
}

bool is_float(DType dtype) { return dtype <= DType::kFloat16; }

float get_float(DType dtype, const unsigned char* from) {
  if (dtype == DType::kFloat32) {
    float value;
    std::memcpy(&value, from, 4);
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, from, 2);
  return static_cast<float>(decode(dtype == DType::kFloat16 ? kHalf : kBrain, bits));
}

void put_float(DType dtype, unsigned char* to, float value) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, &value, 4);
    return;
  }
  const std::uint16_t bits = encode(dtype == DType::kFloat16 ? kHalf : kBrain, value);
  std::memcpy(to, &bits, 2);
}

// The sum of element i of all of `parts`, in their order; after it, `residual` (or nothing).
void reference_sum(DType dtype, const std::vector<const unsigned char*>& parts, const unsigned char* residual,
                   unsigned char* out) {
  if (is_float(dtype)) {
    volatile float total = get_float(dtype, parts[0]);  // one addition at a time; the compiler must not reorder them
    for (std::size_t r = 1; r < parts.size(); ++r) total = total + get_float(dtype, parts[r]);
    if (residual != nullptr) total = get_float(dtype, residual) + total;
    put_float(dtype, out, total);
  } else if (dtype == DType::kInt32) {
    std::uint32_t total = 0, value;
    for (const unsigned char* part : parts) {
      std::memcpy(&value, part, 4);
      total += value;
    }
    std::memcpy(out, &total, 4);
  } else {
    std::uint64_t total = 0, value;
    for (const unsigned char* part : parts) {
      std::memcpy(&value, part, 8);
      total += value;
    }
    std::memcpy(out, &total, 8);
  }
}

Bytes reference_norm(DType dtype, const Bytes& x, const Bytes& weight, float eps, std::size_t rows, std::size_t width) {
  const std::size_t unit = size_of(dtype);
  Bytes out(x.size());
  for (std::size_t row = 0; row < rows; ++row) {
    double squares = 0.0;
    for (std::size_t i = 0; i < width; ++i) {
      const double value = get_float(dtype, &x[(row * width + i) * unit]);
      squares += value * value;
    }
    const double inverse = 1.0 / std::sqrt(squares / static_cast<double>(width) + static_cast<double>(eps));
    for (std::size_t i = 0; i < width; ++i) {
      const double value = get_float(dtype, &x[(row * width + i) * unit]) * inverse;
      put_float(dtype, &out[(row * width + i) * unit],
                static_cast<float>(value * static_cast<double>(get_float(dtype, &weight[i * unit]))));
    }
  }
  return out;
}

// Whether the bits are equal. Which of several NaN a sum keeps is the compiler's choice, so all NaN are equal.
bool same_number(DType dtype, const unsigned char* a, const unsigned char* b) {
  if (std::memcmp(a, b, size_of(dtype)) == 0) return true;
  return is_float(dtype) && std::isnan(get_float(dtype, a)) && std::isnan(get_float(dtype, b));
}

void check_equal(DType dtype, const unsigned char* found, const Bytes& wanted, const std::string& what) {
  const std::size_t unit = size_of(dtype);
  for (std::size_t at = 0; at < wanted.size(); at += unit) {
    if (same_number(dtype, found + at, &wanted[at])) continue;
    fail(what + ": element " + std::to_string(at / unit) + " differs");
  }
}

// For normal numbers. Root mean squares of rows with an infinity are checked elsewhere.
void check_near(DType dtype, const unsigned char* found, const Bytes& wanted, const std::string& what) {
  const std::size_t unit = size_of(dtype);
  // Two roundings, and a sum of squares in another order.
  const double tolerance = dtype == DType::kFloat32 ? 1e-5 : dtype == DType::kFloat16 ? 3e-3 : 2e-2;
  for (std::size_t at = 0; at < wanted.size(); at += unit) {
    const double a = get_float(dtype, found + at), b = get_float(dtype, &wanted[at]);
    if (!(std::fabs(a - b) <= tolerance * (std::fabs(b) + 1e-2))) {
      fail(what + ": element " + std::to_string(at / unit) + " is " + std::to_string(a) + " and not " +
           std::to_string(b));
    }
  }
}

// ---- Inputs ------------------------------------------------------------------------------------------

enum class Data { kNormal, kWild };

// Wild data: any bits, so infinities, NaN, denormals, and many numbers that differ by half a unit.
Bytes make_numbers(Random& random, DType dtype, std::size_t count, Data data) {
  const std::size_t unit = size_of(dtype);
  Bytes out(count * unit);
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t bits = random();
    if (!is_float(dtype)) {
      std::memcpy(&out[i * unit], &bits, unit);
    } else if (data == Data::kWild && bits % 4 == 0) {
      std::memcpy(&out[i * unit], reinterpret_cast<const unsigned char*>(&bits) + 4, unit);
    } else if (data == Data::kWild && bits % 4 == 1) {  // powers of two: their sums are ties
      put_float(dtype, &out[i * unit], std::ldexp(bits & 4 ? 1.0f : -1.0f, static_cast<int>(bits >> 8) % 14));
    } else {
      put_float(dtype, &out[i * unit], normal(random));
    }
  }
  return out;
}

// Memory of exactly `size` bytes that starts `shift` bytes after an aligned address.
struct Block {
  Block(std::size_t size, std::size_t shift) : memory(new unsigned char[size + shift]), data(memory.get() + shift) {}
  Block(const Bytes& from, std::size_t shift) : Block(from.size(), shift) {
    if (!from.empty()) std::memcpy(data, from.data(), from.size());
  }
  std::unique_ptr<unsigned char[]> memory;
  unsigned char* data;
};

// ---- Ranks as threads --------------------------------------------------------------------------------

struct Region {
  Region(int world, std::size_t slot_bytes) : world(world), slot_bytes(slot_bytes) {
    const std::size_t size = Channel::total_bytes(world, slot_bytes);
    base = static_cast<std::byte*>(std::aligned_alloc(4096, size));
    check(base != nullptr, "no memory");
    std::memset(base, 0, size);
  }
  ~Region() { std::free(base); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  int world;
  std::size_t slot_bytes;
  std::byte* base;
};

template <typename Body>
void run_ranks(int world, const Body& body) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world; ++rank) threads.emplace_back([&body, rank] { body(rank); });
  for (std::thread& thread : threads) thread.join();
}

const ParallelFor kSerial = [](std::size_t size, std::size_t,
                               const std::function<void(std::size_t, std::size_t)>& body) {
  if (size != 0) body(0, size);
};

// Runs the second half in another thread, as torch's pool would.
const ParallelFor kTwoThreads = [](std::size_t size, std::size_t grain,
                                   const std::function<void(std::size_t, std::size_t)>& body) {
  const std::size_t grains = (size + grain - 1) / grain;
  if (grains <= 1) return kSerial(size, grain, body);
  const std::size_t middle = grains / 2 * grain;
  std::thread other([&] { body(middle, size); });
  body(0, middle);
  other.join();
};

bool plain_only = false;

std::vector<const Kernels*> all_kernels() {
  if (plain_only) return {find_kernels("base")};
  std::vector<const Kernels*> found;
  for (const char* name : {"base", "avx2", "avx512", "avx512bf16"}) {
    if (const Kernels* kernels = find_kernels(name)) {
      check(std::strcmp(kernels->name, name) == 0, std::string("find_kernels gave another than ") + name);
      found.push_back(kernels);
    }
  }
  check(!found.empty() && find_kernels("no such") == nullptr, "find_kernels");
  check(std::strcmp(best_kernels().name, found.back()->name) == 0, "best_kernels is not the best");
  return found;
}

// ---- Cases: created once, with the result that each rank should get, then run by every rank --------------

enum class Kind { kAllReduce, kReduceScatter, kAllGather, kBroadcast, kBarrier, kAddNorm, kBest, kMeasure, kNumber };
const char* const kKindNames[] = {"all_reduce", "reduce_scatter", "all_gather", "broadcast",
                                  "barrier",    "add_rms_norm",   "best",       "measure"};

struct Case {
  Kind kind = Kind::kAllReduce;
  DType dtype = DType::kFloat32;
  std::size_t count = 0;  // elements, or bytes for collectives that only move data
  std::size_t rows = 0, width = 0, k = 0;
  int root = 0;
  bool in_place = false;
  std::size_t one_step_bytes = 0;
  std::vector<Bytes> in;               // by rank
  std::vector<std::size_t> shift;      // by rank, bytes
  std::vector<std::size_t> columns;    // by rank, of kBest
  Bytes residual, weight;
  std::vector<Bytes> out;              // by rank, or one for all
  Bytes normed;
  std::vector<Candidate> best;

  const Bytes& wanted(int rank) const { return out[out.size() == 1 ? 0 : static_cast<std::size_t>(rank)]; }
  std::string name(std::size_t index, int world, int rank) const {
    return std::string(kKindNames[static_cast<int>(kind)]) + " (case " + std::to_string(index) + ", rank " +
           std::to_string(rank) + " of " + std::to_string(world) + ", dtype " +
           std::to_string(static_cast<int>(dtype)) + ", " + std::to_string(count) + " elements, " +
           std::to_string(rows) + " x " + std::to_string(width) + ", one step up to " +
           std::to_string(one_step_bytes) + (in_place ? ", in place)" : ")");
  }
};

// Mostly small and odd; sometimes several buffers long, sometimes 0, sometimes at the border of a buffer.
std::size_t random_size(Random& random, std::size_t slot_bytes, std::size_t unit, std::size_t most) {
  const std::size_t slot = slot_bytes / unit;
  std::size_t size = 0;
  switch (below(random, 6)) {
    case 0:
      size = below(random, 4);
      break;
    case 1:
      size = 1 + below(random, 100);
      break;
    case 2:
      size = slot - 1 + below(random, 3);
      break;
    case 3:
      size = below(random, 5 * slot) + 1;
      break;
    default:
      size = below(random, slot + slot / 2);
  }
  return std::min(size, most / unit);
}

void fill_sum(Case& c, const std::vector<Bytes>& in, const Bytes* residual, Bytes& out) {
  const std::size_t unit = size_of(c.dtype);
  out.resize(in[0].size());
  std::vector<const unsigned char*> parts(in.size());
  for (std::size_t at = 0; at < out.size(); at += unit) {
    for (std::size_t r = 0; r < in.size(); ++r) parts[r] = &in[r][at];
    reference_sum(c.dtype, parts, residual ? &(*residual)[at] : nullptr, &out[at]);
  }
}

void fill_best(Random& random, Case& c, int world) {
  c.rows = below(random, 4) == 0 ? 30 : 1 + below(random, 3);
  c.k = 1 + below(random, 5);
  std::size_t total = 0;
  for (int r = 0; r < world; ++r) {
    c.columns.push_back(below(random, 3) == 0 ? below(random, 3) : below(random, 300));
    total += c.columns.back();
  }
  if (total < c.k) c.columns[0] += c.k, total += c.k;
  // Few different values, so most of the best are ties. First all parts in one row.
  static const float kValues[] = {-std::numeric_limits<float>::infinity(), -1.5f, -0.0f, 0.0f, 2.0f, 2.25f,
                                  std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()};
  const std::size_t choices = 1 + below(random, std::size(kValues));
  std::vector<float> whole(c.rows * total);
  for (float& value : whole) value = kValues[below(random, choices)];
  for (std::size_t row = 0; row < c.rows; ++row) {
    std::vector<Candidate> all;
    for (std::size_t i = 0; i < total; ++i) all.push_back({whole[row * total + i], static_cast<std::int64_t>(i)});
    std::stable_sort(all.begin(), all.end(), [](const Candidate& a, const Candidate& b) {
      const float up = std::numeric_limits<float>::infinity();
      if (std::isnan(a.value) || std::isnan(b.value)) return std::isnan(a.value) && !std::isnan(b.value);
      return a.value > b.value && b.value < up;
    });
    c.best.insert(c.best.end(), all.begin(), all.begin() + static_cast<std::ptrdiff_t>(c.k));
  }
  std::size_t offset = 0;
  for (int r = 0; r < world; ++r) {
    const std::size_t columns = c.columns[static_cast<std::size_t>(r)];
    Bytes part(c.rows * columns * sizeof(float));
    for (std::size_t row = 0; row < c.rows && columns != 0; ++row) {
      std::memcpy(&part[row * columns * sizeof(float)], &whole[row * total + offset], columns * sizeof(float));
    }
    c.in.push_back(part);
    offset += columns;
  }
}

Case make_case(Random& random, int world, std::size_t slot_bytes) {
  Case c;
  c.kind = static_cast<Kind>(below(random, static_cast<std::size_t>(Kind::kNumber)));
  if (c.kind == Kind::kMeasure && below(random, 4) != 0) c.kind = Kind::kAllReduce;
  const std::size_t most = world > 8 ? 4096 : 6 * slot_bytes;
  const std::size_t steps[] = {0, 1000, slot_bytes};
  c.one_step_bytes = steps[below(random, 3)];
  c.dtype = static_cast<DType>(below(random, 5));
  c.in_place = below(random, 2) == 0;
  const auto ranks = static_cast<std::size_t>(world);
  const Data data = below(random, 3) == 0 ? Data::kWild : Data::kNormal;
  switch (c.kind) {
    case Kind::kAllReduce:
      c.count = random_size(random, slot_bytes, size_of(c.dtype), most);
      for (int r = 0; r < world; ++r) c.in.push_back(make_numbers(random, c.dtype, c.count, data));
      fill_sum(c, c.in, nullptr, c.out.emplace_back());
      break;
    case Kind::kReduceScatter: {
      c.count = random_size(random, slot_bytes / ranks, size_of(c.dtype), most / ranks);
      for (int r = 0; r < world; ++r) c.in.push_back(make_numbers(random, c.dtype, c.count * ranks, data));
      Bytes whole;
      fill_sum(c, c.in, nullptr, whole);
      const auto part = static_cast<std::ptrdiff_t>(c.count * size_of(c.dtype));
      for (int r = 0; r < world; ++r) c.out.emplace_back(whole.begin() + r * part, whole.begin() + (r + 1) * part);
      break;
    }
    case Kind::kAllGather:
    case Kind::kBroadcast:
      c.dtype = DType::kBytes;
      c.count = random_size(random, slot_bytes, 1, most);
      c.root = static_cast<int>(below(random, ranks));
      for (int r = 0; r < world; ++r) c.in.push_back(make_numbers(random, c.dtype, c.count, data));
      if (c.kind == Kind::kBroadcast) {
        c.out.push_back(c.in[static_cast<std::size_t>(c.root)]);
      } else {
        c.out.emplace_back();
        for (const Bytes& in : c.in) c.out[0].insert(c.out[0].end(), in.begin(), in.end());
      }
      break;
    case Kind::kAddNorm: {
      c.dtype = static_cast<DType>(below(random, 3));
      const std::size_t unit = size_of(c.dtype);
      // Rows that fit a part, rows that do not, and empty rows.
      c.width = below(random, 3) == 0 ? below(random, 8) : 1 + below(random, below(random, 3) == 0 ? 2500 : 200);
      c.rows = below(random, std::min<std::size_t>(60, most / (c.width * unit + 1)) + 1);
      c.count = c.rows * c.width;
      for (int r = 0; r < world; ++r) c.in.push_back(make_numbers(random, c.dtype, c.count, Data::kNormal));
      c.residual = make_numbers(random, c.dtype, c.count, Data::kNormal);
      c.weight = make_numbers(random, c.dtype, c.width, Data::kNormal);
      fill_sum(c, c.in, &c.residual, c.out.emplace_back());
      c.normed = reference_norm(c.dtype, c.out[0], c.weight, 1e-5f, c.rows, c.width);
      break;
    }
    case Kind::kBest:
      c.dtype = DType::kFloat32;
      fill_best(random, c, world);
      break;
    default:
      break;
  }
  for (int r = 0; r < world; ++r) c.shift.push_back(below(random, 8) * size_of(c.dtype));
  return c;
}

struct Rank {
  Collectives collectives;
  int rank, world;
};

void run_case(const Rank& me, const Case& c, std::size_t index) {
  const auto r = static_cast<std::size_t>(me.rank);
  const std::size_t unit = size_of(c.dtype);
  Collectives with = me.collectives;
  with.one_step_bytes = c.one_step_bytes;
  const std::string name = c.name(index, me.world, me.rank);
  if (c.kind == Kind::kBarrier) return barrier(with);
  if (c.kind == Kind::kMeasure) {
    // All ranks must find the same switch point: gathered and compared.
    const std::size_t mine = measure_switch_point(with);
    check(mine <= me.collectives.channel.slot_bytes(), name + ": the switch point is larger than a buffer");
    std::vector<std::size_t> everyones(static_cast<std::size_t>(me.world));
    all_gather(with, &mine, everyones.data(), sizeof mine, DType::kBytes);
    for (const std::size_t theirs : everyones) check(theirs == mine, name + ": ranks have different switch points");
    return;
  }
  const Block in(c.in[r], c.shift[r]);
  if (c.kind == Kind::kBest) {
    std::int64_t offset = 0;
    for (std::size_t i = 0; i < r; ++i) offset += static_cast<std::int64_t>(c.columns[i]);
    std::vector<Candidate> best(c.rows * c.k);
    best_candidates(with, reinterpret_cast<const float*>(in.data), c.rows, c.columns[r], c.k, offset, best.data());
    for (std::size_t i = 0; i < best.size(); ++i) {
      const bool same = best[i].value == c.best[i].value || (std::isnan(best[i].value) && std::isnan(c.best[i].value));
      check(best[i].index == c.best[i].index && same, name + ": candidate " + std::to_string(i) + " differs");
    }
    return;
  }
  const bool can_be_in_place = c.kind == Kind::kAllReduce || c.kind == Kind::kBroadcast;
  const Block own_out(c.wanted(me.rank).size(), c.shift[(r + 1) % c.shift.size()]);
  unsigned char* const out = c.in_place && can_be_in_place ? in.data : own_out.data;
  switch (c.kind) {
    case Kind::kAllReduce:
      all_reduce(with, in.data, out, c.count, c.dtype);
      break;
    case Kind::kReduceScatter:
      reduce_scatter(with, in.data, out, c.count, c.dtype);
      break;
    case Kind::kAllGather:
      all_gather(with, in.data, out, c.count, c.dtype);
      break;
    case Kind::kBroadcast:
      broadcast(with, in.data, out, c.count, c.root, c.dtype);
      break;
    default: {
      const Block residual(c.residual, c.shift[r]), weight(c.weight, unit), normed(c.normed.size(), c.shift[r]);
      unsigned char* const new_residual = c.in_place ? residual.data : out;
      all_reduce_add_rms_norm(with, in.data, residual.data, weight.data, 1e-5f, normed.data, new_residual, c.rows,
                              c.width, c.dtype);
      check_equal(c.dtype, new_residual, c.wanted(me.rank), name + ": residual");
      check_near(c.dtype, normed.data, c.normed, name + ": normed");
      return check_equal(c.dtype, in.data, c.in[r], name + ": the input was changed");
    }
  }
  check_equal(c.dtype, out, c.wanted(me.rank), name);
  if (out != in.data) check_equal(c.dtype, in.data, c.in[r], name + ": the input was changed");
}

void run_cases(std::uint64_t seed, std::size_t cases, int world, std::size_t slot_bytes, const ParallelFor& threads) {
  Random random(seed);
  std::vector<Case> plan;
  for (std::size_t i = 0; i < cases; ++i) plan.push_back(make_case(random, world, slot_bytes));
  const std::vector<const Kernels*> kernels = all_kernels();
  const Region region(world, slot_bytes);
  run_ranks(world, [&](int rank) {
    Channel channel(region.base, rank, world, slot_bytes, [](int) { return true; });
    channel.set_pid(1000 + rank);
    // Ranks with different instruction sets: each sums its own part, and all must get the same result.
    const Kernels* const own = kernels[(seed + static_cast<std::size_t>(rank)) % kernels.size()];
    const Rank me{{channel, own, slot_bytes, threads}, rank, world};
    try {
      for (std::size_t i = 0; i < plan.size(); ++i) run_case(me, plan[i], i);
    } catch (const std::exception& error) {
      fail(std::string("an exception: ") + error.what());
    }
  });
}

int run_random(std::uint64_t seed, std::size_t cases) {
  for (int world = 1; world <= 8; ++world) {
    const auto w = static_cast<std::uint64_t>(world);
    run_cases(seed * 1000 + w, cases, world, 4096, kSerial);
    // Buffers large enough that a message is divided among threads.
    if (world <= 3) run_cases(seed * 2000 + w, cases / 4 + 1, world, 256 * 1024, kTwoThreads);
    run_cases(seed * 3000 + w, cases / 2 + 1, world, 3 * 4096, kTwoThreads);
  }
  std::printf("worlds 1 to 8, %zu cases each\n", cases);
  return 0;
}

// ---- Instruction sets --------------------------------------------------------------------------------

int run_kernels(std::uint64_t seed) {
  Random random(seed);
  const std::vector<const Kernels*> all = all_kernels();
  std::string names;
  for (const Kernels* kernels : all) names += std::string(names.empty() ? "" : ", ") + kernels->name;
  // Every 16-bit number: plus 0, plus itself, and plus half a unit of its neighbors (ties).
  for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
    const auto type = static_cast<std::size_t>(dtype);
    const Format format = dtype == DType::kFloat16 ? kHalf : kBrain;
    for (unsigned bits = 0; bits < 65536; ++bits) {
      const auto b = static_cast<std::uint16_t>(bits);
      const double value = decode(format, b);
      if (std::isnan(value) || encode(format, value) == b) continue;
      fail("the reference does not round-trip " + std::to_string(b));
    }
    std::vector<std::uint16_t> every(65536), other(65536), wanted(65536);
    for (const int mode : {0, 1, 2, 3}) {
      for (std::size_t i = 0; i < every.size(); ++i) {
        every[i] = static_cast<std::uint16_t>(i);
        const auto down = static_cast<std::size_t>(format.mantissa_bits + (mode == 3)) << format.mantissa_bits;
        const std::size_t exponent = i & ((std::size_t{1} << 15) - (std::size_t{1} << format.mantissa_bits));
        const std::size_t half_unit = exponent > down ? exponent - down : 1;
        other[i] = static_cast<std::uint16_t>(mode == 0 ? 0 : mode == 1 ? i : half_unit);
        const volatile float a = static_cast<float>(decode(format, every[i]));
        const volatile float sum = a + static_cast<float>(decode(format, other[i]));
        wanted[i] = encode(format, sum);
      }
      std::vector<std::uint16_t> plain;
      for (const Kernels* kernels : all) {
        std::vector<std::uint16_t> found(every.size());
        const void* sources[] = {every.data(), other.data()};
        kernels->sum[type](found.data(), sources, 2, found.size());
        for (std::size_t i = 0; i < found.size(); ++i) {
          if (!same_number(dtype, reinterpret_cast<const unsigned char*>(&found[i]),
                           reinterpret_cast<const unsigned char*>(&wanted[i]))) {
            fail(std::string(kernels->name) + ", dtype " + std::to_string(type) + ": " + std::to_string(every[i]) +
                 " + " + std::to_string(other[i]) + " is " +
                 std::to_string(found[i]) + " and not " + std::to_string(wanted[i]));
          }
        }
        if (plain.empty()) plain = found;
        if (mode == 0 && found != plain) fail(std::string(kernels->name) + ": the bits differ from the plain sum's");
      }
    }
  }
  // Any number of sources and elements, from any address, in place and not.
  for (int round = 0; round < 1500; ++round) {
    const auto dtype = static_cast<DType>(below(random, 5));
    const auto type = static_cast<std::size_t>(dtype);
    const std::size_t unit = size_of(dtype), count = below(random, round % 10 == 0 ? 700 : 80);
    const int sources = 1 + static_cast<int>(below(random, 9));
    std::vector<Bytes> in;
    for (int r = 0; r < sources; ++r) in.push_back(make_numbers(random, dtype, count, Data::kWild));
    const Bytes residual = make_numbers(random, dtype, count, Data::kWild);
    const std::size_t shift = below(random, 16) * unit, place = below(random, in.size() + 1);
    Case c;
    c.dtype = dtype;
    Bytes wanted, wanted_added, plain, plain_added;
    fill_sum(c, in, nullptr, wanted);
    if (is_float(dtype)) fill_sum(c, in, &residual, wanted_added);
    for (const Kernels* kernels : all) {
      const std::string name = std::string(kernels->name) + ", dtype " + std::to_string(type) + ", " +
                               std::to_string(sources) + " x " + std::to_string(count);
      std::vector<std::unique_ptr<Block>> blocks;
      std::vector<const void*> from;
      for (const Bytes& bytes : in) {
        blocks.push_back(std::make_unique<Block>(bytes, shift));
        from.push_back(blocks.back()->data);
      }
      if (is_float(dtype)) {
        const Block added(count * unit, unit), shared(count * unit, 0), own(residual, unit);
        const float squares = kernels->add_sum[type](added.data, shared.data, from.data(), sources, own.data, count);
        check_equal(dtype, added.data, wanted_added, name + ", added");
        check(std::memcmp(added.data, shared.data, count * unit) == 0, name + ", the copy of the sum");
        // The sum of a row at its owner and the copies of it at its peers must be normalized alike.
        const Block taken(count * unit, shift);
        const float same = kernels->copy[type](taken.data, shared.data, count);
        check(std::memcmp(taken.data, added.data, count * unit) == 0, name + ", copied");
        check(std::memcmp(&squares, &same, sizeof same) == 0 || (std::isnan(squares) && std::isnan(same)),
              name + ", the sums of squares");
        kernels->add_sum[type](own.data, nullptr, from.data(), sources, own.data, count);
        check(std::memcmp(own.data, added.data, count * unit) == 0, name + ", added in place");
        if (kernels == all[0]) plain_added.assign(added.data, added.data + count * unit);
        check_equal(dtype, added.data, plain_added, name + ", added, against the plain ones");
      }
      const Block apart(count * unit, shift);
      unsigned char* const out = place < in.size() ? blocks[place]->data : apart.data;
      kernels->sum[type](out, from.data(), sources, count);
      check_equal(dtype, out, wanted, name);
      if (kernels == all[0]) plain.assign(out, out + count * unit);
      check_equal(dtype, out, plain, name + ", against the plain ones");
    }
    if (is_float(dtype) && count != 0) {
      const Bytes x = make_numbers(random, dtype, count, Data::kNormal);
      const Bytes weight = make_numbers(random, dtype, count, Data::kNormal);
      const Bytes normed = reference_norm(dtype, x, weight, 1e-6f, 1, count);
      for (const Kernels* kernels : all) {
        const Block from(x, shift), scale(weight, unit), out(count * unit, shift);
        const float squares = kernels->copy[type](out.data, from.data, count);
        kernels->rms_norm[type](out.data, from.data, squares, scale.data, 1e-6f, count);
        check_near(dtype, out.data, normed, std::string(kernels->name) + ": rms_norm");
      }
    }
  }
  std::printf("instruction sets: %s\n", names.c_str());
  return 0;
}

// ---- Faults ------------------------------------------------------------------------------------------

double now() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Calls operator `kind` with messages of `count` elements.
void call(const Collectives& c, Kind kind, std::size_t count) {
  const auto world = static_cast<std::size_t>(c.channel.world());
  std::vector<float> in(count * world + 1), residual(count + 1), out(count * world + 1), more(count + 1);
  std::vector<Candidate> best(1);
  switch (kind) {
    case Kind::kAllReduce:
      return all_reduce(c, in.data(), out.data(), count, DType::kFloat32);
    case Kind::kReduceScatter:
      return reduce_scatter(c, in.data(), out.data(), count, DType::kFloat32);
    case Kind::kAllGather:
      return all_gather(c, in.data(), out.data(), count * 4, DType::kFloat32);
    case Kind::kBroadcast:
      return broadcast(c, in.data(), out.data(), count * 4, 0, DType::kFloat32);
    case Kind::kBarrier:
      return barrier(c);
    case Kind::kAddNorm:
      return all_reduce_add_rms_norm(c, in.data(), residual.data(), in.data(), 1e-5f, out.data(), more.data(),
                                     count / 10, 10, DType::kFloat32);
    case Kind::kBest:
      return best_candidates(c, in.data(), 1, count, 1, 0, best.data());
    default:
      measure_switch_point(c);
  }
}

// The errors of the ranks of a group: "" for a rank without an error.
struct Outcome {
  std::vector<std::string> said, after;
  std::vector<double> seconds;
  std::vector<bool> is_peer_error;
};

template <typename Body, typename IsAlive>
Outcome run_failing(int world, double timeout_s, const IsAlive& is_alive, const Body& body,
                    std::size_t slot_bytes = 4096) {
  const Region region(world, slot_bytes);
  const auto size = static_cast<std::size_t>(world);
  Outcome outcome{std::vector<std::string>(size), std::vector<std::string>(size), std::vector<double>(size), {}};
  std::vector<char> peer_errors(size);
  run_ranks(world, [&](int rank) {
    const auto r = static_cast<std::size_t>(rank);
    Channel channel(region.base, rank, world, slot_bytes, is_alive);
    channel.set_pid(1000 + rank);
    channel.set_timeout(timeout_s);
    const Collectives c{channel, &best_kernels(), 4096, kSerial};
    const double start = now();
    try {
      barrier(c);  // so that all have published their pids
      body(c, rank);
      return;
    } catch (const PeerError& error) {
      peer_errors[r] = 1;
      outcome.said[r] = error.what();
    } catch (const std::exception& error) {
      outcome.said[r] = error.what();
    }
    outcome.seconds[r] = now() - start;
    try {
      barrier(c);
    } catch (const PeerError& error) {
      outcome.after[r] = error.what();
    }
  });
  for (const char is : peer_errors) outcome.is_peer_error.push_back(is != 0);
  return outcome;
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

void check_broken(const Outcome& outcome, std::size_t rank) {
  check(contains(outcome.after[rank], "failed earlier and cannot be used: " + outcome.said[rank]),
        "a failed group can still be used: '" + outcome.after[rank] + "'");
}

int run_faults() {
  for (int i = 0; i < static_cast<int>(Kind::kNumber); ++i) {
    const Kind kind = static_cast<Kind>(i);
    for (const std::size_t count : {std::size_t{20}, std::size_t{5000}}) {
      // Rank 1 is dead and never calls. (A rank that dies within an operator: tests/targets/faults.py.)
      const auto outcome = run_failing(
          3, 60.0, [](int peer) { return peer != 1; },
          [&](const Collectives& c, int rank) {
            if (rank != 1) call(c, kind, count);
          },
          kind == Kind::kMeasure ? 64 * 1024 : 4096);  // a small buffer has nothing to measure
      for (const std::size_t rank : {0, 2}) {
        const std::string& said = outcome.said[rank];
        check(outcome.is_peer_error[rank] && contains(said, "rank 1 (pid 1001), which has died"),
              std::string(kKindNames[i]) + ": a dead rank was reported as '" + said + "'");
        check(contains(said, "rank " + std::to_string(rank) + " waited"), "the message does not name the rank that waited: " + said);
        check(outcome.seconds[rank] < 2.0, "noticed after " + std::to_string(outcome.seconds[rank]) + " s");
        check_broken(outcome, rank);
      }
    }
  }
  {  // Rank 1 is dead, but it had published its step: no failure.
    const auto outcome = run_failing(
        2, 60.0, [](int peer) { return peer != 1; },
        [](const Collectives& c, int rank) {
          if (rank == 0) std::this_thread::sleep_for(std::chrono::milliseconds(500));
          call(c, Kind::kAllReduce, 8);
        });
    check(outcome.said[0].empty() && outcome.said[1].empty(), "it had published, but was reported as dead: " + outcome.said[0]);
  }
  {  // Rank 1 publishes its step and dies between the check of its step and the check whether it is alive.
    std::atomic<int> checks{0};
    const auto outcome = run_failing(
        2, 60.0,
        [&](int peer) {
          if (peer != 1 || checks.fetch_add(1) > 0) return true;
          std::this_thread::sleep_for(std::chrono::milliseconds(200));
          return false;
        },
        [&](const Collectives& c, int rank) {
          while (rank == 1 && checks.load() == 0) std::this_thread::yield();
          call(c, Kind::kAllReduce, 8);
        });
    check(checks.load() > 0 && outcome.said[0].empty(), "it had published before it died, but was reported as dead: " + outcome.said[0]);
  }
  {  // Late.
    const auto outcome = run_failing(
        3, 0.4, [](int) { return true; },
        [](const Collectives& c, int rank) {
          if (rank == 2) return;
          call(c, Kind::kAllReduce, 8);
        });
    for (const std::size_t rank : {0, 1}) {
      check(outcome.is_peer_error[rank] && contains(outcome.said[rank], "waited 0.4 s for rank 2 (pid 1002)") &&
                contains(outcome.said[rank], "is at step 1"),
            "a late rank was reported as '" + outcome.said[rank] + "'");
      check(outcome.seconds[rank] >= 0.4 && outcome.seconds[rank] < 2.0, "the deadline was not kept");
      check_broken(outcome, rank);
    }
  }
  {  // A rank that sleeps and then calls before the deadline: no failure, nor for ranks that sleep on its futex.
    const auto outcome = run_failing(
        4, 30.0, [](int) { return true; },
        [](const Collectives& c, int rank) {
          for (int i = 0; i < 5; ++i) {
            if (rank == i % 4) std::this_thread::sleep_for(std::chrono::milliseconds(20));
            call(c, Kind::kAllReduce, 3000);
          }
        });
    for (const std::string& said : outcome.said) check(said.empty(), "a rank that was in time was reported as " + said);
  }
  // Calls that differ in the size, operator, dtype, root, or algorithm.
  const std::function<void(const Collectives&, int)> different[] = {
      [](const Collectives& c, int rank) { call(c, Kind::kAllReduce, rank == 1 ? 9 : 8); },
      [](const Collectives& c, int rank) { call(c, rank == 1 ? Kind::kAllGather : Kind::kAllReduce, 8); },
      [](const Collectives& c, int rank) { call(c, rank == 1 ? Kind::kBarrier : Kind::kBroadcast, 8); },
      [](const Collectives& c, int rank) { call(c, rank == 1 ? Kind::kReduceScatter : Kind::kAddNorm, 20); },
      [](const Collectives& c, int rank) {
        float x[4] = {}, y[4];
        all_reduce(c, x, y, 4, rank == 1 ? DType::kInt32 : DType::kFloat32);
      },
      [](const Collectives& c, int rank) {
        float x[4] = {}, y[4];
        broadcast(c, x, y, sizeof x, rank == 1, DType::kBytes);
      },
      [](const Collectives& c, int rank) {
        const Collectives with{c.channel, c.kernels, rank == 1 ? std::size_t{0} : std::size_t{4096}, c.parallel_for};
        call(with, Kind::kAllReduce, 8);
      },
      [](const Collectives& c, int rank) {  // the same number of elements, in rows of another width
        float x[12] = {}, y[12], z[12];
        all_reduce_add_rms_norm(c, x, x, x, 1e-5f, y, z, rank == 1 ? 3 : 4, rank == 1 ? 4 : 3, DType::kFloat32);
      },
  };
  for (const auto& body : different) {
    const auto outcome = run_failing(2, 30.0, [](int) { return true; }, body);
    for (const std::size_t rank : {0, 1}) {
      check(!outcome.is_peer_error[rank] && contains(outcome.said[rank], "the same collectives in the same order") &&
                contains(outcome.said[rank], "rank " + std::to_string(rank) + " calls "),
            "ranks whose calls differ got: '" + outcome.said[rank] + "'");
      check_broken(outcome, rank);
    }
  }
  // Invalid arguments of a channel.
  const Region region(2, 4096);
  const auto alive = [](int) { return true; };
  const std::function<void()> wrong[] = {
      [&] { Channel(region.base, 2, 2, 4096, alive); },     [&] { Channel(region.base, -1, 2, 4096, alive); },
      [&] { Channel(region.base, 0, 0, 4096, alive); },
      [&] { Channel(region.base, 0, kMaxWorld + 1, 4096, alive); },
      [&] { Channel(region.base, 0, 2, 100, alive); },      [&] { Channel(region.base, 0, 2, 0, alive); },
  };
  for (const auto& make : wrong) {
    try {
      make();
    } catch (const std::invalid_argument&) {
      continue;
    }
    fail("a channel was created from invalid arguments");
  }
  std::printf("faults\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const std::size_t cases = argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 40;
  plain_only = mode == "plain";
  if (mode == "random" || mode == "plain") return run_random(seed, cases);
  if (mode == "many") {
    run_cases(seed, cases, 64, 4096, kSerial);
    std::printf("64 ranks, %zu cases\n", cases);
    return 0;
  }
  if (mode == "kernels") return run_kernels(seed);
  if (mode == "faults") return run_faults();
  std::fprintf(stderr, "usage: harness random|plain|many|kernels|faults [SEED [CASES]]\n");
  return 2;
}
