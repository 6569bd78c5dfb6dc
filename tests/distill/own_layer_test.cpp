#include "model/small_models.hpp"
#include "support/catch.hpp"
#include <ssmlib/decode/speculate.hpp>
#include <ssmlib/distill/mohawk.hpp>

#include <algorithm>
#include <string>
#include <vector>

using namespace ssm;
using ssm_test::largest_difference;
using ssm_test::random_ids;
using ssm_test::small_config;

namespace {

// A mixer that the library knows nothing of: M[t, s] = 1 / (sharpness + |q_t - k_s|^2) for s <= t.
template <Real T>
struct rational_mixer {
  using value_type = T;
  using backend = cpu;
  using structure = ssm::structure::dense;
  using algorithms = alg_list<alg::quadratic>;

  tensor<T, 4> q, k;  // (b, T, H, N)
  double sharpness = 1;
  sequence_layout layout{};

  index_t batch() const { return q.extent(0); }
  index_t length() const { return q.extent(1); }
  index_t heads() const { return q.extent(2); }

  template <class Self, class F>
  static void operands(Self& self, F&& f) {
    f("q", self.q, operand::per_token);
    f("k", self.k, operand::per_token);
  }
  tensor<double, 4> dense() const {
    const index_t n = length();
    return detail::dense_entries(*this, heads(), [&](auto t, auto s, auto h) {
      double distance = 0;
      for (index_t i = 0; i < q.extent(3); ++i) {
        const double d =
            static_cast<double>(q(t / n, t % n, h, i)) - static_cast<double>(k(s / n, s % n, h, i));
        distance += d * d;
      }
      return s <= t ? 1 / (sharpness + distance) : 0.0;
    });
  }
};

struct rational_options {
  index_t width = 0;
  index_t heads = 1;
  double sharpness = 1;
  friend bool operator==(const rational_options&, const rational_options&) = default;
};

template <Real T>
class rational_attention : public sequence_mixer<rational_attention<T>, T> {
 public:
  rational_attention(const rational_options& o, std::uint64_t seed) : options_(o) {
    q_proj = linear<T>::make(o.width, o.width, {.seed = seed});
    k_proj = linear<T>::make(o.width, o.width, {.seed = seed + 1});
    v_proj = linear<T>::make(o.width, o.width, {.seed = seed + 2});
    o_proj = linear<T>::make(o.width, o.width, {.seed = seed + 3});
  }
  linear<T> q_proj, k_proj, v_proj, o_proj;

  const rational_options& options() const { return options_; }
  index_t width() const { return options_.width; }
  index_t conv_channels() const { return 0; }
  index_t conv_width() const { return 1; }

  template <class Self, class F>
  static void parameters(Self& self, F&& f) {
    visit(f, "q_proj", self.q_proj);
    visit(f, "k_proj", self.k_proj);
    visit(f, "v_proj", self.v_proj);
    visit(f, "o_proj", self.o_proj);
  }
  auto project(const pass<T>& p, const tensor<T, 3>& u, const sequence_layout& layout,
               conv_state<T>*) const {
    const auto heads = [&](const tensor<T, 3>& x) {
      return x.reshape(x.extent(0), x.extent(1), options_.heads, x.extent(2) / options_.heads);
    };
    auto product = packed(layout, rational_mixer<T>{heads(q_proj(p, u)), heads(k_proj(p, u)),
                                                    options_.sharpness}) *
                   heads(v_proj(p, u));
    return projected<decltype(product), T>{std::move(product), {}};
  }
  template <class Parts>
  tensor<T, 3> finish(const pass<T>& p, const tensor<T, 4>& y, const Parts&) const {
    return o_proj(p, y.reshape(y.extent(0), y.extent(1), y.extent(2) * y.extent(3)));
  }

 private:
  rational_options options_;
};

template <Real T>
std::vector<own_layer<T>> own_layers(double sharpness = 1) {
  return {{.letter = 'r', .make = [sharpness](const model_config& c, std::uint64_t seed) {
             return mixer_layer<rational_attention<T>>(
                 c, rational_options{.heads = 2, .sharpness = sharpness}, seed);
           }}};
}

model_config tiny(const std::string& pattern) {
  model_config c = small_config(pattern);
  c.width = 8;
  c.attention = {.heads = 2};
  c.mamba2 = {.heads = 2, .head_dim = 4, .state = 3};
  return c;
}

}  // namespace

TEST_CASE("distill/own_layer: a model with an own mixer gives pieces, packed batches and rollback",
          "[distill][own_layer]") {
  const language_model<double> m(tiny("r-M"), 1, own_layers<double>());
  const auto ids = random_ids(1, 14, 2);
  const auto whole = m.hidden({}, ids);
  auto state = m.initial_state(1, 3);
  CHECK(largest_difference(m.advance({}, state, ids.slice(1, 0, 6).contiguous()),
                           whole.slice(1, 0, 6)) < 1e-12);
  (void)m.advance({}, state, random_ids(1, 3, 9));
  state.rollback(3);
  CHECK(largest_difference(m.advance({}, state, ids.slice(1, 6, 14).contiguous()),
                           whole.slice(1, 6, 14)) < 1e-12);
  const auto layout = sequence_layout::from_lengths({5, 9});
  CHECK(largest_difference(m.hidden({}, ids, layout).slice(1, 5, 14),
                           m.hidden({}, ids.slice(1, 5, 14).contiguous())) == 0.0);
}

TEST_CASE("distill/own_layer: a clone of a model with an own mixer has its own parameters",
          "[distill][own_layer]") {
  const language_model<double> m(tiny("r-"), 1, own_layers<double>());
  const auto copy = m.clone();
  const auto ids = random_ids(1, 9, 1);
  const auto before = m.hidden({}, ids);
  CHECK(largest_difference(copy.hidden({}, ids), before) == 0.0);
  for (const auto& p : copy.parameters())
    p.value.fill(0.25);
  CHECK(largest_difference(m.hidden({}, ids), before) == 0.0);
  CHECK(largest_difference(copy.hidden({}, ids), before) > 0.0);
}

TEST_CASE("distill/own_layer: attention is distilled into an own mixer by stage 1",
          "[distill][own_layer][mohawk]") {
  const language_model<double> teacher(tiny("*-"), 1), student(tiny("r-"), 2, own_layers<double>());
  CHECK(transfer_weights(teacher, student).size() ==
        teacher.parameters().size() - teacher.block(0).parameters("").size() + 1);
  const auto stage = mohawk_stage::matrix_orientation;
  std::vector<std::int32_t> text(400);
  philox random(4);
  for (auto& id : text)
    id = static_cast<std::int32_t>(random.below(19));
  data_loader loader(token_spans{std::span<const std::int32_t>(text)}, {.sequence_length = 10});
  const auto trained = select_parameters(student.parameters(),
                                         any_of_patterns{mohawk_trained(stage, teacher, student)});
  CHECK(trained.trained.size() == 4);
  adamw<double> optimizer(trained.trained);
  std::vector<double> losses;
  train_mohawk_stage(stage, teacher, student, optimizer, loader,
                     {.steps = 25, .tokens_per_step = 20, .learning_rate = 2e-2},
                     {.on_step = [&](const step_info& i) { losses.push_back(i.loss); }});
  CHECK(losses.back() < 0.8 * losses.front());
}

TEST_CASE("distill/own_layer: an own mixer's stage 1 gradient is that of differences",
          "[distill][own_layer][mohawk]") {
  const language_model<double> teacher(tiny("*-"), 1), student(tiny("r-"), 2, own_layers<double>());
  const auto ids = random_ids(1, 9, 5);
  const auto loss = [&](tape<double>* t) {
    return mohawk_loss(mohawk_stage::matrix_orientation, teacher, student, pass<double>{.tape = t},
                       ids);
  };
  const auto* mixer = student.block(0).mixer_as<rational_attention<double>>();
  REQUIRE(mixer != nullptr);
  const auto& weight = mixer->q_proj.weight;
  tape<double> t;
  t.watch(weight);
  const auto l = loss(&t);
  t.gradient(l.sum).fill(1);
  t.backward();
  for (const index_t i : {0, 17, 63}) {
    double& w = weight.data()[i];
    const double at = w;
    w = at + 1e-5;
    const double up = loss(nullptr).sum(0);
    w = at - 1e-5;
    const double down = loss(nullptr).sum(0);
    w = at;
    CHECK(t.gradient(weight).data()[i] == ssm_test::approx((up - down) / 2e-5).epsilon(1e-5));
  }
}

TEST_CASE("distill/own_layer: own mixers are compared by type and options",
          "[distill][own_layer][mohawk]") {
  const language_model<double> a(tiny("r-"), 1, own_layers<double>(1)),
      b(tiny("r-"), 2, own_layers<double>(1)), c(tiny("r-"), 3, own_layers<double>(2));
  CHECK(replaced_layers(a, b).empty());
  CHECK(replaced_layers(a, c) == std::vector<index_t>{0});
  CHECK(transfer_weights(a, b).size() == a.parameters().size());
  CHECK(transfer_weights(a, c).size() == a.parameters().size() - 4);
}

TEST_CASE("distill/own_layer: an own mixer generates, and is decoded speculatively",
          "[distill][own_layer][speculate]") {
  auto config = tiny("r-");
  config.tie_embeddings = false;
  const language_model<double> target(config, 1, own_layers<double>());
  const language_model<double> draft(tiny("M"), 2);
  const token_rows prompts = {{1, 2, 3}, {4}};
  const auto plain = generate(target, prompts, {.max_new_tokens = 10});
  CHECK(speculate(target, draft, prompts, {.max_new_tokens = 10}).tokens == plain);
  const auto own = speculate(draft, target, prompts, {.max_new_tokens = 10}).tokens;
  CHECK(own == generate(draft, prompts, {.max_new_tokens = 10}));
}

TEST_CASE("distill/own_layer: a letter that is taken or unknown is one sentence",
          "[distill][own_layer][error]") {
  auto own = own_layers<float>();
  CHECK_THROWS_WITH(language_model<float>(tiny("r-"), 1), ssm_test::contains("'r' at place 0"));
  CHECK_THROWS_WITH(language_model<float>(tiny("rx"), 1, own),
                    ssm_test::contains("'x' at place 1; wanted letters of \"*M-mDRLGPpr\""));
  own.push_back(own[0]);
  CHECK_THROWS_WITH(language_model<float>(tiny("r-"), 1, own),
                    ssm_test::contains("the letter 'r' of an own layer is taken"));
  own.pop_back();
  own[0].letter = 'M';
  CHECK_THROWS_WITH(language_model<float>(tiny("M-"), 1, own),
                    ssm_test::contains("the letter 'M' of an own layer is taken"));
  own[0] = {.letter = 'r', .make = {}};
  CHECK_THROWS_WITH(language_model<float>(tiny("r-"), 1, own),
                    ssm_test::contains("the own layer 'r' made no block"));
}
