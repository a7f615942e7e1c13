/* cuBLAS, cuBLASLt and cuDNN of the imitated card: they accept every shape, and compute nothing.
 *
 * What is not here returns 0, which is success in all three.
 */
#include <stdlib.h>
#include <string.h>

int cublasCreate_v2(void **handle) { return *handle = malloc(1), 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0; }
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0; }

size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtMatmulDescCreate(void **found, int compute, int scale) { return *found = malloc(1), 0; }
int cublasLtMatmulPreferenceCreate(void **found) { return *found = malloc(1), 0; }
int cublasLtMatrixLayoutCreate(void **found, int type, unsigned long rows, unsigned long columns,
                               long stride) {
  return *found = malloc(1), 0;
}
int cublasLtMatmulDescDestroy(void *gone) { return free(gone), 0; }
int cublasLtMatmulPreferenceDestroy(void *gone) { return free(gone), 0; }
int cublasLtMatrixLayoutDestroy(void *gone) { return free(gone), 0; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c, void *d,
                                   void *preference, int wanted, void *results, int *count) {
  memset(results, 0, 96); /* one algorithm, without a workspace */
  return *count = 1, 0;
}

size_t cudnnGetVersion(void) { return 99900; } /* later than what torch was built for */
size_t cudnnGetCudartVersion(void) { return 13000; }
int cudnnCreate(void **handle) { return *handle = malloc(1), 0; }
const char *cudnnGetErrorString(int error) { return "an imitated error"; }
void cudnnGetLastErrorString(char *text, size_t size) { memset(text, 0, size != 0); }
int cudnnBackendCreateDescriptor(int type, void **found) { return *found = calloc(1, 1024), 0; }
int cudnnBackendDestroyDescriptor(void *gone) { return free(gone), 0; }
int cudnnBackendGetAttribute(void *from, int name, int type, long wanted, long *count, void *found) {
  enum { INT64 = 3, DESCRIPTOR = 15 };
  if (count) *count = wanted == 1 || type == DESCRIPTOR; /* one engine, with one plan */
  if (found && wanted == 1 && type != DESCRIPTOR) memset(found, 0, type == INT64 ? 8 : 4);
  return 0;
}
