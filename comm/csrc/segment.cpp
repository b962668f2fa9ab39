#include "segment.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <sstream>

#include "channel.h"

namespace yoke {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::uint64_t kMagic = 0x59'4f'4b'45'53'48'4d'32;  // "YOKESHM2": the layout of this file

// The first page. The group's own memory follows.
struct Header {
  std::atomic<std::uint64_t> magic;  // stored last; the segment can be joined from then on
  std::uint64_t world;
  std::uint64_t total_bytes;
  std::atomic<std::uint32_t> attached;
  std::atomic<std::uint8_t> has_joined[kMaxWorld];
};
static_assert(sizeof(Header) <= kPage);

std::atomic<int> fork_generation{0};

void count_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { ++fork_generation; });
  (void)registered;
}

double now() {
  timespec t{};
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

void sleep_ms(long ms) {
  const timespec t{0, ms * 1'000'000};
  nanosleep(&t, nullptr);
}

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

Header* header_of(std::byte* mapping) { return reinterpret_cast<Header*>(mapping); }

}  // namespace

Segment::Segment(std::string name, int rank, int world, std::size_t shared_bytes, std::size_t own_bytes,
                 double timeout_s)
    : name_(std::move(name)),
      rank_(rank),
      world_(world),
      shared_bytes_(kPage + shared_bytes),
      own_bytes_(own_bytes),
      total_bytes_(shared_bytes_ + own_bytes * static_cast<std::size_t>(world)),
      timeout_s_(timeout_s) {
  if (name_.empty() || name_.find('/') != std::string::npos) {
    throw std::invalid_argument("segment name '" + name_ + "': must be a file name without '/'");
  }
  count_forks();
  generation_ = fork_generation.load();
  const double deadline = now() + timeout_s;
  try {
    if (rank_ == 0) {
      create();
    } else {
      open_existing(deadline);
    }
    join(deadline);
  } catch (...) {
    release();
    throw;
  }
}

Segment::~Segment() { release(); }

void Segment::release() {
  if (owns_name_) unlink(path().c_str());
  owns_name_ = false;
  if (mapping_ != nullptr && is_mine()) munmap(mapping_, total_bytes_);
  mapping_ = nullptr;
  if (fd_ >= 0) close(fd_);  // this also releases the process's locks
  fd_ = -1;
}

std::byte* Segment::base() const { return mapping_ + kPage; }

bool Segment::is_mine() const { return generation_ == fork_generation.load(std::memory_order_relaxed); }

bool Segment::is_alive(int rank) const { return is_locked(rank); }

void Segment::lock_own() {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank_;
  lock.l_len = 1;
  if (fcntl(fd_, F_SETLK, &lock) != 0) fail("rank " + std::to_string(rank_) + " cannot lock its byte of " + path());
}

bool Segment::is_locked(int rank) const {
  struct flock lock {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = rank;
  lock.l_len = 1;
  return fcntl(fd_, F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

void Segment::create() {
  struct statvfs space {};
  if (statvfs("/dev/shm", &space) != 0) fail("there is no /dev/shm (mount a tmpfs there, or use gloo)");
  const auto free_bytes = static_cast<std::size_t>(space.f_bavail) * space.f_frsize;
  if (free_bytes < total_bytes_) {
    std::ostringstream message;
    message << "/dev/shm has " << free_bytes / 1024 << " KiB free, and " << world_ << " ranks need "
            << total_bytes_ / 1024 << " KiB: free some, or give the container more (docker run --shm-size=1g)";
    throw SpaceError(message.str());
  }
  const int flags = O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC | O_NOFOLLOW;
  fd_ = open(path().c_str(), flags, 0600);
  if (fd_ < 0 && errno == EEXIST) {
    // If nobody holds rank 0's lock, the file is left over from a run that was killed while joining.
    fd_ = open(path().c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd_ >= 0 && is_locked(0)) {
      throw std::runtime_error(path() + " is in use: another run has the same session token");
    }
    if (fd_ >= 0) close(fd_);
    unlink(path().c_str());
    fd_ = open(path().c_str(), flags, 0600);
  }
  if (fd_ < 0) fail("cannot create " + path());
  owns_name_ = true;
  lock_own();  // before it has a size, so that an unlocked file has no owner
  // 0600 whatever the umask is: the segment holds the model's activations.
  if (fchmod(fd_, 0600) != 0 || ftruncate(fd_, static_cast<off_t>(total_bytes_)) != 0) fail("cannot size " + path());
  map();
  Header* header = header_of(mapping_);
  header->world = static_cast<std::uint64_t>(world_);
  header->total_bytes = total_bytes_;
  header->magic.store(kMagic, std::memory_order_release);
}

// Opens the file if rank 0 has prepared it; else returns false and describes the reason in `obstacle`. None
// of these reasons is final, as rank 0 may be about to replace the file: one whose rank 0 is gone, a link,
// another user's file.
bool Segment::try_open(std::string& obstacle) {
  obstacle.clear();
  fd_ = open(path().c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW);
  if (fd_ < 0) {
    if (errno != ENOENT) obstacle = std::string("it cannot be opened: ") + std::strerror(errno);
    return false;
  }
  struct stat info {};
  if (fstat(fd_, &info) != 0) fail("cannot stat " + path());
  const bool is_foreign = info.st_uid != geteuid();
  if (is_foreign) obstacle = "it belongs to user " + std::to_string(info.st_uid) + ", not to this one";
  if (is_foreign || info.st_size == 0 || !is_locked(0)) {
    close(fd_);
    fd_ = -1;
    return false;
  }
  if (static_cast<std::size_t>(info.st_size) != total_bytes_) {
    throw std::runtime_error(path() + " has " + std::to_string(info.st_size) + " bytes where rank " +
                             std::to_string(rank_) + " expects " + std::to_string(total_bytes_) +
                             ": the ranks disagree on the world size or the buffer size");
  }
  return true;
}

void Segment::open_existing(double deadline) {
  std::string obstacle;
  const auto late = [&](const char* what) {
    if (now() > deadline) {
      std::ostringstream message;
      message << "rank " << rank_ << " waited " << timeout_s_ << " s for rank 0 to " << what << ' ' << path();
      if (!obstacle.empty()) message << " (" << obstacle << ')';
      throw PeerError(message.str());
    }
    sleep_ms(1);
  };
  while (!try_open(obstacle)) late("create");
  lock_own();
  map();
  Header* header = header_of(mapping_);
  std::uint64_t magic = 0;
  while ((magic = header->magic.load(std::memory_order_acquire)) == 0) late("prepare");
  if (magic != kMagic || header->world != static_cast<std::uint64_t>(world_) || header->total_bytes != total_bytes_) {
    std::ostringstream message;
    message << path() << " has a header that is not Yoke's for " << world_ << " ranks (magic " << std::hex << magic
            << std::dec << ", " << header->world << " ranks, " << header->total_bytes << " bytes)";
    throw std::runtime_error(message.str());
  }
}

void Segment::map() {
  const auto reserve = [&](std::size_t offset, std::size_t bytes) {
    const int error = posix_fallocate(fd_, static_cast<off_t>(offset), static_cast<off_t>(bytes));
    if (error == ENOSPC) {
      throw SpaceError("cannot reserve " + std::to_string(bytes / 1024) +
                       " KiB of /dev/shm: free some, or give the container more (docker run --shm-size=1g)");
    }
    if (error != 0) {
      errno = error;
      fail("cannot reserve " + std::to_string(bytes) + " bytes of /dev/shm");
    }
  };
  if (rank_ == 0) reserve(0, shared_bytes_);
  const std::size_t own_offset = shared_bytes_ + own_bytes_ * static_cast<std::size_t>(rank_);
  reserve(own_offset, own_bytes_);
  void* address = mmap(nullptr, total_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
  if (address == MAP_FAILED) fail("cannot map " + path());
  mapping_ = static_cast<std::byte*>(address);
  madvise(mapping_, total_bytes_, MADV_DONTFORK);  // a forked child must not write into a live group
  std::memset(mapping_ + own_offset, 0, own_bytes_);
}

void Segment::join(double deadline) {
  Header* header = header_of(mapping_);
  header->has_joined[rank_].store(1, std::memory_order_relaxed);
  header->attached.fetch_add(1, std::memory_order_acq_rel);
  while (header->attached.load(std::memory_order_acquire) < static_cast<std::uint32_t>(world_)) {
    if (now() > deadline) {
      std::ostringstream message;
      message << "rank " << rank_ << " waited " << timeout_s_ << " s for";
      for (int peer = 0; peer < world_; ++peer) {
        if (header->has_joined[peer].load(std::memory_order_relaxed) == 0) message << " rank " << peer;
      }
      message << " to join the group " << name_;
      throw PeerError(message.str());
    }
    sleep_ms(1);
  }
  if (header->attached.load(std::memory_order_relaxed) > static_cast<std::uint32_t>(world_)) {
    throw std::runtime_error(path() + " has a header that another process has overwritten");
  }
  // All ranks have mapped it. Each rank removes the name here, so that no rank returns while the name exists.
  // All but the first find nothing to remove.
  unlink(path().c_str());
  owns_name_ = false;
}

}  // namespace yoke
