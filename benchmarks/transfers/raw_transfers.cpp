// SPDX-License-Identifier: Apache-2.0
// The limit: equal transfers of one file at a fixed depth, by io_uring alone and by plain threads.
// Shares nothing with the package. Built by raw.py when a benchmark needs it.
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

struct Work {
  int descriptor;
  std::uint8_t* memory;
  const std::uint64_t* offsets;
  std::uint64_t count;
  std::uint64_t nbytes;
  bool is_write;

  [[nodiscard]] std::uint8_t* place(std::uint64_t index) const { return memory + index * nbytes; }
};

// A ring with its three maps; never reaches a user of the package, so it keeps no promise but
// speed.
class Ring {
 public:
  explicit Ring(unsigned depth) {
    io_uring_params params{};
    params.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
    descriptor_ = static_cast<int>(::syscall(__NR_io_uring_setup, depth, &params));
    if (descriptor_ < 0) {
      return;
    }
    ring_nbytes_ = std::max<std::size_t>(params.sq_off.array + params.sq_entries * 4,
                                         params.cq_off.cqes + params.cq_entries * 16);
    sqes_nbytes_ = params.sq_entries * sizeof(io_uring_sqe);
    constexpr int kAccess = PROT_READ | PROT_WRITE;
    ring_ = static_cast<std::uint8_t*>(
        ::mmap(nullptr, ring_nbytes_, kAccess, MAP_SHARED | MAP_POPULATE, descriptor_, 0));
    sqes_ = static_cast<io_uring_sqe*>(::mmap(
        nullptr, sqes_nbytes_, kAccess, MAP_SHARED | MAP_POPULATE, descriptor_, IORING_OFF_SQES));
    if (ring_ == MAP_FAILED || static_cast<void*>(sqes_) == MAP_FAILED) {
      ::close(descriptor_);
      descriptor_ = -1;
      return;
    }
    offsets_ = params;
  }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  ~Ring() {
    if (descriptor_ >= 0) {
      ::munmap(sqes_, sqes_nbytes_);
      ::munmap(ring_, ring_nbytes_);
      ::close(descriptor_);
    }
  }

  [[nodiscard]] bool is_open() const { return descriptor_ >= 0; }

  int run(const Work& work, unsigned depth) {
    std::uint64_t begun = 0;
    std::uint64_t ended = 0;
    while (ended < work.count) {
      unsigned fresh = 0;
      while (begun < work.count && begun - ended < depth) {
        push(work, begun++);
        ++fresh;
      }
      if (::syscall(__NR_io_uring_enter, descriptor_, fresh, 1, IORING_ENTER_GETEVENTS, nullptr,
                    0) < 0) {
        return -errno;
      }
      std::uint32_t head = *at(offsets_.cq_off.head);
      const std::uint32_t tail = __atomic_load_n(at(offsets_.cq_off.tail), __ATOMIC_ACQUIRE);
      const auto* completions = reinterpret_cast<const io_uring_cqe*>(ring_ + offsets_.cq_off.cqes);
      for (; head != tail; ++head, ++ended) {
        const int result = completions[head & *at(offsets_.cq_off.ring_mask)].res;
        if (result != static_cast<int>(work.nbytes)) {
          return result < 0 ? result : -EIO;
        }
      }
      __atomic_store_n(at(offsets_.cq_off.head), head, __ATOMIC_RELEASE);
    }
    return 0;
  }

 private:
  [[nodiscard]] std::uint32_t* at(std::uint32_t offset) const {
    return reinterpret_cast<std::uint32_t*>(ring_ + offset);
  }

  void push(const Work& work, std::uint64_t index) {
    const std::uint32_t tail = *at(offsets_.sq_off.tail);
    const std::uint32_t slot = tail & *at(offsets_.sq_off.ring_mask);
    io_uring_sqe& entry = sqes_[slot];
    std::memset(&entry, 0, sizeof(entry));
    entry.opcode = work.is_write ? IORING_OP_WRITE : IORING_OP_READ;
    entry.fd = work.descriptor;
    entry.off = work.offsets[index];
    entry.addr = reinterpret_cast<std::uint64_t>(work.place(index));
    entry.len = static_cast<std::uint32_t>(work.nbytes);
    at(offsets_.sq_off.array)[slot] = slot;
    __atomic_store_n(at(offsets_.sq_off.tail), tail + 1, __ATOMIC_RELEASE);
  }

  int descriptor_ = -1;
  std::uint8_t* ring_ = nullptr;
  io_uring_sqe* sqes_ = nullptr;
  std::size_t ring_nbytes_ = 0;
  std::size_t sqes_nbytes_ = 0;
  io_uring_params offsets_{};
};

int run_threads(const Work& work, unsigned depth) {
  std::atomic<std::uint64_t> next{0};
  std::atomic<int> failure{0};
  const auto transfer = [&] {
    for (std::uint64_t index = next++; index < work.count && failure == 0; index = next++) {
      const auto offset = static_cast<off_t>(work.offsets[index]);
      const ssize_t moved = work.is_write
                                ? ::pwrite(work.descriptor, work.place(index), work.nbytes, offset)
                                : ::pread(work.descriptor, work.place(index), work.nbytes, offset);
      if (moved != static_cast<ssize_t>(work.nbytes)) {
        failure = moved < 0 ? -errno : -EIO;
      }
    }
  };
  std::vector<std::thread> threads;
  for (unsigned index = 1; index < depth; ++index) {
    threads.emplace_back(transfer);
  }
  transfer();
  for (std::thread& thread : threads) {
    thread.join();
  }
  return failure;
}

}  // namespace

/// Moves `count` pieces of `nbytes`, piece i between `offsets[i]` of the file and `memory` + i *
/// nbytes, `depth` at a time. Returns 0 or a negative errno; -ENOSYS when there is no io_uring.
extern "C" int raw_transfer(int descriptor,
                            std::uint8_t* memory,
                            const std::uint64_t* offsets,
                            std::uint64_t count,
                            std::uint64_t nbytes,
                            unsigned depth,
                            int is_write,
                            int is_uring) {
  const Work work{descriptor, memory, offsets, count, nbytes, is_write != 0};
  if (is_uring == 0) {
    return run_threads(work, depth);
  }
  Ring ring(depth);
  return ring.is_open() ? ring.run(work, depth) : -ENOSYS;
}
