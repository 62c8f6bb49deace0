// Whether tensors of a call share memory that it writes: the last of the checks.
#include <algorithm>

#include "check.h"

namespace cram {

void Arguments::no_overlap() {
  if (!writes_) return;
  const Extent* last = nullptr;          // the one that reaches furthest
  const Extent* last_written = nullptr;  // likewise, of the written ones
  sort_starts();
  for (const Start& start : lists_.starts) {
    const Extent& e = lists_.extents[start.extent];
    const Extent* other = e.written ? last : last_written;
    if (other != nullptr && e.begin < other->end)
      refuse(e.place, "not share memory with " + show(other->place), "tensors that overlap (tied weights appear once in a list)");
    if (last == nullptr || e.end > last->end) last = &e;
    if (e.written && (last_written == nullptr || e.end > last_written->end)) last_written = &e;
  }
}

// By address. A radix sort, byte by byte: in whatever order an allocator gives out memory, thousands of tensors take a fraction of the time
// of std::sort.
void Arguments::sort_starts() {
  auto &starts = lists_.starts, &sorted = lists_.sorted;
  starts.clear();
  uintptr_t lowest = UINTPTR_MAX, highest = 0;
  for (const Extent& e : lists_.extents) {
    starts.push_back({e.begin, static_cast<uint32_t>(starts.size())});
    lowest = std::min(lowest, e.begin);
    highest = std::max(highest, e.begin);
  }
  sorted.resize(starts.size());
  for (int shift = 0; shift < 64 && highest > lowest && (highest - lowest) >> shift != 0; shift += 8) {
    const auto digit = [=](const Start& s) { return (s.address - lowest) >> shift & 255; };
    size_t next[257] = {};  // where the next start with this digit goes
    for (const Start& s : starts) ++next[digit(s) + 1];
    if (next[digit(starts[0]) + 1] == starts.size()) continue;  // the same in all
    for (size_t d = 1; d < 257; ++d) next[d] += next[d - 1];
    for (const Start& s : starts) sorted[next[digit(s)]++] = s;
    starts.swap(sorted);
  }
}

}  // namespace cram
