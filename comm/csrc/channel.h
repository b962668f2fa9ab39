// The step protocol of one shared-memory group, on memory that the caller has mapped. It uses no torch,
// files or processes: ranks may be threads, and the sanitizers run them as such.
//
// What a step is. Every collective is a sequence of steps, and every rank takes part in every step:
//   1. begin(): fill my buffer number (step & 1);
//   2. commit(): describe it, publish my step number (store-release), and wait until every peer has
//      published the same number (load-acquire);
//   3. read the peers' buffers (`slot_of`) until the next commit, and not after.
// Two buffers and one wait per step are enough: a rank overwrites its buffer of step k in step k+2,
// which it begins only after it saw every peer publish k+1, and a peer publishes k+1 only after it has
// finished reading step k.
//
// Waiting: spin with pauses for some 200 us, then sleep on a futex in the shared memory. If the peer last
// published on this very core, sleep at once. There is no sched_yield: where another process wants the core,
// it costs a scheduler slice at every step. Every wait has a deadline and checks whether the peer is alive.
// After any failure the group is broken for good: ranks that are out of step would read each other's old data.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace yoke {

constexpr std::size_t kLine = 128;  // two cache lines: the adjacent-line prefetcher pairs them
constexpr int kMaxWorld = 1024;

// A peer that is late or dead. The message names it by rank and pid.
struct PeerError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum Op : std::uint32_t { kAllReduce = 1, kAllGather, kBroadcast, kBarrier, kReduceScatter, kAddNorm, kCandidates };
const char* name_of(std::uint32_t op);

// A rank's description of its call in a step; peers compare it with their own.
struct StepDescription {
  std::uint32_t op;
  std::uint32_t dtype;
  std::uint64_t size;      // of the whole message
  std::uint64_t argument;  // the operator's: a root, or an algorithm
};

// One rank's control block. Only its owner writes `step`, which is also the futex word.
struct alignas(kLine) Control {
  std::atomic<std::uint32_t> step;
  std::atomic<std::uint32_t> sleepers;  // peers that sleep on `step`
  std::atomic<std::int32_t> pid;
  std::atomic<std::int32_t> core;       // cpu number + 1 where it last published; 0 before the first step
  StepDescription description[2];  // by step parity: a peer may be one step ahead of its reader
};

class Channel {
 public:
  // The bytes that a group needs. They must be zero at first and aligned to a page.
  static std::size_t control_bytes(int world);
  static std::size_t total_bytes(int world, std::size_t slot_bytes);

  // A wait calls `is_alive(peer)` from time to time. Throws std::invalid_argument.
  Channel(std::byte* base, int rank, int world, std::size_t slot_bytes, std::function<bool(int)> is_alive);

  int rank() const { return rank_; }
  int world() const { return world_; }
  std::size_t slot_bytes() const { return slot_bytes_; }
  double timeout() const { return timeout_s_; }
  void set_timeout(double seconds) { timeout_s_ = seconds; }

  // This rank's buffer for the next step, of slot_bytes(). Throws PeerError if the group is broken.
  std::byte* begin();
  // Publishes that buffer and waits for every peer. Throws PeerError for a late or dead peer, and
  // std::runtime_error if a peer calls something else; then the group is broken.
  void commit(const char* op_name, const StepDescription& description);
  // A rank's buffer of the last committed step.
  const std::byte* slot_of(int rank) const { return slot(rank, step_); }
  // A rank's two buffers. Their owner must touch them first, so that they are on its memory node.
  std::byte* buffers_of(int rank) const { return slot(rank, 0); }
  void set_pid(std::int32_t pid) { control(rank_).pid.store(pid, std::memory_order_relaxed); }

 private:
  Control& control(int rank) const { return reinterpret_cast<Control*>(base_)[rank]; }
  std::byte* slot(int rank, std::uint32_t step) const {
    return base_ + data_offset_ + (2 * static_cast<std::size_t>(rank) + (step & 1)) * slot_bytes_;
  }
  void await(int peer, const char* op_name);
  bool shares_core(int peer) const;
  [[noreturn]] void fail_peer(int peer, const char* op_name, const std::string& what, const std::string& how_long);
  [[noreturn]] void fail_mismatch(int peer, const char* op_name, const StepDescription& mine);

  std::byte* base_;
  int rank_;
  int world_;
  std::size_t slot_bytes_;
  std::size_t data_offset_;
  std::function<bool(int)> is_alive_;
  double timeout_s_ = 60.0;
  std::uint32_t step_ = 0;
  std::string broken_;
};

}  // namespace yoke
