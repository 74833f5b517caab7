// SPDX-License-Identifier: Apache-2.0
// What the faulty disk does to transfers that a ring hands to the kernel: entries are changed before the kernel sees
// them, and their results after. Included by faulty_disk.c; needs rings whose results come in io_uring_enter only.
#include <linux/io_uring.h>
#include <stdarg.h>
#include <stdint.h>
#include <sys/syscall.h>

#define DEFERRED (1U << 13)  // IORING_SETUP_DEFER_TASKRUN, which older headers lack
#define MAX_RINGS 16
#define MAX_TAGS 4096

struct ring {
  int descriptor;
  struct io_uring_sqe *entries;
  struct io_uring_cqe *results;
  unsigned *sq_head, sq_mask, *cq_tail, cq_mask, num_seen;
  int result_of[MAX_TAGS];  // instead of the kernel's, by tag; 0 = none
  char was_held[MAX_TAGS];  // stalled before, and tried again
};
static struct ring rings[MAX_RINGS];
static unsigned num_rings, num_calls, num_transfers;

static long real_call(long number, const long *a) {
  static long (*real)(long, ...);
  if (real == NULL) {
    real = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
  }
  return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

static long set_up(const long *a) {
  struct io_uring_params *params = (struct io_uring_params *)a[1];
  if ((params->flags & DEFERRED) == 0 || num_rings == MAX_RINGS) {
    errno = ENOSYS;
    return -1;
  }
  int made = (int)real_call(SYS_io_uring_setup, a);
  if (made >= 0) {
    size_t nbytes = params->cq_off.cqes + params->cq_entries * sizeof(struct io_uring_cqe);
    char *ring = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, made, IORING_OFF_SQ_RING);
    struct ring *kept = &rings[num_rings++];
    for (struct ring *each = rings; each < kept; ++each) {  // the number of one that was closed
      each->descriptor = each->descriptor == made ? -1 : each->descriptor;
    }
    kept->descriptor = made;
    kept->entries = mmap(NULL, params->sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE, MAP_SHARED,
                         made, IORING_OFF_SQES);
    kept->results = (struct io_uring_cqe *)(ring + params->cq_off.cqes);
    kept->sq_head = (unsigned *)(ring + params->sq_off.head);
    kept->sq_mask = *(unsigned *)(ring + params->sq_off.ring_mask);
    kept->cq_tail = (unsigned *)(ring + params->cq_off.tail);
    kept->cq_mask = *(unsigned *)(ring + params->cq_off.ring_mask);
  }
  return made;
}

// Lets the kernel do nothing, for a while, and says what came of the transfer instead.
static void replace(struct ring *ring, struct io_uring_sqe *entry, unsigned long long wait_ms, int result) {
  static __thread struct {
    int64_t seconds, nanoseconds;
  } span;
  uint64_t tag = entry->user_data;
  ring->result_of[tag] = result;
  memset(entry, 0, sizeof *entry);
  entry->opcode = IORING_OP_NOP;
  entry->user_data = tag;
  if (wait_ms > 0) {
    span.seconds = (int64_t)(wait_ms / 1000);
    span.nanoseconds = (int64_t)(wait_ms % 1000) * 1000000;
    entry->opcode = IORING_OP_TIMEOUT;
    entry->fd = -1;
    entry->addr = (uint64_t)(uintptr_t)&span;
    entry->len = 1;
  }
}

static void change(struct ring *ring, struct io_uring_sqe *entry) {
  int is_write = entry->opcode == IORING_OP_WRITE;
  struct control *now = is_write || entry->opcode == IORING_OP_READ ? concerned(entry->fd) : NULL;
  if (now == NULL || entry->user_data >= MAX_TAGS) {
    return;
  }
  unsigned long long stall_ms = is_write ? now->write_stall_ms : now->read_stall_ms;
  unsigned long long number = is_write ? now->write_errno : now->read_errno;
  if (stall_ms > 0 && !ring->was_held[entry->user_data]) {
    ring->was_held[entry->user_data] = 1;
    replace(ring, entry, stall_ms, -EINTR);
    return;
  }
  ring->was_held[entry->user_data] = 0;
  if (number != 0) {
    replace(ring, entry, 0, -(int)number);
    return;
  }
  if (now->is_fickle) {
    ++num_transfers;
    if (num_transfers % 3 == 0 || num_transfers % 7 == 0) {
      replace(ring, entry, 0, num_transfers % 3 == 0 ? -EINTR : -EAGAIN);
      return;
    }
  }
  if (is_write) {
    count(now, entry->fd, entry->len, (off_t)entry->off);
  }
  if (now->is_short) {
    entry->len = (unsigned)HALF(entry->len);
  }
}

static long enter(const long *a) {
  struct control *now = control();
  struct ring *ring = rings;
  while (ring < rings + num_rings && ring->descriptor != (int)a[0]) {
    ++ring;
  }
  if (ring == rings + num_rings || now == NULL) {
    return real_call(SYS_io_uring_enter, a);
  }
  long changed[6] = {a[0], a[1], a[2], a[3], a[4], a[5]};
  if (now->is_fickle) {
    ++num_calls;
    if (num_calls % 5 == 0) {
      errno = num_calls % 2 == 0 ? EINTR : num_calls % 3 == 0 ? EBUSY : EAGAIN;
      return -1;
    }
    if (a[1] > 1) {  // takes some, and does not wait
      changed[1] = 1;
      changed[2] = 0;
    }
  }
  for (unsigned at = 0; at < (unsigned)changed[1]; ++at) {
    change(ring, &ring->entries[(*ring->sq_head + at) & ring->sq_mask]);
  }
  long taken = real_call(SYS_io_uring_enter, changed);
  int error_number = errno;
  for (unsigned tail = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE); ring->num_seen != tail; ++ring->num_seen) {
    struct io_uring_cqe *result = &ring->results[ring->num_seen & ring->cq_mask];
    if (result->user_data < MAX_TAGS && ring->result_of[result->user_data] != 0) {
      result->res = ring->result_of[result->user_data];
      ring->result_of[result->user_data] = 0;
    }
  }
  errno = error_number;
  return taken;
}

long syscall(long number, ...) {
  va_list list;
  long arguments[6];
  va_start(list, number);
  for (int at = 0; at < 6; ++at) {
    arguments[at] = va_arg(list, long);
  }
  va_end(list);
  return number == SYS_io_uring_setup   ? set_up(arguments)
         : number == SYS_io_uring_enter ? enter(arguments)
                                        : real_call(number, arguments);
}
