// Work shared among threads, torch-free: the library hands in torch's own pool, the thread-sanitizer harness a std::thread one.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <vector>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "../item.h"
#include "../plain_arithmetic.h"

namespace cram {

struct Pool {
  int threads;
  // Runs body(context, worker) for each worker in [0, threads), and returns when all are done. The body must not throw.
  void (*run)(int threads, void (*body)(void* context, int worker), void* context);
};

// Stores that bypass the cache are ordered before whatever the worker signals next.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// body(worker) for each worker; what one of them throws is thrown again when all are done.
template <class Body>
void parallel(const Pool& pool, Body body) {
  struct Shared {
    Body& body;
    std::atomic<bool> failed;
    std::exception_ptr error;
  } shared = {body, {false}, nullptr};
  pool.run(
      pool.threads,
      [](void* context, int worker) {
        Shared& shared = *static_cast<Shared*>(context);
        PlainArithmetic plain;
        try {
          shared.body(worker);
          finish_streaming();
        } catch (...) {
          if (!shared.failed.exchange(true)) shared.error = std::current_exception();
        }
      },
      &shared);
  if (shared.error) std::rethrow_exception(shared.error);
}

// body(worker, task) for each task in [0, tasks), each handed to the next free worker.
template <class Body>
void for_tasks(const Pool& pool, int64_t tasks, Body body) {
  std::atomic<int64_t> next{0};
  Pool team = pool;
  if (tasks < team.threads) team.threads = tasks < 1 ? 1 : static_cast<int>(tasks);
  parallel(team, [&](int worker) {
    for (int64_t task = next++; task < tasks; task = next++) body(worker, task);
  });
}

// The same where neighbouring tasks share something: each worker begins with a stretch of its own, then takes from the ends of what others have left.
template <class Body>
void for_stretches(const Pool& pool, int64_t tasks, Body body) {
  if (tasks >> 32) return for_tasks(pool, tasks, body);  // a stretch holds numbers of tasks in 32 bits
  struct alignas(64) Stretch {
    std::atomic<uint64_t> left;  // first task, and 2^32 times the one behind the last
  };
  Pool team = pool;
  if (tasks < team.threads) team.threads = tasks < 1 ? 1 : static_cast<int>(tasks);
  if (team.threads == 1)
    return parallel(team, [&](int worker) {
      for (int64_t task = 0; task < tasks; ++task) body(worker, task);
    });
  std::vector<Stretch> stretches(static_cast<size_t>(team.threads));
  for (int64_t w = 0; w < team.threads; ++w)
    stretches[w].left = static_cast<uint64_t>((w + 1) * tasks / team.threads) << 32 | static_cast<uint64_t>(w * tasks / team.threads);
  parallel(team, [&](int worker) {
    for (int i = 0; i < team.threads; ++i) {
      std::atomic<uint64_t>& left = stretches[(worker + i) % team.threads].left;
      for (uint64_t seen = left; (seen & 0xffffffff) < seen >> 32;) {
        const uint64_t first = seen & 0xffffffff, stop = seen >> 32, taken = (stop - first) / 8 + 1;  // few steps, since each waits for all stores
        if (!left.compare_exchange_weak(seen, i == 0 ? seen + taken : seen - (taken << 32))) continue;
        for (uint64_t k = 0; k < taken; ++k) body(worker, static_cast<int64_t>(i == 0 ? first + k : stop - taken + k));
        seen = left;
      }
    }
  });
}

// A count for each bin of a histogram.
using Bins = std::vector<int64_t>;

// Adds the bins of every worker up in the first one's.
inline void add_up(const Pool& pool, std::vector<Bins>& bins) {
  constexpr int64_t kSlice = 4096;
  const int64_t size = static_cast<int64_t>(bins[0].size());
  for_tasks(pool, (size + kSlice - 1) / kSlice, [&](int, int64_t slice) {
    const int64_t begin = slice * kSlice, end = begin + kSlice < size ? begin + kSlice : size;
    for (size_t worker = 1; worker < bins.size(); ++worker)
      for (int64_t bin = begin; bin < end; ++bin) bins[0][bin] += bins[worker][bin];
  });
}

struct Range {
  int32_t item;
  int64_t begin, end;
};

constexpr int64_t kChunk = 32768;  // weights: 128 KB of fp32; offsets in it fit 16 bits

// Cuts the items for which size(item) > 0 into ranges of size(item) weights.
template <class Size>
std::vector<Range> cut(const std::vector<Item>& items, Size size) {
  std::vector<Range> ranges;
  for (size_t i = 0; i < items.size(); ++i) {
    const int64_t step = size(items[i]);
    if (step <= 0) continue;
    for (int64_t begin = 0; begin < items[i].numel; begin += step)
      ranges.push_back({static_cast<int32_t>(i), begin, begin + step < items[i].numel ? begin + step : items[i].numel});
  }
  return ranges;
}

inline std::vector<Range> cut(const std::vector<Item>& items) {
  return cut(items, [](const Item&) { return kChunk; });
}

}  // namespace cram
