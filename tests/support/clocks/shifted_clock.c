/* Preloaded into a process: its wall clock is off by as many seconds as the file $SHIFTED_CLOCK says, which may change
 * at any moment. Clocks that nobody can set (CLOCK_MONOTONIC, CLOCK_BOOTTIME) stay. Waits until a time of the wall clock
 * are translated for the kernel, as it would itself translate them if the clock of the machine were set. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define EPOCH_S 1000000000 /* a later time is one of the wall clock: no machine has been up for 30 years */

static volatile int64_t *offset_s;
static int (*real_clock_gettime)(clockid_t, struct timespec *);
static int (*real_cond_timedwait)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
static int (*real_sem_timedwait)(sem_t *, const struct timespec *);
static long (*real_syscall)(long, ...);

__attribute__((constructor)) static void begin(void) {
    int fd = open(getenv("SHIFTED_CLOCK"), O_RDONLY | O_CLOEXEC);
    void *mapped = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    real_clock_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    real_cond_timedwait = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!real_cond_timedwait) real_cond_timedwait = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    real_sem_timedwait = dlsym(RTLD_NEXT, "sem_timedwait");
    real_syscall = dlsym(RTLD_NEXT, "syscall");
    if (mapped == MAP_FAILED || !real_clock_gettime || !real_cond_timedwait || !real_sem_timedwait || !real_syscall)
        _exit(99);
    offset_s = mapped;
}

static int is_wall(clockid_t clock) { return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE; }

static const struct timespec *real_time_of(const struct timespec *until, struct timespec *translated) {
    if (!until || until->tv_sec < EPOCH_S || !offset_s) return until;
    *translated = *until;
    translated->tv_sec -= *offset_s;
    return translated;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = real_clock_gettime ? real_clock_gettime(clock, now) : (int)syscall(SYS_clock_gettime, clock, now);
    if (!failed && offset_s && is_wall(clock)) now->tv_sec += *offset_s;
    return failed;
}

time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec found;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    struct timespec translated;
    return real_cond_timedwait(cond, mutex, real_time_of(until, &translated));
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    struct timespec translated;
    return real_sem_timedwait(semaphore, real_time_of(until, &translated));
}

long syscall(long number, ...) {
    va_list given;
    long a[6];
    struct timespec translated;
    va_start(given, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(given, long);
    va_end(given);
    if (number == SYS_futex && (a[1] & FUTEX_CLOCK_REALTIME))
        a[3] = (long)real_time_of((const struct timespec *)a[3], &translated);
    if (!real_syscall) real_syscall = dlsym(RTLD_NEXT, "syscall");
    return real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
