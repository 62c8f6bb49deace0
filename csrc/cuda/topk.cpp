#include "topk.h"

#include <cmath>
#include <new>
#include <numeric>

namespace cram {
namespace cuda {
namespace {

int32_t samples_of(int64_t numel) { return numel <= kDirect ? 0 : static_cast<int32_t>(std::clamp<int64_t>(numel / 64, 2048, kMaxSamples)); }

// For a bracket around the median, the widest, a tenth more, and a bin of the sample's histogram at each end.
int64_t capacity_of(int64_t numel, int32_t samples) {
  if (samples == 0) return numel;
  const double share = 1.1 * 2 * kDeviations * 0.5 / std::sqrt(static_cast<double>(samples)) + 1.0 / 128;
  return std::min({numel, static_cast<int64_t>(share * static_cast<double>(numel)), static_cast<int64_t>(UINT32_MAX)});
}

// Float32 keys of T's numbers have as many trailing zeros as T has fewer bits of mantissa.
int32_t key_step(DType t) { return t == DType::kFloat32 ? 1 : t == DType::kBFloat16 ? 1 << 16 : 1 << 13; }

// Samples whose place may lie in [first, first + numel) of a set.
int64_t samples_in(int64_t first, int64_t numel, const SetEntry& set) {
  return set.samples == 0 ? 0 : ((first + numel) * set.samples + set.numel - 1) / set.numel - first * set.samples / set.numel;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

TopkPlan::TopkPlan(const std::vector<Item>& items, int64_t sets_wanted, bool dense) : num_sets(sets_wanted) {
  std::vector<size_t> order;
  for (size_t i = 0; i < items.size(); ++i)
    if (items[i].numel > 0 && (dense || items[i].set >= 0)) order.push_back(i);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return items[a].set < items[b].set; });

  std::vector<SetEntry> entries(num_sets);
  std::vector<int64_t> first(items.size(), 0);
  for (SetEntry& set : entries) set.key_step = 1 << 16;
  for (size_t i : order) {
    if (items[i].set < 0) continue;
    SetEntry& set = entries[items[i].set];
    first[i] = set.numel;
    set.numel += items[i].numel;
    set.key_step = std::min(set.key_step, key_step(items[i].dtype));
  }
  int64_t candidates = 0, tallied = 0, sampled_sets = 0, first_sampled = 0;
  for (SetEntry& set : entries) {
    set.samples = samples_of(set.numel);
    set.capacity = capacity_of(set.numel, set.samples);
    if (set.samples > 0) {
      candidates = ceil_div(candidates, 4) * 4;  // aligned to 16 bytes
      first_sampled = candidates;
      ++sampled_sets;
    }
    set.first = candidates;
    set.tallies = tallied;
    set.sample_slices_before = sample_slices;
    set.slices_before = slices;
    candidates += set.capacity;
    tallied += tally_bytes(set.samples);
    sample_slices += slices_of(set.samples);
    slices += std::max(1u, slices_of(set.capacity));
  }

  starts.emplace_back();
  const auto add = [&](int32_t StartTable::* number, const auto& entry, size_t at, int64_t tasks) {
    if (tasks == 0) return;
    if (!starts.back().has_room(sizeof(entry))) {
      starts.emplace_back();
      starts.back().sets_before = static_cast<int32_t>(at);
    }
    StartTable& table = starts.back();
    unsigned char* const bytes = table.bytes + table.num_sets * sizeof(SetEntry) + table.num_tensors * sizeof(SampledEntry);
    auto& added = *new (bytes) std::decay_t<decltype(entry)>(entry);
    added.end = static_cast<uint32_t>(tasks) + (table.*number > 0 ? (&added)[-1].end : 0);
    ++(table.*number);
  };
  for (int64_t s = 0; s < num_sets; ++s) add(&StartTable::num_sets, entries[s], s, ceil_div(tally_bytes(entries[s].samples), kClearBytes));
  for (size_t i : order) {
    const Item& item = items[i];
    if (item.set < 0) continue;
    const SetEntry& set = entries[item.set];
    const SampledEntry sampled = {item.param,
                                  item.grad,
                                  item.master,
                                  item.numel,
                                  first[i],
                                  set.numel,
                                  set.samples,
                                  set.sample_slices_before,
                                  static_cast<uint32_t>(i),
                                  static_cast<uint32_t>(item.dtype),
                                  0};
    add(&StartTable::num_tensors, sampled, 0, ceil_div(samples_in(first[i], item.numel, set), kThreads));
  }
  chunks = make_tables<PerturbEntry>(
      order.size(), [&](size_t j) { return perturb_entry(items[order[j]], order[j], first[order[j]]); },
      [&](size_t j) { return chunks_of(items[order[j]].param, items[order[j]].numel); });

  num_chunks = chunks.back().tasks_before + tasks_in(chunks.back());
  const auto place = [&](int64_t size) {
    const int64_t at = bytes;
    bytes += ceil_div(size, 256) * 256;
    return at;
  };
  place(sizeof(Progress));
  sets_at = place(num_sets * sizeof(SetState));
  tallies_at = place(tallied);
  tensors_at = place(order.size() * sizeof(StreamedTensor));
  records_at = place(num_chunks * sizeof(CandidateRecord));
  keys_at = place(candidates * sizeof(int32_t));
  // Of a set that alone is sampled the samples lie where its candidates come later: those wait for the bracket, which waits for the last sample.
  const int64_t sampled_bytes = sample_slices * kSliceSize * static_cast<int64_t>(sizeof(uint16_t));
  samples_at = sampled_sets == 1 ? keys_at + first_sampled * static_cast<int64_t>(sizeof(int32_t)) : place(sampled_bytes);
  offsets_at = place(candidates * sizeof(uint16_t));
}

TopkMemory TopkPlan::memory(void* workspace) const {
  unsigned char* p = static_cast<unsigned char*>(workspace);
  return {reinterpret_cast<Progress*>(p),
          reinterpret_cast<SetState*>(p + sets_at),
          reinterpret_cast<StreamedTensor*>(p + tensors_at),
          reinterpret_cast<CandidateRecord*>(p + records_at),
          reinterpret_cast<uint16_t*>(p + samples_at),
          reinterpret_cast<uint32_t*>(p + keys_at),
          reinterpret_cast<uint16_t*>(p + offsets_at),
          num_chunks,
          static_cast<int32_t>(num_sets),
          sample_slices,
          slices};
}

namespace {

void topk(const std::vector<Item>& items, const Perturbation& p, TopkMode mode, const Selection& selection, const Context& c) {
  const bool perturbs = mode == TopkMode::kPerturb;
  const TopkPlan plan(items, selection.num_sets, perturbs);
  void* const workspace = c.allocate(plan.workspace());
  const TopkMemory memory = plan.memory(workspace);
  topk_start(plan, memory, plan.tallies(workspace), selection.k, p, c.stream);
  topk_stream(plan, memory, p, perturbs, c.stream);
  topk_finish(memory, p, mode, selection.thresholds, selection.stats, c.stream);
}

}  // namespace
}  // namespace cuda

void TopkThreshold::run(const cuda::Context& c) { cuda::topk(items, {}, cuda::TopkMode::kThreshold, selection, c); }
void PruneTopk::run(const cuda::Context& c) { cuda::topk(items, {}, cuda::TopkMode::kPrune, selection, c); }
void PerturbTopk::run(const cuda::Context& c) { cuda::topk(items, cuda::perturbation_of(*this), cuda::TopkMode::kPerturb, selection, c); }

}  // namespace cram
