/* Copyright: Contributors to the kvmfleet.qcow2 collection
 * GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
 * SPDX-License-Identifier: GPL-3.0-or-later
 *
 * Stands between a program and the C library (LD_PRELOAD), counts the calls that concern the files of one folder, or
 * the dialogue of the module with its QEMU, and does at one of them what a rule says.
 *
 * PROVE_FOLDER: the folder, with a slash at the end.
 * PROVE_RULE:   WHO:CALL:NUMBER[+]:ACTION, such as module:linkat:1:EPERM. WHO is module or qemu, CALL the name of a
 *               call, * for any, files for any but those of the dialogue and of processes, NUMBER the how-manieth of
 *               them, with a + all from there on. ACTION is the name of an error; short: do half of it; group, self:
 *               SIGKILL to the process group or to this process; term: SIGTERM to this process; stop: SIGSTOP.
 * PROVE_LOG:    a file to which a line is added for each call that was counted.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define HALF (-1) /* what verdict() returns for "short"; 0 is to go on, any other number is an error */

static char folder[PATH_MAX], rule_call[32], rule_action[32];
static const char *me = "other";
static long rule_number;
static int rule_sticky, log_fd = -1, pid_at_begin;
static atomic_long counter;

static const struct { const char *name; int number; } ERRORS[] = {
    {"EIO", EIO}, {"ENOSPC", ENOSPC}, {"EDQUOT", EDQUOT}, {"EROFS", EROFS}, {"EPERM", EPERM}, {"EACCES", EACCES},
    {"ENOLCK", ENOLCK}, {"EINTR", EINTR}, {"ENOTSUP", ENOTSUP}, {"EMLINK", EMLINK}, {"EMFILE", EMFILE},
    {"ENOMEM", ENOMEM}, {"ESTALE", ESTALE}, {"EAGAIN", EAGAIN}, {"ENOENT", ENOENT}, {"EINVAL", EINVAL},
    {"EPIPE", EPIPE}, {"ECONNRESET", ECONNRESET}, {NULL, 0}};

/* Begin to count; QEMU does it by itself, the module is told to once it has forked. */
void prove_begin(void) {
    const char *place = getenv("PROVE_FOLDER"), *rule = getenv("PROVE_RULE"), *log = getenv("PROVE_LOG");
    char who[16] = "", number[16] = "";
    if (place == NULL)
        return;
    me = strncmp(program_invocation_short_name, "qemu", 4) == 0 ? "qemu" : "module";
    snprintf(folder, sizeof folder, "%s", place);
    rule_call[0] = 0;
    if (rule != NULL && sscanf(rule, "%15[^:]:%31[^:]:%15[^:]:%31s", who, rule_call, number, rule_action) == 4) {
        rule_number = atol(number);
        rule_sticky = strchr(number, '+') != NULL;
        if (strcmp(who, me) != 0)
            rule_call[0] = 0;
    }
    if (log != NULL)
        log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    counter = 0;
    pid_at_begin = getpid();
}

__attribute__((constructor)) static void begin_in_qemu(void) {
    if (strncmp(program_invocation_short_name, "qemu", 4) == 0)
        prove_begin();
}

/* Note the call and return what is to become of it. */
static int verdict(const char *call) {
    if (pid_at_begin != getpid())
        return 0;
    if (log_fd >= 0) {
        char line[64];
        int length = snprintf(line, sizeof line, "%s %s\n", me, call);
        syscall(SYS_write, log_fd, line, length);
    }
    if (rule_call[0] == 0)
        return 0;
    if (strcmp(rule_call, "files") == 0) {
        static const char *const others[] = {"fork", "hear", "say", "kill", "wait", "ask", "answer"};
        for (unsigned i = 0; i < sizeof others / sizeof *others; i++)
            if (strcmp(call, others[i]) == 0)
                return 0;
    } else if (rule_call[0] != '*' && strcmp(rule_call, call) != 0) {
        return 0;
    }
    long number = ++counter;
    if (number != rule_number && !(rule_sticky && number > rule_number))
        return 0;
    if (strcmp(rule_action, "short") == 0)
        return HALF;
    if (strcmp(rule_action, "group") == 0)
        syscall(SYS_kill, 0, SIGKILL);
    if (strcmp(rule_action, "self") == 0)
        syscall(SYS_kill, getpid(), SIGKILL);
    if (strcmp(rule_action, "term") == 0)
        syscall(SYS_kill, getpid(), SIGTERM);
    if (strcmp(rule_action, "stop") == 0)
        syscall(SYS_kill, getpid(), SIGSTOP);
    for (int i = 0; ERRORS[i].name != NULL; i++)
        if (strcmp(rule_action, ERRORS[i].name) == 0)
            return ERRORS[i].number;
    return 0;
}

/* Whether a path is in the folder; through /proc/PID/fd too. */
static int is_ours(int at, const char *path) {
    char whole[PATH_MAX * 2], target[PATH_MAX], link[64];
    if (pid_at_begin == 0 || path == NULL)
        return 0;
    if (path[0] == '/') {
        snprintf(whole, sizeof whole, "%s", path);
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t length = at == AT_FDCWD ? -1 : syscall(SYS_readlinkat, AT_FDCWD, link, target, sizeof target - 1);
        if (length < 0)
            return 0;
        target[length] = 0;
        snprintf(whole, sizeof whole, "%s/%s", target, path);
    }
    if (strncmp(whole, "/proc/", 6) == 0) {
        ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, whole, target, sizeof target - 1);
        if (length < 0)
            return 0;
        target[length] = 0;
        snprintf(whole, sizeof whole, "%s", target);
    }
    return strncmp(whole, folder, strlen(folder)) == 0 || strncmp(whole, folder, strlen(folder) - 1) == 0;
}

/* Whether an open file is in the folder. */
static int is_ours_open(int fd) {
    char link[64];
    struct stat status;
    if (pid_at_begin == 0 || syscall(SYS_newfstatat, fd, "", &status, AT_EMPTY_PATH) != 0)
        return 0;
    if (!S_ISREG(status.st_mode) && !S_ISDIR(status.st_mode)) /* not the eventfds that QEMU uses all the time */
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return is_ours(AT_FDCWD, link);
}

/* The name of a call on this descriptor: the first on a pipe, so part of the dialogue with QEMU; the second on a socket,
 * so part of the one with libvirt's daemon; the third on a file of the folder; NULL on any other. */
static const char *name_of(int fd, const char *on_pipe, const char *on_socket, const char *on_file) {
    struct stat status;
    if (pid_at_begin == 0 || syscall(SYS_newfstatat, fd, "", &status, AT_EMPTY_PATH) != 0)
        return NULL;
    return S_ISFIFO(status.st_mode) ? on_pipe : S_ISSOCK(status.st_mode) ? on_socket : is_ours_open(fd) ? on_file : NULL;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (real == NULL) \
        real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name);
#define JUDGE(condition, call) \
    int judged = (condition) ? verdict(call) : 0; \
    if (judged > 0) { \
        errno = judged; \
        return -1; \
    }

/* Calls on an open file that do all or nothing. */
#define ON_FD(name, call, declared, passed) \
    int name declared { \
        REAL(int, name, TYPES_##name) \
        JUDGE(is_ours_open(fd), call) \
        return real passed; \
    }
#define TYPES_fsync int
#define TYPES_fdatasync int
#define TYPES_ftruncate int, off_t
#define TYPES_ftruncate64 int, off64_t
#define TYPES_fallocate int, int, off_t, off_t
#define TYPES_fallocate64 int, int, off64_t, off64_t
#define TYPES_fchown int, uid_t, gid_t
#define TYPES_fchmod int, mode_t
#define TYPES_fsetxattr int, const char *, const void *, size_t, int
#define TYPES_fstat int, struct stat *
#define TYPES_fstat64 int, struct stat64 *
ON_FD(fsync, "fsync", (int fd), (fd))
ON_FD(fdatasync, "fdatasync", (int fd), (fd))
ON_FD(ftruncate, "ftruncate", (int fd, off_t length), (fd, length))
ON_FD(ftruncate64, "ftruncate", (int fd, off64_t length), (fd, length))
ON_FD(fallocate, "fallocate", (int fd, int mode, off_t from, off_t length), (fd, mode, from, length))
ON_FD(fallocate64, "fallocate", (int fd, int mode, off64_t from, off64_t length), (fd, mode, from, length))
ON_FD(fchown, "fchown", (int fd, uid_t uid, gid_t gid), (fd, uid, gid))
ON_FD(fchmod, "fchmod", (int fd, mode_t mode), (fd, mode))
ON_FD(fsetxattr, "fsetxattr", (int fd, const char *name, const void *value, size_t size, int flags),
      (fd, name, value, size, flags))
ON_FD(fstat, "fstat", (int fd, struct stat *status), (fd, status))
ON_FD(fstat64, "fstat", (int fd, struct stat64 *status), (fd, status))

int close(int fd) {
    REAL(int, close, int)
    int judged = is_ours_open(fd) ? verdict("close") : 0;
    int result = real(fd); /* whatever it reports, the descriptor is gone */
    if (judged > 0) {
        errno = judged;
        return -1;
    }
    return result;
}

ssize_t fgetxattr(int fd, const char *name, void *value, size_t size) {
    REAL(ssize_t, fgetxattr, int, const char *, void *, size_t)
    JUDGE(is_ours_open(fd), "fgetxattr")
    return real(fd, name, value, size);
}

/* Calls that may do a part. */
#define PART(name, call, pipe_call, socket_call, pointer, offset_declared, offset_type, offset_passed) \
    ssize_t name(int fd, pointer data, size_t size offset_declared) { \
        REAL(ssize_t, name, int, pointer, size_t offset_type) \
        const char *own_call = name_of(fd, pipe_call, socket_call, call); \
        JUDGE(own_call != NULL, own_call) \
        return real(fd, data, judged == HALF && size > 1 ? size / 2 : size offset_passed); \
    }
#define COMMA ,
PART(read, "read", "hear", "answer", void *, , , )
PART(write, "write", "say", "ask", const void *, , , )
PART(pread, "pread", "hear", "answer", void *, COMMA off_t from, COMMA off_t, COMMA from)
PART(pread64, "pread", "hear", "answer", void *, COMMA off64_t from, COMMA off64_t, COMMA from)
PART(pwrite, "pwrite", "say", "ask", const void *, COMMA off_t from, COMMA off_t, COMMA from)
PART(pwrite64, "pwrite", "say", "ask", const void *, COMMA off64_t from, COMMA off64_t, COMMA from)

/* The same with vectors: half of the first piece is a part. */
#define PART_OF_VECTOR(name, call, type) \
    ssize_t name(int fd, const struct iovec *vector, int count, type from) { \
        REAL(ssize_t, name, int, const struct iovec *, int, type) \
        JUDGE(is_ours_open(fd), call) \
        struct iovec first = {vector[0].iov_base, vector[0].iov_len / 2}; \
        return judged == HALF && first.iov_len > 0 ? real(fd, &first, 1, from) : real(fd, vector, count, from); \
    }
PART_OF_VECTOR(preadv, "pread", off_t)
PART_OF_VECTOR(preadv64, "pread", off64_t)
PART_OF_VECTOR(pwritev, "pwrite", off_t)
PART_OF_VECTOR(pwritev64, "pwrite", off64_t)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        REAL(int, name, const char *, int, ...) \
        JUDGE(is_ours(AT_FDCWD, path), flags & O_CREAT ? "create" : "open") \
        return real(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        REAL(int, name, int, const char *, int, ...) \
        JUDGE(is_ours(at, path), flags & O_CREAT ? "create" : "open") \
        return real(at, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define LOCKS(name) \
    int name(int fd, int command, ...) { \
        va_list rest; \
        va_start(rest, command); \
        void *argument = va_arg(rest, void *); \
        va_end(rest); \
        REAL(int, name, int, int, ...) \
        JUDGE((command == F_OFD_GETLK || command == F_OFD_SETLK) && is_ours_open(fd), \
              command == F_OFD_GETLK ? "getlk" : "setlk") \
        return real(fd, command, argument); \
    }
LOCKS(fcntl)
LOCKS(fcntl64)

int linkat(int from, const char *name, int to, const char *place, int flags) {
    REAL(int, linkat, int, const char *, int, const char *, int)
    JUDGE(is_ours(to, place), "linkat")
    return real(from, name, to, place, flags);
}

int unlinkat(int at, const char *name, int flags) {
    REAL(int, unlinkat, int, const char *, int)
    JUDGE(is_ours(at, name), "unlinkat")
    return real(at, name, flags);
}

int unlink(const char *name) {
    REAL(int, unlink, const char *)
    JUDGE(is_ours(AT_FDCWD, name), "unlinkat")
    return real(name);
}

int renameat2(int from, const char *name, int to, const char *place, unsigned int flags) {
    REAL(int, renameat2, int, const char *, int, const char *, unsigned int)
    JUDGE(is_ours(to, place), "renameat2")
    return real(from, name, to, place, flags);
}

int renameat(int from, const char *name, int to, const char *place) {
    REAL(int, renameat, int, const char *, int, const char *)
    JUDGE(is_ours(to, place), "renameat")
    return real(from, name, to, place);
}

#define STAT(name, type) \
    int name(const char *path, type *status) { \
        REAL(int, name, const char *, type *) \
        JUDGE(is_ours(AT_FDCWD, path), "stat") \
        return real(path, status); \
    }
STAT(stat, struct stat)
STAT(stat64, struct stat64)
STAT(lstat, struct stat)
STAT(lstat64, struct stat64)
STAT(statvfs, struct statvfs)
STAT(statvfs64, struct statvfs64)

#define STATAT(name, type) \
    int name(int at, const char *path, type *status, int flags) { \
        REAL(int, name, int, const char *, type *, int) \
        JUDGE(is_ours(at, path), "stat") \
        return real(at, path, status, flags); \
    }
STATAT(fstatat, struct stat)
STATAT(fstatat64, struct stat64)

int access(const char *path, int mode) {
    REAL(int, access, const char *, int)
    JUDGE(is_ours(AT_FDCWD, path), "access")
    return real(path, mode);
}

struct dirent64 *readdir64(DIR *list) {
    REAL(struct dirent64 *, readdir64, DIR *)
    int judged = is_ours_open(dirfd(list)) ? verdict("readdir") : 0;
    if (judged > 0) {
        errno = judged;
        return NULL;
    }
    return real(list);
}

/* What concerns processes. */
pid_t fork(void) {
    REAL(pid_t, fork, void)
    JUDGE(pid_at_begin != 0, "fork")
    return real();
}

int kill(pid_t pid, int number) {
    REAL(int, kill, pid_t, int)
    JUDGE(pid_at_begin != 0, "kill")
    return real(pid, number);
}

pid_t waitpid(pid_t pid, int *status, int options) {
    REAL(pid_t, waitpid, pid_t, int *, int)
    JUDGE(pid_at_begin != 0 && !(options & WNOHANG), "wait")
    return real(pid, status, options);
}
