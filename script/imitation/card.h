/* What the parts of the imitated card know of each other. */
#include <driver_types.h>

cudaError_t failed(cudaError_t error); /* remembers it for cudaGetLastError */
size_t total_memory(void);             /* of the device, in bytes */
int is_on_device(const void *pointer); /* 1; 0 for page-locked memory, -1 for what CUDA lacks */
