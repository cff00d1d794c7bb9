/* Writes that fail, for tests: cc -shared -fPIC -o faults.so faults.c -ldl, then LD_PRELOAD.

   Calls that write below FAULTS_FOLDER are numbered from 1 and their names and paths appended to FAULTS_TRACE. Call
   FAULTS_AT fails: FAULTS_KIND enospc: no room from then on, also for later calls; eio: this once; short: half of it is
   written, then there is no room; partial: half of it is written, and the rest when asked again. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { NONE, ENOSPC_ON, EIO_ONCE, SHORT, PARTIAL };

static char folder[PATH_MAX];
static size_t length;
static long at, calls;
static enum kind kind;
static int trace = -1, full;

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* From the environment; a forked job calls it once its own is set. */
void faults_arm(void) {
    const char *where = getenv("FAULTS_FOLDER"), *number = getenv("FAULTS_AT"), *how = getenv("FAULTS_KIND");
    const char *log = getenv("FAULTS_TRACE");
    length = 0;
    if (!where || strlen(where) >= sizeof folder) return;
    strcpy(folder, where);
    length = strlen(folder);
    at = number ? atol(number) : 0;
    calls = full = 0;
    kind = !how ? NONE : !strcmp(how, "enospc") ? ENOSPC_ON : !strcmp(how, "eio") ? EIO_ONCE
         : !strcmp(how, "short") ? SHORT : !strcmp(how, "partial") ? PARTIAL : NONE;
    if (log) trace = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

__attribute__((constructor)) static void start(void) { faults_arm(); }

static int below(const char *path) {
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int absolute(int directory, const char *path, char *out) {
    char base[PATH_MAX];
    if (path[0] == '/') return snprintf(out, PATH_MAX, "%s", path) < PATH_MAX;
    if (directory == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t size = readlink(link, base, sizeof base - 1);
        if (size < 0) return 0;
        base[size] = 0;
    }
    return snprintf(out, PATH_MAX, "%s/%s", base, path) < PATH_MAX;
}

/* What becomes of a call: 0 it is made, 1 half of it is made, else the errno with which it fails. */
static int verdict(const char *name, const char *path, int sized, int needs_room) {
    if (!below(path)) return 0;
    long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (trace >= 0) {
        char line[PATH_MAX + 64];
        int size = snprintf(line, sizeof line, "%s %s\n", name, path + length);
        syscall(SYS_write, trace, line, size);
    }
    if (full && needs_room) return ENOSPC;
    if (number != at) return 0;
    if (kind == EIO_ONCE) return EIO;
    if (kind == PARTIAL) return sized ? 1 : 0;
    full = kind == ENOSPC_ON || kind == SHORT;
    return !full ? 0 : kind == SHORT && sized ? 1 : ENOSPC;
}

static int by_path(const char *name, int directory, const char *path, int needs_room) {
    char whole[PATH_MAX];
    return length && absolute(directory, path, whole) ? verdict(name, whole, 0, needs_room) : 0;
}

static int by_file(const char *name, int file, int sized, int needs_room) {
    char link[64], path[PATH_MAX];
    int before = errno;
    if (!length || file == trace) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t size = readlink(link, path, sizeof path - 1);
    errno = before;
    if (size < 0) return 0;
    path[size] = 0;
    return verdict(name, path, sized, needs_room);
}

#define FAIL_IF(found) do { int failed = (found); if (failed) { errno = failed; return -1; } } while (0)

/* ---- what writes ---- */

static int mode_of(int flags, va_list more) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0; }

#define OPEN(function)                                                          \
    int function(const char *path, int flags, ...) {                            \
        va_list more;                                                           \
        va_start(more, flags);                                                  \
        int mode = mode_of(flags, more);                                        \
        va_end(more);                                                           \
        REAL(function);                                                         \
        if (flags & O_CREAT) FAIL_IF(by_path("open", AT_FDCWD, path, 1));       \
        return real(path, flags, mode);                                         \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(function)                                                        \
    int function(int directory, const char *path, int flags, ...) {             \
        va_list more;                                                           \
        va_start(more, flags);                                                  \
        int mode = mode_of(flags, more);                                        \
        va_end(more);                                                           \
        REAL(function);                                                         \
        if (flags & O_CREAT) FAIL_IF(by_path("open", directory, path, 1));      \
        return real(directory, path, flags, mode);                              \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(function)                                                         \
    FILE *function(const char *path, const char *mode) {                        \
        REAL(function);                                                         \
        int number = strpbrk(mode, "wa") ? by_path("open", AT_FDCWD, path, 1) : 0; \
        if (number) { errno = number; return NULL; }                            \
        return real(path, mode);                                                \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int file, const void *data, size_t size) {
    REAL(write);
    int number = by_file("write", file, size > 1, 1);
    if (number == 1) return real(file, data, size / 2);
    FAIL_IF(number);
    return real(file, data, size);
}

#define PWRITE(function, offset_type)                                           \
    ssize_t function(int file, const void *data, size_t size, offset_type offset) { \
        REAL(function);                                                         \
        int number = by_file("pwrite", file, size > 1, 1);                      \
        if (number == 1) return real(file, data, size / 2, offset);             \
        FAIL_IF(number);                                                        \
        return real(file, data, size, offset);                                  \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(writev);
    int number = by_file("writev", file, count > 0 && parts[0].iov_len > 1, 1);
    if (number == 1) {
        struct iovec half = {parts[0].iov_base, parts[0].iov_len / 2};
        return real(file, &half, 1);
    }
    FAIL_IF(number);
    return real(file, parts, count);
}

size_t fwrite(const void *data, size_t size, size_t count, FILE *stream) {
    REAL(fwrite);
    int number = by_file("fwrite", fileno(stream), count > 1, 1);
    if (number == 1) { /* stdio itself writes on: what it reports as short has failed */
        size_t done = real(data, size, count / 2, stream);
        full = 1;
        errno = ENOSPC;
        return done;
    }
    if (number) { errno = number; return 0; }
    return real(data, size, count, stream);
}

#define ON_FILE(function, needs_room)                                           \
    int function(int file) {                                                    \
        REAL(function);                                                         \
        FAIL_IF(by_file(#function, file, 0, needs_room));                       \
        return real(file);                                                      \
    }
ON_FILE(fsync, 1)
ON_FILE(fdatasync, 1)

#define FTRUNCATE(function, offset_type)                                        \
    int function(int file, offset_type size) {                                  \
        REAL(function);                                                         \
        FAIL_IF(by_file("ftruncate", file, 0, 0));                              \
        return real(file, size);                                                \
    }
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)

#define TRUNCATE(function, offset_type)                                         \
    int function(const char *path, offset_type size) {                          \
        REAL(function);                                                         \
        FAIL_IF(by_path("truncate", AT_FDCWD, path, 0));                        \
        return real(path, size);                                                \
    }
TRUNCATE(truncate, off_t)
TRUNCATE(truncate64, off64_t)

int rename(const char *old, const char *new) {
    REAL(rename);
    FAIL_IF(by_path("rename", AT_FDCWD, new, 0));
    return real(old, new);
}

int renameat(int old_directory, const char *old, int directory, const char *new) {
    REAL(renameat);
    FAIL_IF(by_path("rename", directory, new, 0));
    return real(old_directory, old, directory, new);
}

int renameat2(int old_directory, const char *old, int directory, const char *new, unsigned flags) {
    REAL(renameat2);
    FAIL_IF(by_path("rename", directory, new, 0));
    return real(old_directory, old, directory, new, flags);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    FAIL_IF(by_path("mkdir", AT_FDCWD, path, 1));
    return real(path, mode);
}

int mkdirat(int directory, const char *path, mode_t mode) {
    REAL(mkdirat);
    FAIL_IF(by_path("mkdir", directory, path, 1));
    return real(directory, path, mode);
}
