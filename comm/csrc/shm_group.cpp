#include "shm_group.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <sstream>

namespace yoke {
namespace {

constexpr std::uint64_t kMagic = 0x59'4f'4b'45'53'48'4d'31;  // "YOKESHM1": the layout of this file
constexpr std::size_t kPage = 4096;
constexpr int kSpins = 400;            // about 20 us of pauses: longer than a step between idle cores
constexpr double kYieldSeconds = 2e-4;  // then let a rank that shares this core run; then sleep
constexpr double kSleepSeconds = 0.05;  // a lost wake-up would cost at most this

double now() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

void sleep_for(double seconds) {
  timespec t{static_cast<time_t>(seconds),
             static_cast<long>((seconds - static_cast<double>(static_cast<time_t>(seconds))) * 1e9)};
  nanosleep(&t, nullptr);
}

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // `yield` is a no-op on most Arm server cores
#endif
}

std::size_t round_up(std::size_t n, std::size_t unit) { return (n + unit - 1) / unit * unit; }

// True when `seen` is at or past `wanted`; the counters wrap after 2^32 steps.
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

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error(what + ": " + std::strerror(errno));
}

}  // namespace

Control& ShmGroup::control(int rank) const {
  return reinterpret_cast<Control*>(base_ + sizeof(Header))[rank];
}

std::byte* ShmGroup::slot(int rank, std::uint32_t step) const {
  return base_ + data_offset_ + (2 * static_cast<std::size_t>(rank) + (step & 1)) * slot_bytes_;
}

ShmGroup::ShmGroup(std::string name, int rank, int world, std::size_t slot_bytes, double timeout_s)
    : name_(std::move(name)), rank_(rank), world_(world), timeout_s_(timeout_s) {
  if (world < 1 || world > 1024 || rank < 0 || rank >= world) {
    throw std::invalid_argument("rank " + std::to_string(rank) + " of " + std::to_string(world) +
                                ": the rank must be within 0..world-1, and the world within 1..1024");
  }
  if (name_.empty() || name_.find('/') != std::string::npos) {
    throw std::invalid_argument("segment name '" + name_ + "': must be a file name without '/'");
  }
  slot_bytes_ = round_up(std::max<std::size_t>(slot_bytes, 1), kPage);
  data_offset_ = round_up(sizeof(Header) + sizeof(Control) * static_cast<std::size_t>(world), kPage);
  total_bytes_ = data_offset_ + 2 * slot_bytes_ * static_cast<std::size_t>(world);
  buffers_.resize(static_cast<std::size_t>(world));
  try {
    if (rank_ == 0) {
      create();
    } else {
      open_existing();
    }
    join();
  } catch (...) {
    if (owns_name_) unlink(path().c_str());
    if (base_ != nullptr) munmap(base_, total_bytes_);
    throw;
  }
}

ShmGroup::~ShmGroup() {
  if (base_ != nullptr) munmap(base_, total_bytes_);
}

void ShmGroup::create() {
  struct statvfs space {};
  if (statvfs("/dev/shm", &space) == 0) {
    const auto free_bytes = static_cast<std::size_t>(space.f_bavail) * space.f_frsize;
    if (free_bytes < total_bytes_) {
      std::ostringstream message;
      message << "/dev/shm has " << free_bytes / 1024 << " KiB free, and " << world_ << " ranks need "
              << total_bytes_ / 1024 << " KiB: free some, or give the container more (docker: --shm-size)";
      throw std::runtime_error(message.str());
    }
  }
  const int fd = open(path().c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd < 0) fail("cannot create " + path());
  owns_name_ = true;
  // 0600 whatever the umask: the segment carries the model's activations.
  if (fchmod(fd, 0600) != 0 || ftruncate(fd, static_cast<off_t>(total_bytes_)) != 0) {
    const int error = errno;
    close(fd);
    errno = error;
    fail("cannot size " + path());
  }
  map(fd);
  auto* header = reinterpret_cast<Header*>(base_);
  header->world = static_cast<std::uint32_t>(world_);
  header->slot_bytes = slot_bytes_;
  header->magic.store(kMagic, std::memory_order_release);
}

void ShmGroup::open_existing() {
  const double deadline = now() + timeout_s_;
  const auto late = [&](const char* what) {
    if (now() > deadline) {
      std::ostringstream message;
      message << "rank " << rank_ << " waited " << timeout_s_ << " s for rank 0 to " << what << ' ' << path();
      throw PeerTimeout(message.str());
    }
    sleep_for(1e-3);
  };
  int fd = -1;
  while ((fd = open(path().c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW)) < 0) {
    if (errno != ENOENT) fail("cannot open " + path());
    late("create");
  }
  struct stat info {};
  do {
    if (fstat(fd, &info) != 0) {
      close(fd);
      fail("cannot stat " + path());
    }
    if (info.st_uid != geteuid()) {
      close(fd);
      throw std::runtime_error(path() + " belongs to user " + std::to_string(info.st_uid) + ", not to this one");
    }
    if (info.st_size == 0) late("size");
  } while (info.st_size == 0);
  if (static_cast<std::size_t>(info.st_size) != total_bytes_) {
    close(fd);
    throw std::runtime_error(path() + " has " + std::to_string(info.st_size) + " bytes where rank " +
                             std::to_string(rank_) + " expects " + std::to_string(total_bytes_) +
                             ": the ranks disagree on the world size or the buffer size");
  }
  map(fd);
  auto* header = reinterpret_cast<Header*>(base_);
  while (header->magic.load(std::memory_order_acquire) != kMagic) late("prepare");
  if (header->world != static_cast<std::uint32_t>(world_) || header->slot_bytes != slot_bytes_) {
    throw std::runtime_error(path() + " was made for " + std::to_string(header->world) + " ranks, not for " +
                             std::to_string(world_));
  }
}

// Maps the segment and reserves this rank's own pages. The owner of a buffer allocates it, so that its
// pages come from the memory node the rank is bound to, and so that a full /dev/shm is an error here
// and not a SIGBUS in the middle of a collective.
void ShmGroup::map(int fd) {
  void* address = mmap(nullptr, total_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (address == MAP_FAILED) {
    const int error = errno;
    close(fd);
    errno = error;
    fail("cannot map " + path());
  }
  base_ = static_cast<std::byte*>(address);
  madvise(base_, total_bytes_, MADV_DONTFORK);  // a forked child must not write into a live group
  const auto reserve = [&](std::size_t offset, std::size_t bytes) {
    return posix_fallocate(fd, static_cast<off_t>(offset), static_cast<off_t>(bytes));
  };
  int error = rank_ == 0 ? reserve(0, data_offset_) : 0;
  if (error == 0) error = reserve(data_offset_ + 2 * slot_bytes_ * static_cast<std::size_t>(rank_), 2 * slot_bytes_);
  close(fd);
  if (error != 0) {
    errno = error;
    fail("cannot reserve " + std::to_string(2 * slot_bytes_) + " bytes of /dev/shm (docker: --shm-size)");
  }
  std::memset(slot(rank_, 0), 0, 2 * slot_bytes_);
}

void ShmGroup::join() {
  auto* header = reinterpret_cast<Header*>(base_);
  control(rank_).pid.store(getpid(), std::memory_order_relaxed);
  header->attached.fetch_add(1, std::memory_order_acq_rel);
  const double deadline = now() + timeout_s_;
  while (header->attached.load(std::memory_order_acquire) < static_cast<std::uint32_t>(world_)) {
    if (now() > deadline) {
      std::ostringstream message;
      message << "rank " << rank_ << " waited " << timeout_s_ << " s for";
      for (int peer = 0; peer < world_; ++peer) {
        if (control(peer).pid.load(std::memory_order_relaxed) == 0) message << " rank " << peer;
      }
      message << " to join the group " << name_;
      throw PeerTimeout(message.str());
    }
    sleep_for(5e-4);
  }
  // All have mapped it. Whoever sees that first removes the name, so that no rank returns before it
  // is gone; the others find nothing to remove.
  unlink(path().c_str());
  owns_name_ = false;
}

void ShmGroup::await_step(int peer, std::uint32_t wanted, const char* op_name) {
  Control& theirs = control(peer);
  for (int spin = 0; spin < kSpins; ++spin) {
    if (reached(theirs.step.load(std::memory_order_acquire), wanted)) return;
    pause_cpu();
  }
  const double start = now();
  const double yield_until = start + kYieldSeconds;
  for (double time = start;; time = now()) {
    std::uint32_t seen = theirs.step.load(std::memory_order_acquire);
    if (reached(seen, wanted)) return;
    if (time - start > timeout_s_) {
      std::ostringstream message;
      message << op_name << " (step " << wanted << "): rank " << rank_ << " waited " << timeout_s_
              << " s for rank " << peer << " (pid " << theirs.pid.load(std::memory_order_relaxed)
              << "), which is at step " << seen;
      throw PeerTimeout(message.str());
    }
    if (time < yield_until) {
      sched_yield();
      continue;
    }
    // Announce the sleep, then look again: the publisher stores its step and then reads `sleepers`,
    // both sequentially consistent, so one of the two sees the other.
    theirs.sleepers.fetch_add(1, std::memory_order_seq_cst);
    seen = theirs.step.load(std::memory_order_seq_cst);
    if (!reached(seen, wanted)) futex_wait(theirs.step, seen, kSleepSeconds);
    theirs.sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }
}

const std::byte* const* ShmGroup::step(const char* op_name, StepDescription description, const void* mine,
                                       std::size_t mine_bytes) {
  const std::uint32_t step = ++step_;
  Control& own = control(rank_);
  if (mine_bytes != 0) std::memcpy(slot(rank_, step), mine, mine_bytes);
  own.description[step & 1] = description;
  own.step.store(step, std::memory_order_seq_cst);
  if (own.sleepers.load(std::memory_order_seq_cst) != 0) futex_wake_all(own.step);
  for (int peer = 0; peer < world_; ++peer) {
    buffers_[static_cast<std::size_t>(peer)] = slot(peer, step);
    if (peer == rank_) continue;
    await_step(peer, step, op_name);
    const StepDescription& theirs = control(peer).description[step & 1];
    if (theirs.op != description.op || theirs.dtype != description.dtype || theirs.bytes != description.bytes) {
      std::ostringstream message;
      message << op_name << " (step " << step << "): rank " << rank_ << " is in operator " << description.op
              << " with " << description.bytes << " bytes of dtype " << description.dtype << ", rank " << peer
              << " in operator " << theirs.op << " with " << theirs.bytes << " bytes of dtype " << theirs.dtype
              << ": the ranks must call the same collectives in the same order";
      throw std::runtime_error(message.str());
    }
  }
  return buffers_.data();
}

}  // namespace yoke
