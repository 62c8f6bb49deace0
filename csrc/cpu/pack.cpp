#include <algorithm>
#include <mutex>
#include <numeric>

#include "drivers.h"

namespace cram {
namespace {

// One task a block of rows whose metadata lie together; scratch: one byte a group.
template <class Kernel>
void for_blocks_of_rows(const Context& c, const std::vector<PackItem>& items, Kernel kernel) {
  struct Block {
    const PackItem* item;
    int64_t begin;
  };
  std::vector<Block> blocks;
  int64_t widest = 0;
  for (const PackItem& item : items) {
    if (item.cols == 0) continue;
    widest = std::max(widest, rows_multiple(item.slot) * item.cols / 2);
    for (int64_t row = 0; row < item.rows; row += rows_multiple(item.slot)) blocks.push_back({&item, row});
  }
  std::vector<std::vector<uint8_t>> places(c.pool.threads, std::vector<uint8_t>(widest));
  for_tasks(c.pool, blocks.size(), [&](int worker, int64_t task) { kernel(*blocks[task].item, blocks[task].begin, places[worker].data()); });
}

}  // namespace

void pack_24(const Context& c, const std::vector<PackItem>& items) { for_blocks_of_rows(c, items, c.kernels.pack_24); }

void unpack_24(const Context& c, const std::vector<PackItem>& items) { for_blocks_of_rows(c, items, c.kernels.unpack_24); }

void nm_violations(const Context& c, const std::vector<GroupItem>& items, int n, int m, Violations* found) {
  struct Part {
    size_t item;
    int64_t begin, end;
  };
  std::vector<Part> parts;
  for (size_t i = 0; i < items.size(); ++i) {
    const int64_t tile = m * items[i].inner;
    const int64_t step = tile == 0 ? 0 : std::max<int64_t>(1, kChunk / tile) * tile;
    for (int64_t begin = 0; begin < items[i].numel; begin += step) parts.push_back({i, begin, std::min(begin + step, items[i].numel)});
  }
  std::mutex sum;
  for_tasks(c.pool, parts.size(), [&](int, int64_t task) {
    const Part& part = parts[task];
    Violations own;
    c.kernels.violations(items[part.item], part.begin, part.end, n, m, own);
    const std::lock_guard<std::mutex> lock(sum);
    Violations& total = found[part.item];
    total.groups += own.groups;
    total.nonzeros += own.nonzeros;
    total.first = std::min(total.first, own.first);
  });
}

}  // namespace cram
