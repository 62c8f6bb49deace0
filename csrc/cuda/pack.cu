// Packed 2:4 (docs/contract.md). A thread has one metadata word, the 32 bytes of the matrix that it is for, and the 16 of them that stay. A block
// has a tile of rows whose metadata lie together; the words change threads in shared memory, so that their accesses too are consecutive.
#include "launch.h"
#include "launchers.h"
#include "vector.cuh"

namespace cram {
namespace cuda {
namespace {

template <class T>  // float, BFloat16 for either type of 16 bits, Byte for int8
struct Tile {
  using Word = std::conditional_t<sizeof(T) == 1, uint32_t, uint16_t>;  // of metadata
  static constexpr int kLanes = Vector<T>::kLanes, kRows = 64 / sizeof(Word), kCols = kThreads / kRows;
  T* dense;
  T* packed;
  Word* meta;
  int64_t rows, cols, row, col;  // the matrix, columns in words; the first of this tile

  __device__ __forceinline__ Tile(const PackItem& item, uint32_t number)
      : dense(static_cast<T*>(item.dense)),
        packed(static_cast<T*>(item.packed)),
        meta(static_cast<Word*>(item.meta)),
        rows(item.rows),
        cols(item.cols / (2 * kLanes)) {
    const int64_t across = (cols + kCols - 1) / kCols;
    row = number / across * kRows;
    col = number % across * kCols;
  }
  // This thread's word.
  __device__ __forceinline__ int own_row() const { return static_cast<int>(threadIdx.x) / kCols; }
  __device__ __forceinline__ int own_col() const { return static_cast<int>(threadIdx.x) % kCols; }
  __device__ __forceinline__ bool exists() const { return col + own_col() < cols; }
  __device__ __forceinline__ int64_t index() const { return (row + own_row()) * cols + col + own_col(); }
  __device__ __forceinline__ int in_shared() const { return static_cast<int>(meta_place(own_row(), own_col(), kRows, kRows)); }
  // Where in `meta` the word lies that is at threadIdx.x in shared memory: a line of 128 bytes for each pair of columns.
  __device__ __forceinline__ bool exists_in_meta() const { return col + static_cast<int>(threadIdx.x) / (2 * kRows) * 2 < cols; }
  __device__ __forceinline__ Word& in_meta() const {
    const int line = static_cast<int>(threadIdx.x) / (2 * kRows), place = static_cast<int>(threadIdx.x) % (2 * kRows);
    return meta[(col + 2 * line) * rows + 2 * row + place];
  }
  __device__ __forceinline__ static Span<kLanes> whole(int64_t vector) { return {vector * kLanes, 0, kLanes}; }
};

// The words of a thread: two vectors of the matrix, one of what stays, and the metadata.
template <class T>
struct Words {
  Vector<T> dense[2] = {}, packed = {};
  uint32_t meta = 0;

  __device__ __forceinline__ uint32_t& at(int i) { return dense[i / 4].words[i % 4]; }

  __device__ __forceinline__ void pack() {
    meta = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t place, other;
      if constexpr (sizeof(T) == 4) {
        packed.words[i] = pack_pair(at(2 * i), at(2 * i + 1), &place);
      } else if constexpr (sizeof(T) == 2) {
        packed.words[i] = pack_group<2>(at(2 * i) | static_cast<uint64_t>(at(2 * i + 1)) << 32, 0x7fff, &place);
      } else {
        const uint32_t low = pack_group<1>(at(2 * i), 0xff, &place), high = pack_group<1>(at(2 * i + 1), 0xff, &other);
        packed.words[i] = low | high << 16;
        place |= other << 4;
      }
      meta |= place << i * (sizeof(T) == 1 ? 8 : 4);
    }
  }

  __device__ __forceinline__ void unpack() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t kept = packed.words[i], place = meta >> i * (sizeof(T) == 1 ? 8 : 4);
      if constexpr (sizeof(T) == 4) {
        at(2 * i) = is_first_of_pair(place) ? kept : 0;
        at(2 * i + 1) = is_first_of_pair(place) ? 0 : kept;
      } else if constexpr (sizeof(T) == 2) {
        const uint64_t group = unpack_group<2>(kept, place & 15);
        at(2 * i) = static_cast<uint32_t>(group);
        at(2 * i + 1) = static_cast<uint32_t>(group >> 32);
      } else {
        at(2 * i) = unpack_group<1>(static_cast<uint16_t>(kept), place & 15);
        at(2 * i + 1) = unpack_group<1>(static_cast<uint16_t>(kept >> 16), place >> 4 & 15);
      }
    }
  }
};

template <bool kPacks, class T>
__device__ __forceinline__ void tile_24(const Tile<T>& tile, uint32_t* shared) {
  Words<T> words;
  if (kPacks && tile.exists()) {
    for (int v = 0; v < 2; ++v) words.dense[v] = load(tile.dense, Tile<T>::whole(2 * tile.index() + v));
    words.pack();
    store(tile.packed, words.packed, Tile<T>::whole(tile.index()));
    shared[tile.in_shared()] = words.meta;
  }
  if (!kPacks && tile.exists_in_meta()) shared[threadIdx.x] = tile.in_meta();
  __syncthreads();
  if (kPacks && tile.exists_in_meta()) tile.in_meta() = static_cast<typename Tile<T>::Word>(shared[threadIdx.x]);
  if (!kPacks && tile.exists()) {
    words.packed = load(tile.packed, Tile<T>::whole(tile.index()));
    words.meta = shared[tile.in_shared()];
    words.unpack();
    for (int v = 0; v < 2; ++v) store(tile.dense, words.dense[v], Tile<T>::whole(2 * tile.index() + v));
  }
  __syncthreads();
}

template <bool kPacks>
__global__ void __launch_bounds__(kThreads) pack_24_kernel(const __grid_constant__ Table<PackItem> table) {
  __shared__ uint32_t shared[kThreads];
  for (uint32_t task = blockIdx.x; task < tasks_in(table); task += gridDim.x) {
    const Task found = find(table, task);
    const PackItem& item = table.entries[found.entry];
    switch (item.slot) {
      case Slot::kInt8:
        tile_24<kPacks>(Tile<Byte>(item, found.number), shared);
        break;
      case Slot::kFloat16:
        tile_24<kPacks>(Tile<BFloat16>(item, found.number), shared);
        break;
      default:
        tile_24<kPacks>(Tile<float>(item, found.number), shared);
    }
  }
}

int64_t tiles_of(const PackItem& item) {
  const int64_t rows = rows_multiple(item.slot), cols = kThreads / rows;
  return item.rows / rows * ((meta_cols(item.slot, item.cols) + cols - 1) / cols);
}

template <bool kPacks>
void launch_24(const char* name, const std::vector<PackItem>& items, Stream stream) {
  const auto tables = make_tables<PackItem>(items.size(), [&](size_t i) { return items[i]; }, [&](size_t i) { return tiles_of(items[i]); });
  for (const auto& table : tables)
    if (tasks_in(table) > 0) launch(name, pack_24_kernel<kPacks>, tasks_in(table), stream, table);
}

}  // namespace

void pack_24(const std::vector<PackItem>& items, Stream stream) { launch_24<true>("pack_24_", items, stream); }

void unpack_24(const std::vector<PackItem>& items, Stream stream) { launch_24<false>("unpack_24_", items, stream); }

}  // namespace cuda
}  // namespace cram
