#pragma once

#include <ssmlib/base/compiled.hpp>
#include <ssmlib/base/error.hpp>
#include <ssmlib/tensor/layout.hpp>

#include <algorithm>
#include <string>

namespace ssm {

SSMLIB_INLINE sequence_layout sequence_layout::rectangular(index_t sequences, index_t length) {
  if (sequences < 0 || length < 0) {
    throw shape_error("ssm: sequence_layout::rectangular(" + std::to_string(sequences) + ", " +
                      std::to_string(length) + "): counts are not negative");
  }
  sequence_layout layout(sequences);
  for (index_t i = 0; i <= sequences; ++i)
    layout.offsets_(i) = i * length;
  return layout;
}

SSMLIB_INLINE sequence_layout sequence_layout::from_lengths(std::span<const index_t> lengths) {
  sequence_layout layout(static_cast<index_t>(lengths.size()));
  index_t total = 0;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    if (lengths[i] < 0) {
      throw shape_error("ssm: sequence_layout: sequence " + std::to_string(i) + " has length " +
                        std::to_string(lengths[i]) + "; wanted >= 0");
    }
    layout.offsets_(static_cast<index_t>(i)) = total;
    total += lengths[i];
  }
  layout.offsets_(layout.sequences()) = total;
  return layout;
}

SSMLIB_INLINE sequence_layout sequence_layout::at_positions(std::span<const index_t> first) const {
  if (static_cast<index_t>(first.size()) != sequences()) {
    throw shape_error("ssm: at_positions: " + std::to_string(first.size()) + " positions for " +
                      std::to_string(sequences()) + " sequences; give one each");
  }
  sequence_layout layout = *this;
  layout.copy_.reset();  // of other positions
  layout.first_ = tensor<index_t, 1>(shape<1>{sequences()});
  std::copy(first.begin(), first.end(), layout.first_.data());
  return layout;
}

}  // namespace ssm
