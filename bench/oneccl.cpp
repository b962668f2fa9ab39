// Four C functions around oneCCL's C++ interface, which bench/allreduce.py calls through ctypes. Yoke
// itself does not use oneCCL: its PyTorch bindings have no release for current versions of torch.
#include <cstddef>
#include <cstring>
#include <exception>
#include <memory>
#include <oneapi/ccl.hpp>
#include <string>

namespace {
std::shared_ptr<ccl::kvs> meeting;
std::unique_ptr<ccl::communicator> communicator;
std::string failure;

template <class Body>
int guarded(const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    failure = error.what();
    return -1;
  }
}
}  // namespace

extern "C" {

const char* bench_ccl_failure() { return failure.c_str(); }

std::size_t bench_ccl_address_bytes() { return ccl::kvs::address_max_size; }

// Called on rank 0; the result is broadcast to the other ranks.
int bench_ccl_address(char* out) {
  return guarded([&] {
    ccl::init();
    meeting = ccl::create_main_kvs();
    const auto address = meeting->get_address();
    std::memcpy(out, address.data(), address.size());
  });
}

int bench_ccl_open(int rank, int size, const char* address) {
  return guarded([&] {
    if (!meeting) {
      ccl::init();
      ccl::kvs::address_type at;
      std::memcpy(at.data(), address, at.size());
      meeting = ccl::create_kvs(at);
    }
    communicator = std::make_unique<ccl::communicator>(ccl::create_communicator(size, rank, meeting));
  });
}

int bench_ccl_all_reduce(const void* in, void* out, std::size_t count, int is_bfloat16) {
  return guarded([&] {
    const auto dtype = is_bfloat16 ? ccl::datatype::bfloat16 : ccl::datatype::float32;
    ccl::allreduce(in, out, count, dtype, ccl::reduction::sum, *communicator).wait();
  });
}

}  // extern "C"
