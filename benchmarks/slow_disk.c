// SPDX-License-Identifier: Apache-2.0
// A disk that is slower than the one beneath: loaded with LD_PRELOAD, it holds back what a process reads and writes
// below SLOW_DISK_FOLDER, as the file SLOW_DISK_CONTROL says, which any process may change at any time:
//   u64 bytes per second of all writes together, 0 = no limit; u64 writes stall; u64 reads stall, while not 0.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct control {
  volatile uint64_t write_rate, writes_stall, reads_stall;
};

static struct control no_limits;
static struct control* control = &no_limits;
static const char* folder;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static double free_at_s;

__attribute__((constructor)) static void load(void) {
  const char* path = getenv("SLOW_DISK_CONTROL");
  folder = getenv("SLOW_DISK_FOLDER");
  const int descriptor = path != NULL ? open(path, O_RDWR | O_CLOEXEC) : -1;
  if (descriptor < 0 || folder == NULL) {
    return;
  }
  void* found = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  close(descriptor);
  if (found != MAP_FAILED) {
    control = found;
  }
}

static int is_slow(int descriptor) {
  char link[64], target[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(link, target, sizeof target - 1);
  return folder != NULL && length > 0 && strncmp(target, folder, strlen(folder)) == 0;
}

static void sleep_s(double seconds) {
  const struct timespec span = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
  nanosleep(&span, NULL);
}

static double now_s(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void hold_write(int descriptor, size_t nbytes) {
  if ((control->write_rate == 0 && control->writes_stall == 0) || !is_slow(descriptor)) {
    return;
  }
  while (control->writes_stall != 0) {
    sleep_s(0.001);
  }
  if (control->write_rate != 0) {
    pthread_mutex_lock(&lock);
    const double now = now_s();
    free_at_s = (free_at_s > now ? free_at_s : now) + (double)nbytes / (double)control->write_rate;
    const double wait_s = free_at_s - now;
    pthread_mutex_unlock(&lock);
    sleep_s(wait_s);
  }
}

static void hold_read(int descriptor) {
  while (control->reads_stall != 0 && is_slow(descriptor)) {
    sleep_s(0.001);
  }
}

static size_t total(const struct iovec* parts, int count) {
  size_t nbytes = 0;
  for (int i = 0; i < count; ++i) {
    nbytes += parts[i].iov_len;
  }
  return nbytes;
}

#define REAL(type, name) \
  static type real;      \
  if (real == NULL) {    \
    real = (type)dlsym(RTLD_NEXT, name); \
  }

typedef ssize_t (*pwrite_call)(int, const void*, size_t, off_t);
typedef ssize_t (*pread_call)(int, void*, size_t, off_t);
typedef ssize_t (*pwritev_call)(int, const struct iovec*, int, off_t);
typedef ssize_t (*preadv_call)(int, const struct iovec*, int, off_t);
typedef ssize_t (*writev_call)(int, const struct iovec*, int);
typedef long (*syscall_call)(long, long, long, long, long, long, long);

ssize_t pwrite(int descriptor, const void* data, size_t nbytes, off_t offset) {
  REAL(pwrite_call, "pwrite")
  hold_write(descriptor, nbytes);
  return real(descriptor, data, nbytes, offset);
}
ssize_t pwrite64(int descriptor, const void* data, size_t nbytes, off_t offset) {
  return pwrite(descriptor, data, nbytes, offset);
}
ssize_t pwritev(int descriptor, const struct iovec* parts, int count, off_t offset) {
  REAL(pwritev_call, "pwritev")
  hold_write(descriptor, total(parts, count));
  return real(descriptor, parts, count, offset);
}
ssize_t pwritev64(int descriptor, const struct iovec* parts, int count, off_t offset) {
  return pwritev(descriptor, parts, count, offset);
}
ssize_t writev(int descriptor, const struct iovec* parts, int count) {
  REAL(writev_call, "writev")
  hold_write(descriptor, total(parts, count));
  return real(descriptor, parts, count);
}
ssize_t pread(int descriptor, void* data, size_t nbytes, off_t offset) {
  REAL(pread_call, "pread")
  hold_read(descriptor);
  return real(descriptor, data, nbytes, offset);
}
ssize_t pread64(int descriptor, void* data, size_t nbytes, off_t offset) {
  return pread(descriptor, data, nbytes, offset);
}
ssize_t preadv(int descriptor, const struct iovec* parts, int count, off_t offset) {
  REAL(preadv_call, "preadv")
  hold_read(descriptor);
  return real(descriptor, parts, count, offset);
}
ssize_t preadv64(int descriptor, const struct iovec* parts, int count, off_t offset) {
  return preadv(descriptor, parts, count, offset);
}

// Transfers that the kernel makes by itself cannot be held back: without its rings, threads make them.
long syscall(long number, ...) {
  REAL(syscall_call, "syscall")
  va_list list;
  va_start(list, number);
  long arguments[6];
  for (int i = 0; i < 6; ++i) {
    arguments[i] = va_arg(list, long);
  }
  va_end(list);
#ifdef SYS_io_uring_setup
  if (number == SYS_io_uring_setup) {
    errno = ENOSYS;
    return -1;
  }
#endif
  return real(number, arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]);
}
