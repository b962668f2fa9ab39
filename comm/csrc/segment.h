// The shared memory of one group: a file in /dev/shm whose name is gone before anybody uses it.
//
// Every rank allocates its own part, so its pages come from the memory node that the rank is bound to
// and a full /dev/shm is an error while joining, not a SIGBUS later. Every rank holds a lock on its
// byte of the file; the kernel drops it when the process dies, however it dies, and the peers see that
// (a pid would still be there while nobody has reaped it, and may be another process's).
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>

namespace yoke {

// /dev/shm is too small: the message says what is there, what is needed and how to get it.
struct SpaceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Segment {
 public:
  // Creates (rank 0) or opens /dev/shm/<name>, and returns when all ranks have mapped it and its name
  // is gone. `shared_bytes` at the start are rank 0's to allocate, then `own_bytes` for each rank. All
  // of it reads as zero. Throws std::invalid_argument, std::runtime_error, SpaceError, PeerError.
  Segment(std::string name, int rank, int world, std::size_t shared_bytes, std::size_t own_bytes, double timeout_s);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  std::byte* base() const;
  bool is_alive(int rank) const;
  // A child of this process has neither the mapping nor the locks.
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
  int generation_;  // of forks, when this was made
};

}  // namespace yoke
