// SPDX-License-Identifier: Apache-2.0
// Loaded before libc: makes reads, writes and syncs of a store's files fail, stop short or stall, as a control file says.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct control {
  volatile unsigned long long on_extents, on_catalogue;              // which files are concerned
  volatile unsigned long long read_errno, write_errno, sync_errno;   // 0 = none
  volatile unsigned long long is_short;                              // transfers stop half-way
  volatile unsigned long long read_stall_ms, write_stall_ms, sync_stall_ms;
};

static struct control *control(void) {
  static struct control *mapped;
  if (mapped == NULL) {
    const char *path = getenv("FAULTY_DISK_CONTROL");
    int descriptor = path == NULL ? -1 : open(path, O_RDWR | O_CLOEXEC);
    if (descriptor < 0) {
      return NULL;
    }
    void *found = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    close(descriptor);
    mapped = found == MAP_FAILED ? NULL : found;
  }
  return mapped;
}

// The control, if the file is one of those that it concerns.
static struct control *concerned(int descriptor) {
  struct control *now = control();
  if (now == NULL || (!now->on_extents && !now->on_catalogue)) {
    return NULL;
  }
  char link[64];
  char path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) {
    return NULL;
  }
  path[length] = 0;
  if ((now->on_extents && strstr(path, ".extents")) || (now->on_catalogue && strstr(path, "data.mdb"))) {
    return now;
  }
  return NULL;
}

// Waits, then says which error to give back, 0 for none.
static int suffer(unsigned long long stall_ms, unsigned long long number) {
  if (stall_ms > 0) {
    struct timespec left = {(time_t)(stall_ms / 1000), (long)(stall_ms % 1000) * 1000000L};
    while (nanosleep(&left, &left) != 0 && errno == EINTR) {
    }
  }
  errno = (int)number;
  return number != 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
// Whole pages, as O_DIRECT wants; at least one byte.
#define HALF(nbytes) ((nbytes) > 8192 ? (nbytes) / 2 / 4096 * 4096 : (nbytes))

ssize_t pread(int descriptor, void *data, size_t nbytes, off_t offset) {
  struct control *now = concerned(descriptor);
  if (now != NULL && suffer(now->read_stall_ms, now->read_errno)) {
    return -1;
  }
  return REAL(pread)(descriptor, data, now != NULL && now->is_short ? HALF(nbytes) : nbytes, offset);
}

ssize_t pread64(int descriptor, void *data, size_t nbytes, off64_t offset) {
  return pread(descriptor, data, nbytes, offset);
}

ssize_t pwrite(int descriptor, const void *data, size_t nbytes, off_t offset) {
  struct control *now = concerned(descriptor);
  if (now != NULL && suffer(now->write_stall_ms, now->write_errno)) {
    return -1;
  }
  return REAL(pwrite)(descriptor, data, now != NULL && now->is_short ? HALF(nbytes) : nbytes, offset);
}

ssize_t pwrite64(int descriptor, const void *data, size_t nbytes, off64_t offset) {
  return pwrite(descriptor, data, nbytes, offset);
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
  struct control *now = concerned(descriptor);
  return now != NULL && suffer(now->write_stall_ms, now->write_errno) ? -1 : REAL(writev)(descriptor, parts, count);
}

ssize_t pwritev(int descriptor, const struct iovec *parts, int count, off_t offset) {
  struct control *now = concerned(descriptor);
  return now != NULL && suffer(now->write_stall_ms, now->write_errno)
             ? -1
             : REAL(pwritev)(descriptor, parts, count, offset);
}

int fdatasync(int descriptor) {
  struct control *now = concerned(descriptor);
  return now != NULL && suffer(now->sync_stall_ms, now->sync_errno) ? -1 : REAL(fdatasync)(descriptor);
}

int fsync(int descriptor) {
  struct control *now = concerned(descriptor);
  return now != NULL && suffer(now->sync_stall_ms, now->sync_errno) ? -1 : REAL(fsync)(descriptor);
}
