// The op schemas (cram_kernels/ops.py says what they mean). Each op X has a twin check_X with the same arguments that only checks them:
// backends written in Python run it first, so that every backend refuses the same input with the same words.
#include <torch/csrc/stable/library.h>

#include <string>

#include "arguments.h"

namespace {

struct Op {
  std::string name, arguments, result;
};

const char* kPerturb =
    "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] saved, Tensor(c!)[] masks, Tensor(d!) perturbed, Tensor rho";
const char* kPerturbMasked = "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] saved, Tensor[] masks, Tensor(d!) perturbed, Tensor rho";
const char* kPerturbOptions = ", *, Tensor? inv_scale=None, Tensor(e!)? found_inf=None, Tensor[] masters";
const char* kUpdate = "Tensor(a!)[] params, Tensor[] saved, Tensor[] grads, Tensor[] first_grads, Tensor[] masks, Tensor(b!) perturbed";
const char* kUpdateOptions =
    "Tensor? inv_scale=None, Tensor? first_inv_scale=None, Tensor? found_inf=None, Tensor(z!)[] masters";

const Op kOps[] = {
    {"topk_threshold", "Tensor[] weights, int[] sets, Tensor k", "Tensor"},
    {"topk_histogram",
     "Tensor[] params, Tensor[] grads, Tensor rho, int[] sets, Tensor prefix, int shift, int bits, *, Tensor? inv_scale=None, "
     "Tensor[] masters",
     "Tensor"},
    {"prune_topk_", "Tensor(a!)[] weights, Tensor(b!)[] masks, int[] sets, Tensor k", "(Tensor, Tensor)"},
    {"perturb_topk_", std::string(kPerturb) + ", int[] sets, Tensor k" + kPerturbOptions, "(Tensor, Tensor)"},
    {"prune_nm_", "Tensor(a!)[] weights, Tensor(b!)[] masks, int[] prune, int n, int m", "()"},
    {"perturb_nm_", std::string(kPerturb) + ", int[] prune, int n, int m" + kPerturbOptions, "()"},
    {"perturb_masked_", std::string(kPerturbMasked) + kPerturbOptions, "()"},
    {"restore_", "Tensor(a!)[] params, Tensor[] saved, Tensor(b!) perturbed, *, Tensor[] masters", "()"},
    {"restore_combine_",
     "Tensor(a!)[] params, Tensor[] saved, Tensor(b!)[] grads, Tensor[] first_grads, Tensor[] masks, Tensor(c!) perturbed, *, "
     "Tensor? inv_scale=None, Tensor? first_inv_scale=None, Tensor? found_inf=None, Tensor[] masters",
     "()"},
    {"restore_sgd_",
     std::string(kUpdate) +
         ", Tensor(c!)[] momentum_buffers, int[] fresh, Tensor lr, *, float[] momentum=[0.0], float[] dampening=[0.0], "
         "float[] weight_decay=[0.0], int[] nesterov=[0], int[] maximize=[0], " +
         kUpdateOptions,
     "()"},
    {"restore_adam_",
     std::string(kUpdate) +
         ", Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, Tensor(f!)[] steps, Tensor lr, *, "
         "float[] beta1=[0.9], float[] beta2=[0.999], float[] eps=[1e-08], float[] weight_decay=[0.0], bool decoupled=False, "
         "int[] amsgrad=[0], int[] maximize=[0], " +
         kUpdateOptions,
     "()"},
    {"grad_norm", "Tensor[] grads, *, Tensor? inv_scale=None", "Tensor"},
};


// What handing lists over costs (benchmarks/growth.py).
void nothing(const cram::Tensors&, const cram::Tensors&, const cram::Tensors&, const cram::Tensors&, const cram::Integers&) {}

}  // namespace

STABLE_TORCH_LIBRARY(cram_kernels, m) {
  for (const Op& op : kOps) {
    const std::string schema = "(" + op.arguments + ") -> ";
    m.def((op.name + schema + op.result).c_str());
    m.def(("check_" + op.name + schema + "()").c_str());
  }
  m.def("nothing(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] saved, Tensor(c!)[] masks, int[] sets) -> ()");
}

#define CRAM_OPS(define)  \
  define(topk_threshold)  \
  define(topk_histogram)  \
  define(prune_topk_)     \
  define(perturb_topk_)   \
  define(prune_nm_)       \
  define(perturb_nm_)     \
  define(perturb_masked_) \
  define(restore_)        \
  define(restore_combine_) \
  define(restore_sgd_)    \
  define(restore_adam_)   \
  define(grad_norm)

STABLE_TORCH_LIBRARY_IMPL(cram_kernels, CompositeExplicitAutograd, m) {
#define CRAM_REGISTER_CHECK(op) m.impl("check_" #op, TORCH_BOX(&cram::check_##op));
  CRAM_OPS(CRAM_REGISTER_CHECK)
  m.impl("nothing", TORCH_BOX(&nothing));
}
