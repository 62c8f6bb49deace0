// The CPU kernels without torch, on std::thread: for the thread sanitizer, which reports races in a correct libgomp loop, and for the
// address and undefined-behaviour sanitizers at the same price. Every op, SIMD level and dtype, with 1 and with 4 threads: the bits must agree.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "../../csrc/cpu/drivers.h"
#include "../../csrc/cpu/simd.h"
#include "sparse.h"

namespace {

using namespace cram;

void run_threads(int threads, void (*body)(void*, int), void* context) {
  std::vector<std::thread> team;
  for (int worker = 1; worker < threads; ++worker) team.emplace_back(body, context, worker);
  body(context, 0);
  for (std::thread& t : team) t.join();
}

uint16_t narrow(float x, DType t) { return t == DType::kFloat16 ? half_bits(x) : static_cast<uint16_t>(to_bits(rounded(x, BFloat16{})) >> 16); }

// Exactly the bytes that a tensor owns: a stray access is seen.
struct Buffer {
  std::vector<char> bytes;
  void* data() { return bytes.data(); }
};

Buffer numbers(int64_t n, DType t, std::mt19937& random, bool ties) {
  std::normal_distribution<float> normal(0, 0.05f);
  Buffer b{std::vector<char>(n * size_of(t))};
  for (int64_t i = 0; i < n; ++i) {
    float x = normal(random);
    if (ties) x = x < 0 ? -0.5f : 0.25f;
    if (t == DType::kFloat32) {
      memcpy(b.bytes.data() + 4 * i, &x, 4);
    } else {
      const uint16_t half = narrow(x, t);
      memcpy(b.bytes.data() + 2 * i, &half, 2);
    }
  }
  return b;
}

struct Tensors {
  std::vector<Buffer> param, grad, saved, mask, momentum, second;
  std::vector<float> steps;
  std::vector<Item> items;
  int32_t perturbed = 0;
};

Tensors make(DType dtype, bool ties) {
  std::mt19937 random(1);
  Tensors t;
  const int64_t sizes[] = {3, 40 * 36, 70001, 200000, 16, 1};
  const int64_t inner[] = {0, 9, 0, 1, 1, 0};
  const size_t count = std::size(sizes);
  t.steps.assign(count, 0);
  for (size_t i = 0; i < count; ++i) {
    t.param.push_back(numbers(sizes[i], dtype, random, ties));
    t.grad.push_back(numbers(sizes[i], dtype, random, ties));
    t.saved.push_back({std::vector<char>(sizes[i] * size_of(dtype), 0x55)});
    t.mask.push_back({std::vector<char>(mask_bytes(sizes[i]), 0x55)});
    t.momentum.push_back(numbers(sizes[i], dtype, random, ties));
    t.second.push_back({std::vector<char>(sizes[i] * size_of(dtype), 0)});
  }
  for (size_t i = 0; i < count; ++i) {
    Item item;
    item.numel = sizes[i];
    item.dtype = dtype;
    item.param = t.param[i].data();
    item.grad = t.grad[i].data();
    item.first_grad = t.grad[i].data();
    item.saved = t.saved[i].data();
    item.mask = static_cast<uint8_t*>(t.mask[i].data());
    item.state[0] = t.momentum[i].data();
    item.state[1] = t.second[i].data();
    item.step = &t.steps[i];
    item.set = i % 2;
    item.inner = inner[i];
    t.items.push_back(item);
  }
  return t;
}

std::vector<char> run(const Kernels& kernels, int threads, DType dtype, bool ties) {
  const Pool pool{threads, run_threads};
  const Context c{pool, kernels};
  std::vector<char> trace;
  const auto note = [&](const void* p, size_t bytes) { trace.insert(trace.end(), static_cast<const char*>(p), static_cast<const char*>(p) + bytes); };
  Tensors t = make(dtype, ties);
  const auto note_all = [&] {
    for (auto* list : {&t.param, &t.saved, &t.mask, &t.momentum, &t.second})
      for (Buffer& b : *list) note(b.data(), b.bytes.size());
    note(&t.perturbed, 4);
  };

  float found_inf = 0, inv_scale = 0.5f;
  const float rho = 0.1f, sgd_lr = 0.1f, adam_lr = 0.001f;
  const int64_t k[] = {7000, 30000};
  int32_t thresholds[2];
  int64_t stats[6];
  const Selection selection = {k, 2, thresholds, stats};
  const size_t n = t.items.size();
  const auto run = [&](auto op) {
    op.items = t.items;
    if constexpr (std::is_base_of_v<PerturbOp, decltype(op)>)
      op.perturbed = &t.perturbed, op.rho = {&rho, false}, op.inv_scale = &inv_scale, op.found_inf = &found_inf;
    if constexpr (std::is_base_of_v<UpdateOp, decltype(op)>) op.perturbed = &t.perturbed;
    op.run(c);
    note_all();
  };

  PerturbTopk perturb_topk;
  perturb_topk.selection = selection;
  run(perturb_topk);
  note(thresholds, sizeof thresholds);
  note(stats, 8);
  note(stats + 3, 8);
  RestoreSgd sgd;
  sgd.lr = {&sgd_lr, false};
  sgd.settings.assign(n, {0, 0.9f, 1, 1e-4f, true, false, false});
  run(sgd);
  for (Item& item : t.items) item.mask = item.inner > 0 ? item.mask : nullptr;
  PerturbNm perturb_nm;
  perturb_nm.pattern = {2, 4};
  run(perturb_nm);
  RestoreAdam adam;
  adam.lr = {&adam_lr, false};
  adam.settings.assign(n, {0.9f, 0.1f, 0.999f, 0.001f, 1e-8f, 0, 0, 0, true, false, false});
  adam.hyper.assign(n, {0.9, 0.999, 0.01f});
  run(adam);
  run(PerturbMasked());
  run(RestoreCombine());
  PruneNm prune_nm;
  prune_nm.pattern = {1, 4};
  run(prune_nm);
  PruneTopk prune_topk;
  prune_topk.selection = selection;
  run(prune_topk);
  note(thresholds, sizeof thresholds);
  float norm = 0;
  GradNorm grad_norm;
  grad_norm.norm = &norm;
  run(grad_norm);
  note(&norm, 4);
  return trace;
}

}  // namespace

int main() {
  int failures = 0, checks = 0;
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16})
    for (bool ties : {false, true}) {
      std::vector<char> expected;
      for (const std::string& level : simd_levels()) {
        set_simd_level(level);
        for (int threads : {1, 4}) {
          const std::vector<char> got = run(kernels(), threads, dtype, ties);
          if (expected.empty()) expected = got;
          const bool same = got == expected;
          ++checks;
          failures += !same;
          if (!same) printf("FAILED: dtype %d, ties %d, %s, %d threads: other bits than portable with 1 thread\n", int(dtype), ties, level.c_str(), threads);
        }
      }
    }
  failures += sparse_failures(run_threads, checks);
  printf("%d passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}
