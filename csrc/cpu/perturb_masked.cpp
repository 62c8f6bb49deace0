#include "drivers.h"

namespace cram {

void PerturbMasked::run(const Context& c) {
  const Perturbation p = perturbation_of(*this, kName);
  const std::vector<Range> ranges = cut(items);
  perturb_ranges(c, items, p, ranges, [&](int, int64_t task, const Item& item, const Source& source, bool& nonfinite) {
    c.kernels.masked(source, item.dtype, ranges[task].begin, ranges[task].end, item.param, item.saved, item.mask, &nonfinite);
  });
}

}  // namespace cram
