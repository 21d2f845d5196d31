/* NVIDIA's library as far as the doctor calls it: two cards, the second an old one that has neither MIG nor ECC. */
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned long long total, free, used; } memory_t;

int nvmlInit_v2(void) { return getenv("NVML_FAILS") ? 18 : 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 18 ? "Driver/library version mismatch" : "Not Supported"; }
int nvmlSystemGetDriverVersion(char *out, unsigned length) { strncpy(out, "550.54.15", length); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 12040; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { *handle = (void *)(long)(index + 1); return 0; }
static int is_old(void *handle) { return handle == (void *)2; }
int nvmlDeviceGetName(void *handle, char *out, unsigned length) {
  strncpy(out, is_old(handle) ? "Tesla T4" : "NVIDIA H100 80GB HBM3", length);
  return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, memory_t *out) {
  out->total = is_old(handle) ? 15360ULL << 20 : 81559ULL << 20;
  out->free = out->total - (200ULL << 20);
  out->used = 200ULL << 20;
  return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
  *major = is_old(handle) ? 7 : 9;
  *minor = is_old(handle) ? 5 : 0;
  return 0;
}
int nvmlDeviceGetComputeMode(void *handle, unsigned *mode) { *mode = 0; return 0; }
int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
  if (is_old(handle)) return 3;
  *current = *pending = getenv("NVML_MIG") ? 1 : 0;
  return 0;
}
