// The shared memory of one group: a file in /dev/shm whose name is removed before it is used.
//
// Every rank allocates its own part. So its pages come from the memory node that the rank is bound to,
// and a full /dev/shm is an error while joining, not a SIGBUS later. Every rank locks one byte of the
// file. The kernel releases the lock however the process dies, and the peers notice that. (A pid would
// still exist until the process is reaped, and could be another process's.)
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace yoke {

// /dev/shm is too small: the message says how much is free, how much is needed and how to get it.
struct SpaceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Segment {
 public:
  // Creates (rank 0) or opens /dev/shm/<name>, and returns when all ranks have mapped it and its name
  // is removed. It starts with `shared_bytes`, which rank 0 allocates; `own_bytes` for each rank follow.
  // All bytes are zero. Throws std::invalid_argument, std::runtime_error, SpaceError, PeerError.
  Segment(std::string name, int rank, int world, std::size_t shared_bytes, std::size_t own_bytes, double timeout_s);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  std::byte* base() const;
  bool is_alive(int rank) const;
  // False in a forked child, which has neither the mapping nor the locks.
  bool is_mine() const;

 private:
  void create();
  void open_existing(double deadline);
  bool try_open(std::string& obstacle);
  void map();
  void join(double deadline);
  void release();
  void lock_own();
  bool is_locked(int rank) const;
  std::string path() const { return "/dev/shm/" + name_; }

  std::string name_;
  int rank_;
  int world_;
  std::size_t shared_bytes_;
  std::size_t own_bytes_;
  std::size_t total_bytes_;
  double timeout_s_;
  int fd_ = -1;
  std::byte* mapping_ = nullptr;
  bool owns_name_ = false;
  int generation_;  // the number of forks before this was constructed
};

}  // namespace yoke
