/* A CUDA runtime without a GPU, for tests: "device" memory is host memory that only copies and kernels may touch.
 *
 * Invariant: it is as lazy as a GPU may be, and stricter. Copies and kernels are done when the stream is synchronised,
 * not before; copies take pinned memory only; every address is checked against what was allocated; allocating during a
 * capture, or synchronising the captured stream, spoils the capture. Every call is written to a log, and any can be made to fail.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { INVALID = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, BAD_HANDLE = 400, ILLEGAL_ADDRESS = 700 };
enum { CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901 };
enum { DEVICE = 0, PINNED = 1, STREAM = 2, GRAPH = 3, EXEC = 4, KINDS = 5 };
enum { MAX_THINGS = 4096, MAX_OPS = 256, LOG_BYTES = 1 << 18 };

typedef struct { void *dst; const void *src; size_t bytes; float factor; int kernel; } Op;
typedef struct { Op ops[MAX_OPS]; int count; } List;
typedef struct { void *address; size_t bytes; int kind; } Thing;
typedef struct { List queue, captured; int capturing, spoilt; pthread_t capturer; } Stream;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Thing things[MAX_THINGS];
static int thing_count, devices = 1;
static char log_text[LOG_BYTES];
static size_t log_end;
static struct { char call[64]; int code, skip; } failure;
static size_t capacity = (size_t)1 << 30;

/* 0, or the error that a test asked for. */
static int enter(const char *call) {
    if (log_end + strlen(call) + 2 < LOG_BYTES) log_end += (size_t)sprintf(log_text + log_end, "%s ", call);
    if (strcmp(call, failure.call) || failure.skip-- > 0) return 0;
    failure.call[0] = 0;
    return failure.code;
}

static Thing *thing_at(const void *address, int kind) {
    for (int i = 0; i < thing_count; i++)
        if (things[i].kind == kind && things[i].address == address) return &things[i];
    return NULL;
}

static int holds(const void *address, size_t bytes, int kind) {
    for (int i = 0; i < thing_count; i++) {
        const char *start = things[i].address;
        if (things[i].kind == kind && (const char *)address >= start && (const char *)address + bytes <= start + things[i].bytes)
            return 1;
    }
    return 0;
}

static int add(void **out, size_t bytes, int kind) {
    if (thing_count == MAX_THINGS) return OUT_OF_MEMORY;
    void *address = calloc(1, bytes ? bytes : 1);
    if (kind == DEVICE || kind == PINNED) memset(address, 0xAB, bytes); /* nobody may rely on zeros */
    things[thing_count++] = (Thing){address, bytes, kind};
    *out = address;
    return 0;
}

static int drop(void *address, int kind) {
    Thing *thing = thing_at(address, kind);
    if (!thing) return kind == STREAM || kind == GRAPH || kind == EXEC ? BAD_HANDLE : INVALID;
    free(address);
    *thing = things[--thing_count];
    return 0;
}

/* What CUDA forbids a thread while it captures spoils its capture; other threads may go on (thread-local mode). */
static int forbidden_now(void) {
    int found = 0;
    for (int i = 0; i < thing_count; i++) {
        if (things[i].kind != STREAM) continue;
        Stream *stream = things[i].address;
        if (stream->capturing && pthread_equal(stream->capturer, pthread_self())) stream->spoilt = found = 1;
    }
    return found ? CAPTURE_UNSUPPORTED : 0;
}

static int check(const Op *op, int kernel, int copy_kind) {
    int source = kernel || copy_kind == 2 ? DEVICE : PINNED, target = kernel || copy_kind == 1 ? DEVICE : PINNED;
    return holds(op->src, op->bytes, source) && holds(op->dst, op->bytes, target) ? 0 : INVALID;
}

static int push(void *handle, Op op) {
    if (!thing_at(handle, STREAM)) return BAD_HANDLE;
    Stream *stream = handle;
    List *list = stream->capturing ? &stream->captured : &stream->queue;
    if (stream->spoilt) return CAPTURE_INVALIDATED;
    if (list->count == MAX_OPS) return OUT_OF_MEMORY;
    list->ops[list->count++] = op;
    return 0;
}

static int done(const Op *op) {
    int alive = (holds(op->src, op->bytes, DEVICE) || holds(op->src, op->bytes, PINNED)) &&
                (holds(op->dst, op->bytes, DEVICE) || holds(op->dst, op->bytes, PINNED));
    if (!alive) return ILLEGAL_ADDRESS;
    if (!op->kernel) memcpy(op->dst, op->src, op->bytes);
    else for (size_t i = 0; i < op->bytes / sizeof(float); i++) ((float *)op->dst)[i] = ((const float *)op->src)[i] * op->factor;
    return 0;
}

#define CALL(...) { \
    int status; \
    pthread_mutex_lock(&lock); \
    if (!(status = enter(__func__))) { __VA_ARGS__ } \
    pthread_mutex_unlock(&lock); \
    return status; \
}

static size_t used(void) {
    size_t sum = 0;
    for (int i = 0; i < thing_count; i++) if (things[i].kind == DEVICE) sum += things[i].bytes;
    return sum;
}

int cudaMalloc(void **out, size_t bytes) CALL(
    if (!(status = forbidden_now())) status = bytes + used() > capacity ? OUT_OF_MEMORY : add(out, bytes, DEVICE);)
int cudaFree(void *address) CALL(if (!(status = forbidden_now())) status = drop(address, DEVICE);)
int cudaHostAlloc(void **out, size_t bytes, unsigned flags) CALL(
    if (!(status = forbidden_now())) status = flags ? INVALID : add(out, bytes, PINNED);)
int cudaFreeHost(void *address) CALL(if (!(status = forbidden_now())) status = drop(address, PINNED);)
int cudaStreamCreateWithFlags(void **out, unsigned flags) CALL(status = flags == 1 ? add(out, sizeof(Stream), STREAM) : INVALID;)
int cudaStreamDestroy(void *stream) CALL(status = drop(stream, STREAM);)
int cudaMemcpyAsync(void *dst, const void *src, size_t bytes, int kind, void *stream) CALL(
    Op op = {dst, src, bytes, 0, 0};
    if (!(status = check(&op, 0, kind))) status = push(stream, op);)
int cudaStreamSynchronize(void *handle) CALL(
    Stream *stream = handle;
    if (!thing_at(handle, STREAM)) status = BAD_HANDLE;
    else if (stream->capturing) { stream->spoilt = 1; status = CAPTURE_UNSUPPORTED; }
    else {
        for (int i = 0; i < stream->queue.count && !status; i++) status = done(&stream->queue.ops[i]);
        stream->queue.count = 0;
    })
int cudaStreamBeginCapture(void *handle, int mode) CALL(
    Stream *stream = handle;
    if (!thing_at(handle, STREAM) || mode != 1 || stream->capturing) status = CAPTURE_UNSUPPORTED;
    else { stream->capturing = 1; stream->capturer = pthread_self(); stream->spoilt = 0; stream->captured.count = 0; })
int cudaStreamEndCapture(void *handle, void **graph) { /* the capture is over, whatever this answers */
    pthread_mutex_lock(&lock);
    int status = enter(__func__);
    Stream *stream = thing_at(handle, STREAM) ? handle : NULL;
    *graph = NULL;
    if (!status && (!stream || !stream->capturing || stream->spoilt)) status = CAPTURE_INVALIDATED;
    if (!status && stream->captured.count && !(status = add(graph, sizeof(List), GRAPH))) *(List *)*graph = stream->captured;
    if (stream) stream->capturing = stream->spoilt = 0;
    pthread_mutex_unlock(&lock);
    return status;
}
int cudaGraphInstantiate(void **exec, void *graph, unsigned long long flags) CALL(
    if (!thing_at(graph, GRAPH) || flags) status = INVALID;
    else if (!(status = add(exec, sizeof(List), EXEC))) *(List *)*exec = *(List *)graph;)
int cudaGraphDestroy(void *graph) CALL(status = drop(graph, GRAPH);)
int cudaGraphExecDestroy(void *exec) CALL(status = drop(exec, EXEC);)
int cudaGraphLaunch(void *exec, void *stream) CALL(
    if (!thing_at(exec, EXEC)) status = BAD_HANDLE;
    else for (int i = 0; i < ((List *)exec)->count && !status; i++) status = push(stream, ((List *)exec)->ops[i]);)
int cudaGetDeviceCount(int *count) CALL(*count = devices; status = devices ? 0 : NO_DEVICE;)
int cudaGetDeviceProperties_v2(void *properties, int device) CALL(
    if (device) status = INVALID; else strcpy(properties, "Fake GPU 9000");)
int cudaDeviceGetAttribute(int *value, int attribute, int device) CALL(
    if (device || attribute < 75 || attribute > 76) status = INVALID; else *value = attribute == 75 ? 8 : 7;)
int cudaDriverGetVersion(int *version) CALL(*version = 13020;)
int cudaRuntimeGetVersion(int *version) CALL(*version = 12060;)
int cudaMemGetInfo(size_t *free_bytes, size_t *total) CALL(*free_bytes = capacity - used(); *total = capacity;)
const char *cudaGetErrorName(int code) {
    switch (code) {
    case INVALID: return "cudaErrorInvalidValue";
    case OUT_OF_MEMORY: return "cudaErrorMemoryAllocation";
    case NO_DEVICE: return "cudaErrorNoDevice";
    case ILLEGAL_ADDRESS: return "cudaErrorIllegalAddress";
    case CAPTURE_UNSUPPORTED: return "cudaErrorStreamCaptureUnsupported";
    case CAPTURE_INVALIDATED: return "cudaErrorStreamCaptureInvalidated";
    default: return "cudaErrorUnknown";
    }
}

/* What tests and the fake TensorRT use; no part of CUDA. */
int fake_scale(void *dst, const void *src, size_t bytes, float factor, void *stream) CALL(
    Op op = {dst, src, bytes, factor, 1};
    if (!(status = check(&op, 1, 0))) status = push(stream, op);)
int fake_live(int kind) {
    int count = 0;
    for (int i = 0; i < thing_count; i++) count += things[i].kind == kind;
    return count;
}
const char *fake_log(void) { return log_text; }
void fake_clear_log(void) { log_end = 0; log_text[0] = 0; }
void fake_fail(const char *call, int code, int skip) {
    snprintf(failure.call, sizeof failure.call, "%s", call);
    failure.code = code;
    failure.skip = skip;
}
void fake_limits(int device_count, size_t bytes) { devices = device_count; capacity = bytes; }
void fake_reset(void) {
    while (thing_count) drop(things[0].address, things[0].kind);
    fake_clear_log();
    failure.call[0] = 0;
    fake_limits(1, (size_t)1 << 30);
}
