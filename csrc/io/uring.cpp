// SPDX-License-Identifier: Apache-2.0
// Set-up, the two rings' arithmetic, and the one call that crosses into the kernel.
#include "io/uring.hpp"

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "core/error.hpp"

// Kernels know these flags or refuse them; headers of older distributions lack the names.
#ifndef IORING_SETUP_R_DISABLED
#define IORING_SETUP_R_DISABLED (1U << 6)
#endif
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif

namespace kv {
namespace {

// Of linux/io_uring.h, where older headers have an enumeration that may end before them.
constexpr unsigned kEnterWithArguments = 1U << 3;
constexpr unsigned kFeatureEnterArguments = 1U << 8;
struct EnterArguments {
  std::uint64_t signal_mask;
  std::uint32_t signal_mask_nbytes;
  std::uint32_t padding;
  std::uint64_t timeout;
};
struct KernelTimespec {
  std::int64_t seconds;
  std::int64_t nanoseconds;
};
constexpr unsigned kRegisterProbe = 8;
constexpr unsigned kRegisterEnableRings = 12;

int setup(unsigned num_entries, io_uring_params& params) {
  return static_cast<int>(::syscall(__NR_io_uring_setup, num_entries, &params));
}

[[noreturn]] void refuse_old() {
  throw IoError(located("this kernel's io_uring is older than Linux 5.6", __FILE__, __LINE__),
                ENOSYS);
}

std::uint8_t* map_shared(int descriptor, std::size_t nbytes, off_t offset) {
  void* memory = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                        descriptor, offset);
  KV_ERRNO(memory == MAP_FAILED ? -1 : 0, "map an io_uring");
  return static_cast<std::uint8_t*>(memory);
}

}  // namespace

struct Uring::Entry {
  io_uring_sqe sqe;
};

Uring::Uring(unsigned num_entries) {
  try {
    set_up(num_entries);
    check_operations();
    check_entry();
  } catch (...) {
    release();
    throw;
  }
}

Uring::~Uring() { release(); }

void Uring::set_up(unsigned num_entries) {
  // One thread submits and takes completions when it asks for them: no interrupts of other work.
  io_uring_params params{};
  params.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_R_DISABLED;
  descriptor_ = setup(num_entries, params);
  needs_enabling_ = descriptor_ >= 0;
  if (descriptor_ < 0 && errno == EINVAL) {  // before Linux 6.1
    params = io_uring_params{};
    descriptor_ = setup(num_entries, params);
  }
  KV_ERRNO(descriptor_, "set up an io_uring");
  constexpr unsigned kFeatures = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP;
  if ((params.features & kFeatures) != kFeatures) {
    refuse_old();
  }
  has_timed_waits_ = (params.features & kFeatureEnterArguments) != 0;
  ring_nbytes_ =
      std::max<std::size_t>(params.sq_off.array + params.sq_entries * sizeof(std::uint32_t),
                            params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
  ring_ = map_shared(descriptor_, ring_nbytes_, IORING_OFF_SQ_RING);
  entries_nbytes_ = params.sq_entries * sizeof(io_uring_sqe);
  entries_ = map_shared(descriptor_, entries_nbytes_, IORING_OFF_SQES);
  sq_tail_ = params.sq_off.tail;
  sq_mask_ = *word(params.sq_off.ring_mask);
  sq_array_ = params.sq_off.array;
  cq_head_ = params.cq_off.head;
  cq_tail_ = params.cq_off.tail;
  cq_mask_ = *word(params.cq_off.ring_mask);
  cqes_ = params.cq_off.cqes;
}

void Uring::check_operations() const {
  constexpr unsigned kNumOps = 64;
  std::vector<std::uint64_t> memory(
      (sizeof(io_uring_probe) + kNumOps * sizeof(io_uring_probe_op)) / sizeof(std::uint64_t) + 1);
  auto* probe = reinterpret_cast<io_uring_probe*>(memory.data());
  KV_ERRNO(::syscall(__NR_io_uring_register, descriptor_, kRegisterProbe, probe, kNumOps),
           "ask what an io_uring can do");
  for (const unsigned op : {IORING_OP_READ, IORING_OP_WRITE}) {
    if (op > probe->last_op || (probe->ops[op].flags & IO_URING_OP_SUPPORTED) == 0) {
      refuse_old();
    }
  }
}

void Uring::check_entry() const {
  // Filters may let a ring be set up and never be used. One that is still disabled says EBADFD.
  const bool is_refused =
      ::syscall(__NR_io_uring_enter, descriptor_, 0, 0, 0, nullptr, 0) < 0 && errno != EBADFD;
  KV_ERRNO(is_refused ? -1 : 0, "enter an io_uring");
}

void Uring::release() noexcept {
  if (entries_ != nullptr) {
    ::munmap(entries_, entries_nbytes_);
  }
  if (ring_ != nullptr) {
    ::munmap(ring_, ring_nbytes_);
  }
  if (descriptor_ >= 0) {
    ::close(descriptor_);
  }
}

void Uring::enable() noexcept {
  if (needs_enabling_) {
    static_cast<void>(
        ::syscall(__NR_io_uring_register, descriptor_, kRegisterEnableRings, nullptr, 0));
  }
}

std::uint32_t* Uring::word(std::uint32_t offset) const noexcept {
  return reinterpret_cast<std::uint32_t*>(ring_ + offset);
}

Uring::Entry& Uring::next_entry() noexcept {
  // Never full: the owner keeps as many submissions in flight as there are entries, at most.
  const std::uint32_t tail = *word(sq_tail_) + num_prepared_++;
  const std::uint32_t index = tail & sq_mask_;
  word(sq_array_)[index] = index;
  auto& entry = reinterpret_cast<Entry*>(entries_)[index];
  std::memset(&entry, 0, sizeof(entry));
  return entry;
}

void Uring::prepare(const Piece& piece, std::uint64_t tag) noexcept {
  io_uring_sqe& sqe = next_entry().sqe;
  sqe.opcode = piece.direction == Direction::kRead ? IORING_OP_READ : IORING_OP_WRITE;
  sqe.fd = piece.file->descriptor();
  sqe.off = piece.rest_offset();
  sqe.addr = reinterpret_cast<std::uintptr_t>(piece.rest());
  sqe.len = static_cast<std::uint32_t>(piece.rest_nbytes());
  sqe.user_data = tag;
}

void Uring::prepare_wake(int descriptor, std::uint64_t* value, std::uint64_t tag) noexcept {
  io_uring_sqe& sqe = next_entry().sqe;
  sqe.opcode = IORING_OP_READ;
  sqe.fd = descriptor;
  sqe.addr = reinterpret_cast<std::uintptr_t>(value);
  sqe.len = sizeof(*value);
  sqe.user_data = tag;
}

void Uring::enter(unsigned least) noexcept {
  __atomic_store_n(word(sq_tail_), *word(sq_tail_) + num_prepared_, __ATOMIC_RELEASE);
  std::uint32_t left = num_prepared_;
  num_prepared_ = 0;
  const KernelTimespec patience{0, 100 * 1000};
  EnterArguments arguments{};
  arguments.timeout = reinterpret_cast<std::uintptr_t>(&patience);
  const bool is_timed = least > 1 && has_timed_waits_;
  const unsigned flags = IORING_ENTER_GETEVENTS | (is_timed ? kEnterWithArguments : 0);
  do {
    const long taken =
        ::syscall(__NR_io_uring_enter, descriptor_, left, is_timed ? least : 1, flags,
                  is_timed ? &arguments : nullptr, is_timed ? sizeof(arguments) : 0);
    if (taken >= 0) {
      left -= std::min(left, static_cast<std::uint32_t>(taken));
    } else if (errno != EINTR && errno != ETIME) {
      const int error_number = errno;
      const timespec pause{0, 1000 * 1000};
      ::nanosleep(&pause, nullptr);
      // The kernel is short of memory, or wants completions taken first: that passes.
      if (error_number != EAGAIN && error_number != EBUSY && error_number != ENOMEM) {
        num_refused_ = left;
        refusal_ = error_number;
        __atomic_store_n(word(sq_tail_), *word(sq_tail_) - left, __ATOMIC_RELEASE);
        return;
      }
    }
  } while (left > 0);
}

bool Uring::take(Completion& completion) noexcept {
  if (num_refused_ > 0) {
    // They lie behind the tail, in order; what is prepared meanwhile replaces those given out.
    const std::uint32_t index = *word(sq_tail_) + next_refused_++;
    completion = Completion{reinterpret_cast<Entry*>(entries_)[index & sq_mask_].sqe.user_data,
                            -static_cast<std::int64_t>(refusal_)};
    if (next_refused_ == num_refused_) {
      num_refused_ = next_refused_ = 0;
    }
    return true;
  }
  const std::uint32_t head = *word(cq_head_);
  if (head == __atomic_load_n(word(cq_tail_), __ATOMIC_ACQUIRE)) {
    return false;
  }
  const io_uring_cqe& cqe = reinterpret_cast<const io_uring_cqe*>(ring_ + cqes_)[head & cq_mask_];
  completion = Completion{cqe.user_data, cqe.res};
  __atomic_store_n(word(cq_head_), head + 1, __ATOMIC_RELEASE);
  return true;
}

}  // namespace kv
