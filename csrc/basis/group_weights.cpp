// SPDX-License-Identifier: Apache-2.0
// What elements are divided by before, and multiplied by after, their basis (FORMAT.md
// section 11.2).
#include <algorithm>

#include "basis/basis_plane.hpp"

namespace kv {

GroupWeights::GroupWeights(const GroupShape& shape, int mult) : shape_(shape), mult_(mult) {
  const Basis& basis = *shape.basis;
  for (const PlaneParameters* parameters : shape.parameters) {
    if (basis.has_scales()) {
      offsets_.emplace_back(parameters, basis.heads, basis.dim);
      continue;
    }
    for (const int code : channel_codes(*parameters, StepAxis::kHead, mult, basis.dim)) {
      steps_.push_back(step_of(code));
      inverse_steps_.push_back(step_of(-code));
    }
  }
}

RowWeights GroupWeights::of_row(std::size_t row, int scale, float* room) const noexcept {
  const Basis& basis = *shape_.basis;
  const std::size_t dim = basis.dim;
  const std::size_t layer = row / basis.heads;
  const std::size_t head = row % basis.heads;
  if (!basis.has_scales()) {
    return RowWeights{steps_.data() + row * dim, inverse_steps_.data() + row * dim,
                      shape_.parameters[layer]->mean.data() + head * dim, dim};
  }
  const int told = basis.scale_base[row] + kScaleUnit * scale - mult_;
  const RowSteps& offsets = offsets_[layer];
  float* inverse = room + dim;
  if (offsets.is_uniform(head)) {
    const int code = offsets.code(told, head, 0);
    std::fill(room, inverse, step_of(code));
    std::fill(inverse, inverse + dim, step_of(-code));
  } else {
    for (std::size_t i = 0; i < dim; ++i) {
      const int code = offsets.code(told, head, i);
      room[i] = step_of(code);
      inverse[i] = step_of(-code);
    }
  }
  return RowWeights{room, inverse, nullptr, dim};
}

}  // namespace kv
