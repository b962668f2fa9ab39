// One shared-memory group: the segment, the step protocol and the waiting. No torch in here, so that
// the protocol can be tested with plain threads or processes.
//
// What a step is. Every collective is a sequence of steps, and every rank takes part in every step:
//   1. copy my contribution into my buffer number (step & 1), describe it, publish my step number
//      (store-release);
//   2. wait until every peer has published the same step number (load-acquire);
//   3. read the peers' buffers straight into the output.
// Two buffers are enough and one wait per step is enough: a rank overwrites its buffer of step k in
// step k+2, which it reaches only after it saw every peer publish k+1, and a peer publishes k+1 only
// after it has finished reading step k.
//
// What is not in here: several algorithms by size, several threads of one rank, several nodes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace yoke {

constexpr std::size_t kLine = 128;  // two cache lines: the adjacent-line prefetcher pairs them

struct PeerTimeout : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What a rank says of its contribution to a step; peers compare it with their own.
struct StepDescription {
  std::uint32_t op;
  std::uint32_t dtype;
  std::uint64_t bytes;
};

// One rank's control block. `step` is written by its owner alone and is also the futex word.
struct alignas(kLine) Control {
  std::atomic<std::uint32_t> step;
  std::atomic<std::uint32_t> sleepers;  // peers that sleep on `step`
  std::atomic<std::int32_t> pid;        // 0 until the rank has attached
  StepDescription description[2];       // by step parity: a peer may be one step ahead of its reader
};

struct alignas(kLine) Header {
  std::atomic<std::uint64_t> magic;  // stored last: the segment is ready to be joined
  std::uint32_t world;
  std::uint64_t slot_bytes;
  std::atomic<std::uint32_t> attached;
};

class ShmGroup {
 public:
  // Creates (rank 0) or opens the segment /dev/shm/<name>, and returns when all ranks have mapped it
  // and its name is gone. Throws std::invalid_argument, std::runtime_error, PeerTimeout.
  ShmGroup(std::string name, int rank, int world, std::size_t slot_bytes, double timeout_s);
  ~ShmGroup();
  ShmGroup(const ShmGroup&) = delete;
  ShmGroup& operator=(const ShmGroup&) = delete;

  int rank() const { return rank_; }
  int world() const { return world_; }
  std::size_t slot_bytes() const { return slot_bytes_; }
  void set_timeout(double seconds) { timeout_s_ = seconds; }

  // Runs one step: contributes `mine_bytes` (at most slot_bytes) from `mine`, waits for every peer and
  // returns their buffers in rank order. The caller reads them before its next step, not after.
  // `description` must be the same on every rank. Throws PeerTimeout, std::runtime_error.
  const std::byte* const* step(const char* op_name, StepDescription description, const void* mine,
                               std::size_t mine_bytes);

 private:
  Control& control(int rank) const;
  std::byte* slot(int rank, std::uint32_t step) const;
  void create();
  void open_existing();
  void map(int fd);
  void join();
  void await_step(int peer, std::uint32_t step, const char* op_name);
  std::string path() const { return "/dev/shm/" + name_; }

  std::string name_;
  int rank_;
  int world_;
  std::size_t slot_bytes_;
  double timeout_s_;
  std::size_t data_offset_ = 0;
  std::size_t total_bytes_ = 0;
  std::byte* base_ = nullptr;
  bool owns_name_ = false;
  std::uint32_t step_ = 0;
  std::vector<const std::byte*> buffers_;
};

}  // namespace yoke
