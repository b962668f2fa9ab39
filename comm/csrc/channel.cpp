#include "channel.h"

#include <linux/futex.h>
#include <sched.h>  // sched_getcpu
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <sstream>

namespace yoke {
namespace {

constexpr std::size_t kPage = 4096;
constexpr int kSpins = 16;               // pauses between two reads of the clock
constexpr double kAwakeSeconds = 2e-4;   // spin time before sleeping: ranks on separate cores are closer
constexpr double kSleepSeconds = 0.05;   // the most that a lost wake-up could cost
constexpr double kCheckSeconds = 0.2;    // how often a waiting rank checks whether its peer is alive

double now() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // `yield` is a no-op on most Arm server cores
#endif
}

std::size_t round_up(std::size_t n, std::size_t unit) { return (n + unit - 1) / unit * unit; }

// Whether `seen` is at or past `wanted`; the counters wrap after 2^32 steps.
bool reached(std::uint32_t seen, std::uint32_t wanted) {
  return static_cast<std::int32_t>(seen - wanted) >= 0;
}

static_assert(sizeof(std::atomic<std::uint32_t>) == 4 && std::atomic<std::uint32_t>::is_always_lock_free);

void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t seen, double seconds) {
  timespec t{0, static_cast<long>(seconds * 1e9)};
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT, seen, &t, nullptr, 0);
}

void futex_wake_all(std::atomic<std::uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE, 0x7fffffff, nullptr, nullptr, 0);
}

bool equal(const StepDescription& a, const StepDescription& b) {
  return a.op == b.op && a.dtype == b.dtype && a.size == b.size && a.argument == b.argument;
}

}  // namespace

const char* name_of(std::uint32_t op) {
  switch (op) {
    case kAllReduce:
      return "all_reduce";
    case kAllGather:
      return "all_gather";
    case kBroadcast:
      return "broadcast";
    case kBarrier:
      return "barrier";
    case kReduceScatter:
      return "reduce_scatter";
    case kAddNorm:
      return "all_reduce_add_rms_norm";
    case kCandidates:
      return "argmax or topk";
  }
  return "an unknown operator";
}

std::size_t Channel::control_bytes(int world) {
  return round_up(sizeof(Control) * static_cast<std::size_t>(world), kPage);
}

std::size_t Channel::total_bytes(int world, std::size_t slot_bytes) {
  return control_bytes(world) + 2 * slot_bytes * static_cast<std::size_t>(world);
}

Channel::Channel(std::byte* base, int rank, int world, std::size_t slot_bytes, std::function<bool(int)> is_alive)
    : base_(base),
      rank_(rank),
      world_(world),
      slot_bytes_(slot_bytes),
      data_offset_(control_bytes(world)),
      is_alive_(std::move(is_alive)) {
  if (world < 1 || world > kMaxWorld || rank < 0 || rank >= world) {
    throw std::invalid_argument("rank " + std::to_string(rank) + " of " + std::to_string(world) +
                                ": the rank must be within 0..world-1, and the world within 1.." +
                                std::to_string(kMaxWorld));
  }
  if (slot_bytes == 0 || slot_bytes % kPage != 0) {
    throw std::invalid_argument("buffers of " + std::to_string(slot_bytes) + " bytes: must be whole pages");
  }
}

std::byte* Channel::begin() {
  if (!broken_.empty()) throw PeerError("this group failed earlier and cannot be used: " + broken_);
  return slot(rank_, step_ + 1);
}

void Channel::commit(const char* op_name, const StepDescription& description) {
  const std::uint32_t step = ++step_;
  Control& own = control(rank_);
  own.description[step & 1] = description;
  own.core.store(sched_getcpu() + 1, std::memory_order_relaxed);
  own.step.store(step, std::memory_order_seq_cst);
  if (own.sleepers.load(std::memory_order_seq_cst) != 0) futex_wake_all(own.step);
  for (int peer = 0; peer < world_; ++peer) {
    if (peer == rank_) continue;
    if (!reached(control(peer).step.load(std::memory_order_acquire), step)) await(peer, op_name);
    if (!equal(control(peer).description[step & 1], description)) fail_mismatch(peer, op_name, description);
  }
}

void Channel::await(int peer, const char* op_name) {
  Control& theirs = control(peer);
  const double start = now();
  double next_check = start + kCheckSeconds;
  for (double time = start;; time = now()) {
    std::uint32_t seen = theirs.step.load(std::memory_order_acquire);
    if (reached(seen, step_)) return;
    if (time > next_check) {
      next_check = time + kCheckSeconds;
      // The peer may have published and then died: check its step again once it is known to be dead.
      if (!is_alive_(peer) && !reached(theirs.step.load(std::memory_order_acquire), step_)) {
        fail_peer(peer, op_name, ", which has died", "");
      }
    }
    if (time - start > timeout_s_) {
      std::ostringstream how_long;
      how_long << timeout_s_ << " s ";
      fail_peer(peer, op_name, ", which is at step " + std::to_string(seen), how_long.str());
    }
    if (time < start + kAwakeSeconds && !shares_core(peer)) {
      for (int spin = 0; spin < kSpins; ++spin) {
        pause_cpu();
        if (reached(theirs.step.load(std::memory_order_acquire), step_)) return;
      }
      continue;
    }
    // Announce the sleep, then check again. The publisher stores its step and then reads `sleepers`; all
    // these accesses are sequentially consistent, so one of the two sees the other.
    theirs.sleepers.fetch_add(1, std::memory_order_seq_cst);
    seen = theirs.step.load(std::memory_order_seq_cst);
    if (!reached(seen, step_)) futex_wait(theirs.step, seen, kSleepSeconds);
    theirs.sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }
}

bool Channel::shares_core(int peer) const {
  return control(peer).core.load(std::memory_order_relaxed) == sched_getcpu() + 1;
}

void Channel::fail_peer(int peer, const char* op_name, const std::string& what, const std::string& how_long) {
  std::ostringstream message;
  message << op_name << " (step " << step_ << "): rank " << rank_ << " waited " << how_long << "for rank " << peer
          << " (pid " << control(peer).pid.load(std::memory_order_relaxed) << ")" << what;
  broken_ = message.str();
  throw PeerError(broken_);
}

void Channel::fail_mismatch(int peer, const char* op_name, const StepDescription& mine) {
  const StepDescription& theirs = control(peer).description[step_ & 1];
  const auto describe = [](std::ostringstream& out, const StepDescription& d) {
    out << name_of(d.op) << " with " << d.size << " elements of dtype " << d.dtype << " (" << d.argument << ')';
  };
  std::ostringstream message;
  message << op_name << " (step " << step_ << "): rank " << rank_ << " calls ";
  describe(message, mine);
  message << ", rank " << peer << " calls ";
  describe(message, theirs);
  message << ": the ranks must call the same collectives in the same order";
  broken_ = message.str();
  throw std::runtime_error(broken_);
}

}  // namespace yoke
