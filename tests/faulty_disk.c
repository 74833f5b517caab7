// SPDX-License-Identifier: Apache-2.0
// Loaded before libc: makes reads, writes and syncs of a store's files fail, stop short or stall, as a control file says;
// or ends the process before the n-th of its writes and syncs, with or without what has not been synced by then.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
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
  volatile unsigned long long end_at;    // the process is killed before so many more writes and syncs; 0 = never
  volatile unsigned long long loses;     // of what is not synced then: 0 = nothing, 1 = all, above = some, by this seed
  volatile unsigned long long is_fickle;  // rings take parts, are interrupted, and give transfers back
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

static int path_of(int descriptor, char *path, size_t nbytes) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, nbytes - 1);
  path[length < 0 ? 0 : length] = 0;
  return length > 0;
}

// The control, if the file is one of those that it concerns.
static struct control *concerned(int descriptor) {
  struct control *now = control();
  if (now == NULL || (!now->on_extents && !now->on_catalogue)) {
    return NULL;
  }
  char path[4096];
  if (!path_of(descriptor, path, sizeof path)) {
    return NULL;
  }
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

// What a file held before a write that has not been synced yet.
struct undo {
  struct undo *before;
  char *path;
  char *data;
  size_t nbytes;
  off_t offset;
};
static struct undo *last_undo;
static pthread_mutex_t undo_mutex = PTHREAD_MUTEX_INITIALIZER;

// A power cut takes back what was not synced, all or some of it; then the process is gone.
static void end(unsigned long long loses) {
  unsigned seed = (unsigned)loses;
  for (struct undo *each = last_undo; each != NULL && loses > 0; each = each->before) {
    if (loses > 1 && (rand_r(&seed) & 1) != 0) {
      continue;
    }
    int file = open(each->path, O_WRONLY | O_CLOEXEC);
    if (file >= 0) {
      (void)!REAL(pwrite)(file, each->data, each->nbytes, each->offset);
      close(file);
    }
  }
  kill(getpid(), SIGKILL);
  pause();
}

// Before a write (nbytes above 0) or a sync of a file that is concerned.
static void count(struct control *now, int descriptor, size_t nbytes, off_t offset) {
  if (now == NULL || now->end_at == 0) {
    return;
  }
  pthread_mutex_lock(&undo_mutex);
  if (--now->end_at == 0) {
    end(now->loses);
  }
  char path[4096];
  if (nbytes > 0 && (fcntl(descriptor, F_GETFL) & O_DSYNC) == 0 && path_of(descriptor, path, sizeof path)) {
    struct undo *made = malloc(sizeof *made);
    *made = (struct undo){last_undo, strdup(path), calloc(1, nbytes), nbytes, offset};
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file >= 0) {
      (void)!REAL(pread)(file, made->data, nbytes, offset);
      close(file);
    }
    last_undo = made;
  }
  pthread_mutex_unlock(&undo_mutex);
}

// After a sync that went well.
static void keep(struct control *now, int descriptor) {
  char path[4096];
  if (now == NULL || !path_of(descriptor, path, sizeof path)) {
    return;
  }
  pthread_mutex_lock(&undo_mutex);
  for (struct undo **link = &last_undo; *link != NULL;) {
    struct undo *each = *link;
    if (strcmp(each->path, path) == 0) {
      *link = each->before;
      free(each->path);
      free(each->data);
      free(each);
    } else {
      link = &each->before;
    }
  }
  pthread_mutex_unlock(&undo_mutex);
}
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
  count(now, descriptor, nbytes, offset);
  return REAL(pwrite)(descriptor, data, now != NULL && now->is_short ? HALF(nbytes) : nbytes, offset);
}

ssize_t pwrite64(int descriptor, const void *data, size_t nbytes, off64_t offset) {
  return pwrite(descriptor, data, nbytes, offset);
}

ssize_t write(int descriptor, const void *data, size_t nbytes) {
  count(concerned(descriptor), descriptor, nbytes, lseek(descriptor, 0, SEEK_CUR));
  return REAL(write)(descriptor, data, nbytes);
}

static size_t total(const struct iovec *parts, int count) {
  size_t nbytes = 0;
  for (int part = 0; part < count; ++part) {
    nbytes += parts[part].iov_len;
  }
  return nbytes;
}

ssize_t writev(int descriptor, const struct iovec *parts, int number) {
  struct control *now = concerned(descriptor);
  if (now != NULL && suffer(now->write_stall_ms, now->write_errno)) {
    return -1;
  }
  count(now, descriptor, total(parts, number), lseek(descriptor, 0, SEEK_CUR));
  return REAL(writev)(descriptor, parts, number);
}

ssize_t pwritev(int descriptor, const struct iovec *parts, int number, off_t offset) {
  struct control *now = concerned(descriptor);
  if (now != NULL && suffer(now->write_stall_ms, now->write_errno)) {
    return -1;
  }
  count(now, descriptor, total(parts, number), offset);
  return REAL(pwritev)(descriptor, parts, number, offset);
}

static int synced(int descriptor, int (*sync)(int)) {
  struct control *now = concerned(descriptor);
  if (now != NULL && suffer(now->sync_stall_ms, now->sync_errno)) {
    return -1;
  }
  count(now, descriptor, 0, 0);
  int result = sync(descriptor);
  if (result == 0) {
    keep(now, descriptor);
  }
  return result;
}

int fdatasync(int descriptor) { return synced(descriptor, REAL(fdatasync)); }

int fsync(int descriptor) { return synced(descriptor, REAL(fsync)); }

#include "faulty_ring.h"
