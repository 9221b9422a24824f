/* A stand-in for NVIDIA's management library, with a stated power curve. The tests compile it and the real bindings
 * (nvidia-ml-py) load it. Its devices live in the file that FAKE_NVML names, which is mapped into every process that
 * loads this: a power cap survives the process that set it, as it does in a driver. tests/fake_nvml.py is its other
 * side: it knows the layout of that file, and what the curve integrates to.
 *
 * A device draws, without a cap, base_w * (1 + swing * sin(2 pi t / period_s)) watts at the time t. A cap or a clock
 * lock slows it to the speed f (1 = free), at which it draws idle_w + (demand - idle_w) * f^3; a cap chooses the
 * largest f that keeps within it. The counter of energy is the integral, in steps of a millisecond.
 */
#include <fcntl.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, LOST = 15 };

typedef struct {
    double limit_w, least_w, most_w, clock_mhz, most_mhz, base_w, swing, period_s, idle_w, celsius;
    double counted_to_s, millijoules;
    int64_t no_energy, no_power, no_cap, no_clock, lost, writes;
} Device;

typedef struct {
    double now_s;                 /* the time, if it is not the real one */
    double wraps_at_mj;           /* 0 = 64 bits */
    int64_t real_time, count, init_fails, no_permission;
    Device devices[8];
} State;

static State *state;

static double now(void) {
    struct timespec t;
    if (!state->real_time) return state->now_s;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static double demand(Device *d, double t) { return d->base_w * (1 + d->swing * sin(2 * M_PI * t / d->period_s)); }

static double speed(Device *d, double t) {
    double free_w = demand(d, t), f = 1;
    if (d->clock_mhz > 0) f = d->clock_mhz / d->most_mhz;
    if (d->limit_w < free_w) f = fmin(f, cbrt(fmax(d->limit_w - d->idle_w, 0) / (free_w - d->idle_w)));
    return f;
}

static double watts(Device *d, double t) {
    double f = speed(d, t);
    return d->idle_w + (demand(d, t) - d->idle_w) * f * f * f;
}

static void count(Device *d) {
    double to = now();
    while (d->counted_to_s < to) {
        double step = fmin(1e-3, to - d->counted_to_s);
        d->millijoules += 1e3 * step * watts(d, d->counted_to_s + step / 2);
        d->counted_to_s += step;
    }
}

double fake_speed(int index) { return speed(&state->devices[index], now()); }

int nvmlInitWithFlags(unsigned flags) {
    const char *path = getenv("FAKE_NVML");
    if (!state) {
        int file = path ? open(path, O_RDWR) : -1;
        if (file < 0) return 9;
        state = mmap(NULL, sizeof(State), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        close(file);
    }
    return (int)state->init_fails;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return OK; }
/* The next nvmlInit reads FAKE_NVML again; without it there is no driver. */
void fake_forget(void) { state = NULL; }

const char *nvmlErrorString(int code) { return code == LOST ? "GPU is lost" : "the stand-in refuses"; }

int nvmlDeviceGetCount_v2(unsigned *out) { *out = (unsigned)state->count; return OK; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    if (index >= state->count) return INVALID;
    *out = &state->devices[index];
    return OK;
}

int nvmlDeviceGetUUID(Device *d, char *out, unsigned length) {
    snprintf(out, length, "GPU-0000000%d", (int)(d - state->devices));
    return OK;
}

int nvmlDeviceGetName(Device *d, char *out, unsigned length) { (void)d; snprintf(out, length, "Stand-in"); return OK; }

int nvmlDeviceGetTotalEnergyConsumption(Device *d, unsigned long long *out) {
    if (d->lost) return LOST;
    if (d->no_energy) return NOT_SUPPORTED;
    count(d);
    *out = (unsigned long long)(state->wraps_at_mj > 0 ? fmod(d->millijoules, state->wraps_at_mj) : d->millijoules);
    return OK;
}

int nvmlDeviceGetPowerUsage(Device *d, unsigned *out) {
    if (d->lost) return LOST;
    if (d->no_power) return NOT_SUPPORTED;
    *out = (unsigned)(1e3 * watts(d, now()));
    return OK;
}

int nvmlDeviceGetTemperature(Device *d, int sensor, unsigned *out) {
    (void)sensor;
    if (d->lost) return LOST;
    *out = (unsigned)d->celsius;
    return OK;
}

int nvmlDeviceGetTemperatureThreshold(Device *d, int which, unsigned *out) {
    (void)d; (void)which;
    *out = 90;
    return OK;
}

int nvmlDeviceGetPowerManagementLimit(Device *d, unsigned *out) {
    if (d->lost) return LOST;
    if (d->no_cap) return NOT_SUPPORTED;
    *out = (unsigned)(1e3 * d->limit_w);
    return OK;
}

int nvmlDeviceGetPowerManagementLimitConstraints(Device *d, unsigned *least, unsigned *most) {
    if (d->no_cap) return NOT_SUPPORTED;
    *least = (unsigned)(1e3 * d->least_w);
    *most = (unsigned)(1e3 * d->most_w);
    return OK;
}

int nvmlDeviceSetPowerManagementLimit(Device *d, unsigned milliwatts) {
    if (d->lost) return LOST;
    if (d->no_cap) return NOT_SUPPORTED;
    if (state->no_permission) return NO_PERMISSION;
    if (milliwatts < 1e3 * d->least_w || milliwatts > 1e3 * d->most_w) return INVALID;
    count(d);
    d->limit_w = milliwatts / 1e3;
    d->writes++;
    return OK;
}

int nvmlDeviceGetMaxClockInfo(Device *d, int which, unsigned *out) {
    (void)which;
    if (d->no_clock) return NOT_SUPPORTED;
    *out = (unsigned)d->most_mhz;
    return OK;
}

int nvmlDeviceSetGpuLockedClocks(Device *d, unsigned least, unsigned most) {
    (void)least;
    if (d->lost) return LOST;
    if (d->no_clock) return NOT_SUPPORTED;
    if (state->no_permission) return NO_PERMISSION;
    count(d);
    d->clock_mhz = most;
    d->writes++;
    return OK;
}

int nvmlDeviceResetGpuLockedClocks(Device *d) {
    if (d->no_clock) return NOT_SUPPORTED;
    if (state->no_permission) return NO_PERMISSION;
    count(d);
    d->clock_mhz = 0;
    return OK;
}
