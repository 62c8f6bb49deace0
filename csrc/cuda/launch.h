// Launches: as many blocks as are resident at once, on the stream that was asked for, every error named.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "table.h"

namespace cram {
namespace cuda {

inline void require_success(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": CUDA says " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
}

// Blocks of kThreads of this kernel that the current device runs at a time. Only what takes time to find out is remembered: tests change the number
// of multiprocessors.
inline int64_t resident_blocks(const void* kernel, const char* name) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;  // blocks of a multiprocessor
  int device = 0, processors = 0;
  require_success(cudaGetDevice(&device), name);
  require_success(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), name);
  const std::lock_guard<std::mutex> lock(mutex);
  int& blocks = known[{kernel, device}];
  if (blocks == 0) require_success(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0), name);
  return std::max<int64_t>(1, static_cast<int64_t>(processors) * blocks);
}

// Bytes of the current device's second-level cache.
inline int64_t second_level_cache(const char* name) {
  int device = 0, bytes = 0;
  require_success(cudaGetDevice(&device), name);
  require_success(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device), name);
  return bytes;
}

// At most `tasks` blocks, which share the tasks out among themselves, and at least one: it raises the flag.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t tasks, cudaStream_t stream, const Arguments&... arguments) {
  const int64_t blocks = std::max<int64_t>(1, std::min(tasks, resident_blocks(reinterpret_cast<const void*>(kernel), name)));
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arguments...);
  require_success(cudaGetLastError(), name);
}

}  // namespace cuda
}  // namespace cram
