// Loaded into the program's processes (LD_PRELOAD), this kills one of them right after the n-th step that it makes in a folder, or
// lets that step fail as on a full disk. A step is a call of the system that changes what is there.
//
// The file that FAILPOINT names says what: an id, `engine`, `worker` or `coordinator`, `kill` or `full`, the number n, the folder. It
// is renamed to end in `.done` when it comes true, so that it does so once.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum due { GO, FULL, KILL };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char process[32];
static __thread int inside;

#define REAL(type, name) ((type)dlsym(RTLD_NEXT, name))

__attribute__((constructor)) static void begin(void) {
    // The first argument after the program's name is the command.
    char line[4096];
    int file = REAL(int (*)(const char *, int, ...), "open64")("/proc/self/cmdline", O_RDONLY);
    ssize_t length = file < 0 ? 0 : read(file, line, sizeof line - 1);
    if (file >= 0) close(file);
    line[length < 0 ? 0 : length] = 0;
    const char *command = line + strlen(line) + 1;
    if (command < line + length) snprintf(process, sizeof process, "%s", command);
}

// What is to become of a step in `path`, which is counted.
static enum due count(const char *path) {
    static unsigned long seen, of;
    const char *plan = getenv("FAILPOINT");
    char who[32], how[8], folder[4096], done[4096];
    unsigned long id, n;
    if (!plan || inside) return GO;
    inside = 1;
    pthread_mutex_lock(&lock);
    enum due due = GO;
    FILE *file = fopen(plan, "r");
    if (file) {
        int fields = fscanf(file, "%lu %31s %7s %lu %4095s", &id, who, how, &n, folder);
        fclose(file);
        if (fields == 5 && !strcmp(who, process) && !strncmp(path, folder, strlen(folder))) {
            if (id != of) of = id, seen = 0;
            snprintf(done, sizeof done, "%s.done", plan);
            if (++seen == n && !REAL(int (*)(const char *, const char *), "rename")(plan, done))
                due = strcmp(how, "full") ? KILL : FULL;
        }
    }
    pthread_mutex_unlock(&lock);
    inside = 0;
    return due;
}

static enum due count_fd(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return GO;
    path[length] = 0;
    return count(path);
}

static enum due count_at(int dir, const char *name) {
    char link[64], path[8192];
    if (name[0] == '/' || dir == AT_FDCWD) return count(name);
    snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    ssize_t length = readlink(link, path, 4095);
    if (length < 0) return GO;
    snprintf(path + length, sizeof path - length, "/%s", name);
    return count(path);
}

#define STEP(due_now, type, call)                      \
    do {                                               \
        enum due due = due_now;                        \
        if (due == FULL) return errno = ENOSPC, -1;    \
        type result = call;                            \
        int error = errno;                             \
        if (due == KILL) kill(getpid(), SIGKILL);      \
        return errno = error, result;                  \
    } while (0)

#define MODE(flags)                                    \
    mode_t mode = 0;                                   \
    if (flags & (O_CREAT | O_TMPFILE)) {               \
        va_list rest;                                  \
        va_start(rest, flags);                         \
        mode = va_arg(rest, mode_t);                   \
        va_end(rest);                                  \
    }

#define OPEN(name)                                                                              \
    int name(const char *path, int flags, ...) {                                                \
        MODE(flags)                                                                             \
        STEP(flags & O_CREAT ? count(path) : GO, int,                                           \
             REAL(int (*)(const char *, int, ...), #name)(path, flags, mode));                  \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                            \
    int name(int dir, const char *path, int flags, ...) {                                       \
        MODE(flags)                                                                             \
        STEP(flags & O_CREAT ? count_at(dir, path) : GO, int,                                   \
             REAL(int (*)(int, const char *, int, ...), #name)(dir, path, flags, mode));        \
    }
OPENAT(openat)
OPENAT(openat64)

#define ON_FD(name, type, parameters, arguments)                                                \
    type name parameters { STEP(count_fd(fd), type, REAL(type(*) parameters, #name) arguments); }
ON_FD(write, ssize_t, (int fd, const void *data, size_t size), (fd, data, size))
ON_FD(writev, ssize_t, (int fd, const struct iovec *parts, int count), (fd, parts, count))
ON_FD(pwrite, ssize_t, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
ON_FD(pwrite64, ssize_t, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
ON_FD(fsync, int, (int fd), (fd))
ON_FD(fdatasync, int, (int fd), (fd))
ON_FD(ftruncate, int, (int fd, off_t size), (fd, size))
ON_FD(ftruncate64, int, (int fd, off64_t size), (fd, size))

#define ON_PATH(name, parameters, arguments)                                                    \
    int name parameters { STEP(count(path), int, REAL(int (*) parameters, #name) arguments); }
ON_PATH(mkdir, (const char *path, mode_t mode), (path, mode))
ON_PATH(unlink, (const char *path), (path))
ON_PATH(rmdir, (const char *path), (path))
ON_PATH(rename, (const char *path, const char *to), (path, to))
ON_PATH(link, (const char *path, const char *to), (path, to))

int unlinkat(int dir, const char *path, int flags) {
    STEP(count_at(dir, path), int, REAL(int (*)(int, const char *, int), "unlinkat")(dir, path, flags));
}

int linkat(int dir, const char *path, int to_dir, const char *to, int flags) {
    STEP(count_at(dir, path), int,
         REAL(int (*)(int, const char *, int, const char *, int), "linkat")(dir, path, to_dir, to, flags));
}
