// The ops: one description each, from which follow the schema (schema.cpp), the checks (check.h) and the calls of every backend (register.h).
// cram_kernels/ops.py says what they mean, docs/contract.md exactly. Torch-free.
#pragma once

#include "adam.h"
#include "op.h"
#include "plain_arithmetic.h"
#include "sgd.h"

namespace cram {

// The backends' halves: csrc/cpu and csrc/cuda, in the file with the op's stem.
#define CRAM_RUN             \
  void run(const Context&);  \
  void run(const cuda::Context&);

// ---- What several ops share ----

struct PerturbOp : Op {
  int32_t* perturbed = nullptr;  // the flag
  PerItem rho;
  float* inv_scale = nullptr;  // optional
  float* found_inf = nullptr;  // optional

 protected:
  void visit_perturb(Visitor& v, Access masks) {
    v.main("params", Access::kWrite);
    v.needed("grads", &Item::grad, Access::kRead);
    v.list("saved", &Item::saved, Access::kWrite);
    v.masks(masks);
    v.masters(Access::kRead);
    v.flag("perturbed", perturbed);
    v.per_item("rho", rho);
    v.scalar("inv_scale", inv_scale, Access::kRead);
    v.scalar("found_inf", found_inf, Access::kWrite);
  }
  void finish_perturb(const char* op) const {
    for (size_t i = 0; i < items.size(); ++i)
      if (items[i].numel > 0 && items[i].saved == nullptr && items[i].master == nullptr)
        refuse(op, Place("saved", i), "be there (or a master weight)", "neither");
  }
};

struct UpdateOp : Op {
  int32_t* perturbed = nullptr;      // the flag
  float* inv_scale = nullptr;        // optional
  float* first_inv_scale = nullptr;  // optional
  float* found_inf = nullptr;        // optional

  static bool is_updated(const Item& item) { return item.numel > 0 && (item.grad != nullptr || item.first_grad != nullptr); }

 protected:
  void visit_update(Visitor& v, Access grads, Access masters) {
    v.main("params", Access::kWrite);
    v.list("saved", &Item::saved, Access::kRead);
    v.list("grads", &Item::grad, grads);
    v.list("first_grads", &Item::first_grad, Access::kRead);
    v.masks(Access::kRead);
    v.masters(masters);
    v.flag("perturbed", perturbed);
    v.scalar("inv_scale", inv_scale, Access::kRead);
    v.scalar("first_inv_scale", first_inv_scale, Access::kRead);
    v.scalar("found_inf", found_inf, Access::kRead);
  }
};

// A selection: which set each tensor is in, and what is found in each set.
struct Selection {
  const int64_t* k = nullptr;  // [num_sets]
  int64_t num_sets = 0;
  int32_t* thresholds = nullptr;  // [num_sets]
  int64_t* stats = nullptr;       // optional, [num_sets, 3]: kept, candidates, whether the guess failed

  void visit(Visitor& v) { v.sets("k", k, num_sets); }
  void results(Visitor& v) {
    v.result("thresholds", thresholds, {num_sets});
    v.result("stats", stats, {num_sets, 3});
  }
};

struct Pattern {
  int n = 0, m = 0;
};

// ---- Perturb and prune ----

struct TopkThreshold : Op {
  static constexpr const char* kName = "topk_threshold";
  Selection selection;

  void visit(Visitor& v) {
    v.main("weights", Access::kRead);
    selection.visit(v);
  }
  void results(Visitor& v) { v.result("thresholds", selection.thresholds, {selection.num_sets}); }
  CRAM_RUN
};

struct TopkHistogram : Op {
  static constexpr const char* kName = "topk_histogram";
  PerItem rho;
  float* inv_scale = nullptr;       // optional
  const int64_t* prefix = nullptr;  // [num_sets]
  int64_t num_sets = 0, shift = 0, bits = 0;
  int64_t* bins = nullptr;  // [num_sets, 2^bits]

  void visit(Visitor& v) {
    v.main("params", Access::kRead);
    v.list("grads", &Item::grad, Access::kRead);
    v.masters(Access::kRead);
    v.per_item("rho", rho);
    v.scalar("inv_scale", inv_scale, Access::kRead);
    v.sets("prefix", prefix, num_sets);
    v.integer("shift", shift);
    v.integer("bits", bits);
  }
  void finish() {
    if (bits < 1 || bits > 16 || shift < 0 || shift + bits > 31)
      refuse(kName, "shift, bits", "satisfy 1 <= bits <= 16, 0 <= shift <= 31 - bits",
             "shift=" + std::to_string(shift) + ", bits=" + std::to_string(bits));
    for (Item& item : items)
      if (item.grad == nullptr) item.master = nullptr;  // the parameter itself counts
  }
  void results(Visitor& v) { v.result("bins", bins, {num_sets, int64_t{1} << bits}, Visitor::Content::kZeros); }
  CRAM_RUN
};

struct PruneTopk : Op {
  static constexpr const char* kName = "prune_topk_";
  Selection selection;

  void visit(Visitor& v) {
    v.main("weights", Access::kWrite);
    v.masks(Access::kWrite);
    selection.visit(v);
  }
  void results(Visitor& v) { selection.results(v); }
  CRAM_RUN
};

struct PerturbTopk : PerturbOp {
  static constexpr const char* kName = "perturb_topk_";
  Selection selection;

  void visit(Visitor& v) {
    visit_perturb(v, Access::kWrite);
    selection.visit(v);
  }
  void finish() { finish_perturb(kName); }
  void results(Visitor& v) { selection.results(v); }
  CRAM_RUN
};

struct PruneNm : Op {
  static constexpr const char* kName = "prune_nm_";
  Pattern pattern;

  void visit(Visitor& v) {
    v.main("weights", Access::kWrite);
    v.masks(Access::kWrite);
    v.nm(pattern.n, pattern.m);
  }
  CRAM_RUN
};

struct PerturbNm : PerturbOp {
  static constexpr const char* kName = "perturb_nm_";
  Pattern pattern;

  void visit(Visitor& v) {
    visit_perturb(v, Access::kWrite);
    v.nm(pattern.n, pattern.m);
  }
  void finish() { finish_perturb(kName); }
  CRAM_RUN
};

struct PerturbMasked : PerturbOp {
  static constexpr const char* kName = "perturb_masked_";

  void visit(Visitor& v) { visit_perturb(v, Access::kRead); }
  void finish() { finish_perturb(kName); }
  CRAM_RUN
};

// ---- Restore and update ----

struct Restore : Op {
  static constexpr const char* kName = "restore_";
  int32_t* perturbed = nullptr;  // the flag

  void visit(Visitor& v) {
    v.main("params", Access::kWrite);
    v.list("saved", &Item::saved, Access::kRead);
    v.masters(Access::kRead);
    v.flag("perturbed", perturbed);
  }
  CRAM_RUN
};

struct RestoreCombine : UpdateOp {
  static constexpr const char* kName = "restore_combine_";

  void visit(Visitor& v) { visit_update(v, Access::kWrite, Access::kRead); }
  CRAM_RUN
};

struct RestoreSgd : UpdateOp {
  static constexpr const char* kName = "restore_sgd_";
  PerItem lr;
  std::vector<int64_t> fresh, nesterov, maximize;
  std::vector<double> momentum, dampening, weight_decay;
  std::vector<SgdOptions> settings;  // one an item, without lr: on a GPU it stays there

  void visit(Visitor& v) {
    visit_update(v, Access::kRead, Access::kWrite);
    v.state("momentum_buffers", 0);
    v.options("fresh", fresh);
    v.per_item("lr", lr);
    v.options("momentum", momentum, "0.0");
    v.options("dampening", dampening, "0.0");
    v.options("weight_decay", weight_decay, "0.0");
    v.options("nesterov", nesterov, "0");
    v.options("maximize", maximize, "0");
  }
  void finish() {
    PlainArithmetic plain;  // float64 to float32
    settings.reserve(items.size());
    for (size_t i = 0; i < items.size(); ++i) {
      if (is_updated(items[i]) && at(momentum, i) != 0 && items[i].state[0] == nullptr)
        refuse(kName, Place("momentum_buffers", i), "be there where momentum is not 0", "no buffer");
      settings.push_back({0, static_cast<float>(at(momentum, i)), static_cast<float>(1 - at(dampening, i)), static_cast<float>(at(weight_decay, i)),
                          at(nesterov, i) != 0, at(maximize, i) != 0, at(fresh, i) != 0});
    }
  }
  CRAM_RUN
};

struct RestoreAdam : UpdateOp {
  static constexpr const char* kName = "restore_adam_";
  PerItem lr;
  std::vector<double> beta1, beta2, eps, weight_decay;
  std::vector<int64_t> amsgrad, maximize;
  bool decoupled = false;
  std::vector<AdamOptions> settings;  // one an item, without what depends on lr and step
  std::vector<AdamHyper> hyper;       // one an item

  void visit(Visitor& v) {
    visit_update(v, Access::kRead, Access::kWrite);
    v.state("exp_avgs", 0);
    v.state("exp_avg_sqs", 1);
    v.state("max_exp_avg_sqs", 2);
    v.steps("steps");
    v.per_item("lr", lr);
    v.options("beta1", beta1, "0.9");
    v.options("beta2", beta2, "0.999");
    v.options("eps", eps, "1e-08");
    v.options("weight_decay", weight_decay, "0.0");
    v.boolean("decoupled", decoupled, "False");
    v.options("amsgrad", amsgrad, "0");
    v.options("maximize", maximize, "0");
  }
  void finish() {
    PlainArithmetic plain;  // float64 to float32
    settings.reserve(items.size());
    hyper.reserve(items.size());
    for (size_t i = 0; i < items.size(); ++i) {
      const auto& state = items[i].state;
      const bool complete = state[0] != nullptr && state[1] != nullptr && (at(amsgrad, i) == 0 || state[2] != nullptr);
      if (is_updated(items[i]) && !complete)
        refuse(kName, Place("exp_avgs, exp_avg_sqs, max_exp_avg_sqs ", i), "be there (the last with amsgrad)", "no tensor");
      AdamOptions o = {};
      o.beta1 = static_cast<float>(at(beta1, i));
      o.one_minus_beta1 = static_cast<float>(1 - at(beta1, i));
      o.beta2 = static_cast<float>(at(beta2, i));
      o.one_minus_beta2 = static_cast<float>(1 - at(beta2, i));
      o.eps = static_cast<float>(at(eps, i));
      o.decoupled = decoupled;
      o.amsgrad = at(amsgrad, i) != 0;
      o.maximize = at(maximize, i) != 0;
      settings.push_back(o);
      hyper.push_back({at(beta1, i), at(beta2, i), static_cast<float>(at(weight_decay, i))});
    }
  }
  CRAM_RUN
};

// ---- Norm ----

struct GradNorm : Op {
  static constexpr const char* kName = "grad_norm";
  float* inv_scale = nullptr;  // optional
  float* norm = nullptr;

  void visit(Visitor& v) {
    v.main("grads", Access::kRead);
    v.scalar("inv_scale", inv_scale, Access::kRead);
  }
  void finish() {
    for (Item& item : items) item.grad = item.param;
  }
  void results(Visitor& v) { v.result("norm", norm, {}); }
  CRAM_RUN
};

template <class... Op>
struct List {};

using Ops = List<TopkThreshold, TopkHistogram, PruneTopk, PerturbTopk, PruneNm, PerturbNm, PerturbMasked, Restore, RestoreCombine, RestoreSgd,
                 RestoreAdam, GradNorm>;

}  // namespace cram
