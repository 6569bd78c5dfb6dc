#pragma once

#include <ssmlib/grad/tape.hpp>
#include <ssmlib/nn/parameter.hpp>

#include <algorithm>
#include <concepts>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace ssm {

/// Whether a name has the form of a pattern, in which `*` stands for any characters, also none and
/// also dots: "layers.*.mixer.*".
[[nodiscard]] inline bool matches(std::string_view pattern, std::string_view name) {
  std::size_t p = 0, n = 0, star = std::string_view::npos, resume = 0;
  while (n < name.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = n;
    } else if (p < pattern.size() && pattern[p] == name[n]) {
      ++p;
      ++n;
    } else if (star != std::string_view::npos) {
      p = star + 1;  // let the last star take one more character
      n = ++resume;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*')
    ++p;
  return p == pattern.size();
}

/// The predicate "the name has one of these forms": what trains, as data.
struct any_of_patterns {
  std::vector<std::string> patterns;

  [[nodiscard]] bool operator()(std::string_view name) const {
    return std::any_of(patterns.begin(), patterns.end(),
                       [&](const std::string& p) { return matches(p, name); });
  }
};

/// Which parameters of a model train and which are frozen, in the model's order.
template <Floating T, Backend B = cpu>
struct parameter_selection {
  std::vector<parameter<T, B>> trained, frozen;

  /// Makes the tape want the gradients of the trained parameters and of no frozen one, so that
  /// nothing is computed or kept for those.
  void watch(tape<T, B>& t) const {
    for (const auto& p : frozen)
      t.unwatch(p.value);
    for (const auto& p : trained)
      t.watch(p.value);
  }
};

/// Splits a model's parameters by a predicate on their names.
/// @throws value_error  the predicate selects none of them.
template <Floating T, Backend B, std::predicate<std::string_view> F>
[[nodiscard]] parameter_selection<T, B> select_parameters(const std::vector<parameter<T, B>>& all,
                                                          F trains) {
  parameter_selection<T, B> selection;
  for (const parameter<T, B>& p : all)
    (trains(std::string_view(p.name)) ? selection.trained : selection.frozen).push_back(p);
  if (selection.trained.empty()) {
    throw value_error(
        "ssm: select_parameters: 0 of " + std::to_string(all.size()) + " parameters are selected" +
        (all.empty() ? "" : ", the first is '" + all.front().name + "'") + "; select at least 1");
  }
  return selection;
}

namespace detail {

/// "layers.3.mixer.A_log" -> {"layers.", 3, ".mixer.A_log"}: the first number between dots.
struct numbered_name {
  std::string before, after;
  index_t number = -1;  ///< -1: the name has none, and all of it is `before`

  explicit numbered_name(std::string_view name) : before(name) {
    for (std::size_t begin = 0; begin < name.size();) {
      const std::size_t end = std::min(name.find('.', begin), name.size());
      const std::string_view piece = name.substr(begin, end - begin);
      const bool digits = !piece.empty() && piece.size() < 10 &&
                          piece.find_first_not_of("0123456789") == std::string_view::npos;
      if (digits) {
        before = name.substr(0, begin);
        after = name.substr(end);
        number = std::stoll(std::string(piece));
        return;
      }
      begin = end + 1;
    }
  }
};

/// {0, 1, 2, 5} -> "0-2,5"
[[nodiscard]] inline std::string number_ranges(std::vector<index_t> numbers) {
  std::sort(numbers.begin(), numbers.end());
  std::string text;
  for (std::size_t i = 0; i < numbers.size();) {
    std::size_t last = i;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1)
      ++last;
    if (!text.empty()) text += ',';
    text += std::to_string(numbers[i]);
    if (last > i) text += '-' + std::to_string(numbers[last]);
    i = last + 1;
  }
  return text;
}

/// Rows of text with columns as wide as they need; the first is set left, the others right.
[[nodiscard]] inline std::string aligned(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (std::size_t c = 0; c < row.size(); ++c)
      widths[c] = std::max(widths[c], row[c].size());
  }
  std::string text;
  for (const auto& row : rows) {
    for (std::size_t c = 0; c < row.size(); ++c) {
      const std::string fill(widths[c] - row[c].size(), ' ');
      text += c > 0 ? "  " + fill + row[c] : row.size() > 1 ? row[c] + fill : row[c];
    }
    text += '\n';
  }
  return text;
}

}  // namespace detail

/// The selection as a table: what trains and what is frozen, tensors and values of each, whether
/// AdamW decays it. Layers that differ in their number only share a row:
///
///     parameter                   tensors  values  decay
///     trains
///       layers.0-3.mixer.A_log          4      96     no
///     frozen
///       embedding.weight                1   65536      -
///     96 of 65632 values train (0.1 %)
template <Floating T, Backend B>
[[nodiscard]] std::string to_string(const parameter_selection<T, B>& selection) {
  struct group {
    std::string before, after;
    std::vector<index_t> numbers;
    index_t tensors = 0, values = 0;
    bool decays = false;
  };
  std::vector<std::vector<std::string>> rows{{"parameter", "tensors", "values", "decay"}};
  const auto add = [&rows](const char* title, const std::vector<parameter<T, B>>& list,
                           bool trained) {
    if (list.empty()) return;
    rows.push_back({title});
    std::vector<group> groups;
    std::map<std::string, std::size_t> found;
    for (const parameter<T, B>& p : list) {
      const detail::numbered_name name(p.name);
      const std::string key =
          name.before + (name.number < 0 ? '=' : '#') + name.after + (p.decays() ? '1' : '0');
      const auto [at, is_new] = found.try_emplace(key, groups.size());
      if (is_new) groups.push_back({name.before, name.after, {}, 0, 0, p.decays()});
      group& g = groups[at->second];
      if (name.number >= 0) g.numbers.push_back(name.number);
      ++g.tensors;
      g.values += p.value.size();
    }
    for (const group& g : groups) {
      rows.push_back({"  " + g.before + detail::number_ranges(g.numbers) + g.after,
                      std::to_string(g.tensors), std::to_string(g.values),
                      !trained   ? "-"
                      : g.decays ? "yes"
                                 : "no"});
    }
  };
  add("trains", selection.trained, true);
  add("frozen", selection.frozen, false);
  const index_t values = parameter_count(selection.trained);
  const index_t total = values + parameter_count(selection.frozen);
  const index_t permille = total == 0 ? 0 : (1000 * values + total / 2) / total;
  return detail::aligned(rows) + std::to_string(values) + " of " + std::to_string(total) +
         " values train (" + std::to_string(permille / 10) + "." + std::to_string(permille % 10) +
         " %)\n";
}

}  // namespace ssm
