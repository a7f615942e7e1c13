/* Memory, streams and events of the imitated card.
 *
 * Memory of the device is memory of the host, and is counted. A copy from page-locked memory on a
 * stream of its own is made late: when something waits for that stream, or asks about it. So what
 * reads too early, or writes over the source too early, finds wrong values. All else is done at once.
 */
#define _GNU_SOURCE
#include "card.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum {
  PAGES = 2 << 20, /* bytes: a device gives memory out in such pieces */
  LARGE = 1 << 20, /* bytes from which an idle card copies nothing */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* --- memory */

enum kind { DEVICE, HOST };
struct block {
  char *start;
  size_t size;
  enum kind kind;
  struct block *next;
};
static struct block *blocks;
static size_t used;

size_t total_memory(void) {
  const char *gigabytes = getenv("IMITATED_CARD_GB");
  return (gigabytes ? atof(gigabytes) : 80) * (1 << 30);
}

static struct block *block_of(const void *pointer) {
  for (struct block *b = blocks; b; b = b->next)
    if ((char *)pointer >= b->start && (char *)pointer < b->start + b->size) return b;
  return NULL;
}

static void add(void *start, size_t size, enum kind kind) {
  struct block *b = malloc(sizeof *b);
  pthread_mutex_lock(&lock);
  *b = (struct block){start, size, kind, blocks};
  blocks = b;
  pthread_mutex_unlock(&lock);
}

static int taken(size_t size) { /* memory of the device; 0 if there is not as much */
  pthread_mutex_lock(&lock);
  int fits = used + size <= total_memory();
  if (fits) used += size;
  pthread_mutex_unlock(&lock);
  return fits;
}

static size_t removed(void *start) {
  size_t size = 0;
  pthread_mutex_lock(&lock);
  for (struct block **b = &blocks; *b; b = &(*b)->next)
    if ((*b)->start == start) {
      struct block *gone = *b;
      size = gone->size;
      if (gone->kind == DEVICE) used -= size;
      *b = gone->next;
      free(gone);
      break;
    }
  pthread_mutex_unlock(&lock);
  return size;
}

static cudaError_t allocate(void **pointer, size_t size, enum kind kind) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  *pointer = NULL;
  if (!size) return cudaSuccess;
  size = (size + PAGES - 1) / PAGES * PAGES;
  if (kind == DEVICE && !taken(size)) return failed(cudaErrorMemoryAllocation);
  void *start = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (start == MAP_FAILED) abort(); /* the machine's own lack of memory */
  add(start, size, kind);
  *pointer = start;
  return cudaSuccess;
}

static void copy_all(void);

static cudaError_t release(void *pointer) {
  if (!pointer) return cudaSuccess;
  copy_all();
  size_t size = removed(pointer);
  if (!size) return failed(cudaErrorInvalidValue);
  munmap(pointer, size);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void **pointer, size_t size) { return allocate(pointer, size, DEVICE); }
cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
  return allocate(pointer, size, HOST);
}
cudaError_t cudaFree(void *pointer) { return release(pointer); }
cudaError_t cudaFreeHost(void *pointer) { return release(pointer); }

cudaError_t cudaHostRegister(void *pointer, size_t size, unsigned flags) {
  if (is_on_device(pointer) != -1) return failed(cudaErrorHostMemoryAlreadyRegistered);
  add(pointer, size, HOST);
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *pointer) {
  copy_all();
  return removed(pointer) ? cudaSuccess : failed(cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaMemGetInfo(size_t *free_, size_t *total_) {
  pthread_mutex_lock(&lock);
  *total_ = total_memory();
  *free_ = *total_ - used;
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

int is_on_device(const void *pointer) {
  pthread_mutex_lock(&lock);
  struct block *b = block_of(pointer);
  int found = b ? b->kind == DEVICE : -1;
  pthread_mutex_unlock(&lock);
  return found;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
  int device = is_on_device(pointer);
  memset(found, 0, sizeof *found);
  found->type = device == 1   ? cudaMemoryTypeDevice
                : device == 0 ? cudaMemoryTypeHost
                              : cudaMemoryTypeUnregistered;
  if (device == -1) found->device = -2;
  if (device != -1) found->devicePointer = (void *)pointer;
  if (device == 0) found->hostPointer = (void *)pointer;
  return cudaSuccess;
}

/* --- streams: late copies, in the order of their arrival */

struct copy {
  char *target;
  const char *source;
  size_t size;
  cudaStream_t stream;
  struct copy *next;
};
static struct copy *copies, **end = &copies; /* where the next one goes */
static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER;
static long streams = 16; /* the next handle; CUDA's own special ones are below */

static void copy_now(cudaStream_t stream, int all) {
  struct copy **next = &copies;
  pthread_mutex_lock(&order);
  while (*next) {
    struct copy *c = *next;
    if (all || c->stream == stream) {
      memcpy(c->target, c->source, c->size);
      *next = c->next;
      free(c);
    } else
      next = &c->next;
  }
  end = next;
  pthread_mutex_unlock(&order);
}

static void copy_all(void) { copy_now(NULL, 1); }

cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (size >= LARGE && getenv("IMITATED_CARD_IDLE")) return cudaSuccess;
  if (stream && kind == cudaMemcpyHostToDevice && !is_on_device(source)) {
    struct copy *c = malloc(sizeof *c);
    *c = (struct copy){target, source, size, stream, NULL};
    pthread_mutex_lock(&order);
    *end = c;
    end = &c->next;
    pthread_mutex_unlock(&order);
    return cudaSuccess;
  }
  copy_now(stream, 0);
  memmove(target, source, size);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *target, const void *source, size_t size, enum cudaMemcpyKind kind) {
  copy_all();
  memmove(target, source, size);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *target, int value, size_t size, cudaStream_t stream) {
  copy_now(stream, 0);
  memset(target, value, size);
  return cudaSuccess;
}

cudaError_t cudaMemset(void *target, int value, size_t size) {
  return cudaMemsetAsync(target, value, size, NULL);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  *stream = (cudaStream_t)(streams++ << 4);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  copy_now(stream, 0);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaStreamSynchronize(stream); }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }
cudaError_t cudaDeviceSynchronize(void) {
  copy_all();
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, ...) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

/* An event knows its stream. What was enqueued there after it is copied too early, never too late. */
struct CUevent_st {
  cudaStream_t stream;
  struct timespec time;
};

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  *event = calloc(1, sizeof **event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  free(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->stream = stream;
  clock_gettime(CLOCK_MONOTONIC, &event->time);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaStreamSynchronize(event->stream); }
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaStreamSynchronize(event->stream); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  return cudaStreamSynchronize(event->stream);
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = (end->time.tv_sec - start->time.tv_sec) * 1e3 +
                  (end->time.tv_nsec - start->time.tv_nsec) * 1e-6;
  return cudaSuccess;
}
