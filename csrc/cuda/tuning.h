// What is tuned: threads of a block, weights a thread, blocks that a multiprocessor must have room for (__launch_bounds__, which limits registers).
// `make cuda-static` shows spills and occupancy, `make gpu-model` what is executed.
#pragma once

namespace cram {
namespace cuda {

#ifndef CRAM_BLOCK_THREADS  // tests execute the kernels with other sizes too; registers and occupancy are tuned for this one
#define CRAM_BLOCK_THREADS 256
#endif
constexpr int kThreads = CRAM_BLOCK_THREADS;
static_assert(kThreads == 128 || kThreads == 256 || kThreads == 512, "whole warps, which share 2048 bins out evenly; offsets in a chunk of 16 bits");

constexpr int kItems = 8;                  // weights a thread has of a chunk: two vectors of float32, one of 16 bits
constexpr int kChunk = kItems * kThreads;  // weights of a chunk: what a block works on at a time
constexpr int kPrefetchedShare = 3;         // top-k: of the second-level cache, one in so many bytes is filled while the bracket is being found
constexpr int kSelectAhead = 8;            // top-k: candidates, or keys of the sample, of a thread, which loads all before it waits for the first
constexpr int kGroupBins = 128;            // bins whose sum is looked at first
constexpr int kPiece = 5;                  // top-k's finish: neighbouring chunks that a warp, or where a guess has failed a block, has at a time

// Blocks of a multiprocessor: the most for which no arch spills registers.
constexpr int kNmBlocks = 3;
constexpr int kSgdBlocks = 4;
constexpr int kRestoreBlocks = 2;
constexpr int kFinishBlocks = 3;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000  // nvcc 13 loads more ahead there
constexpr int kAdamBlocks = 2;
#else
constexpr int kAdamBlocks = 3;
#endif
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ >= 1000 || __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890)
constexpr int kStreamBlocks = 2;
#else
constexpr int kStreamBlocks = 3;
#endif

}  // namespace cuda
}  // namespace cram
