#pragma once

#include <sstream>
#include <string>
#include <vector>

namespace demo {

/// A loss over bytes of training, saved as text in a checkpoint's notes.
struct curve {
  std::vector<double> bytes, loss;

  [[nodiscard]] std::string text() const {
    std::ostringstream out;
    out.precision(9);
    for (std::size_t i = 0; i < bytes.size(); ++i)
      out << bytes[i] << ' ' << loss[i] << '\n';
    return out.str();
  }
  static curve from_text(const std::string& text) {
    curve c;
    std::istringstream in(text);
    for (double b, l; in >> b >> l;) {
      c.bytes.push_back(b);
      c.loss.push_back(l);
    }
    return c;
  }
};

}  // namespace demo
