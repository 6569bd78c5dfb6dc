#include "harness.hpp"

#include <memory>
#include <string>
#include <vector>

namespace cuda_bench {

using namespace ssm;

namespace {

using model = language_model<bf16, cuda>;

model_config shape_2_7b() {
  model_config c{.vocabulary = 50288, .width = 2560, .pattern = std::string(64, 'x')};
  c.mamba2.heads = 80;
  c.mamba2.head_dim = 64;
  c.mamba2.state = 128;
  return c;
}

/// The 2.7B shape of Mamba-2 with random weights. Layers are copies of one, each with its own
/// memory: numbers for all of them would take the host minutes.
std::shared_ptr<const model> mamba2_2_7b() {
  std::shared_ptr<any_block<bf16, cuda>> first;
  const auto make = [&first](const model_config& config, std::uint64_t seed) {
    if (first) return first->clone();
    return first = mixer_layer<mamba2<bf16, cuda>>(config, config.mamba2, seed);
  };
  return std::make_shared<model>(shape_2_7b(), 1, std::vector<own_layer<bf16, cuda>>{{'x', make}});
}

struct bytes_of_a_step {
  double weights, state;  // of one sequence, read and written

  explicit bytes_of_a_step(const model_config& c) {
    const double inner = static_cast<double>(c.mamba2.heads * c.mamba2.head_dim);
    const double keys = static_cast<double>(c.mamba2.state), width = static_cast<double>(c.width);
    const double rows = 2 * inner + 2 * keys + static_cast<double>(c.mamba2.heads);
    const double layers = static_cast<double>(c.pattern.size());
    weights = 2 * (layers * (rows + inner) * width + static_cast<double>(c.vocabulary) * width);
    state = 2 * 4 * layers * inner * keys;
  }
};

tensor<std::int32_t, 2> random_tokens(index_t sequences, index_t n) {
  tensor<std::int32_t, 2> ids(sequences, n);
  philox random(5);
  for (index_t i = 0; i < ids.size(); ++i)
    ids.data()[i] = static_cast<std::int32_t>(random.below(50288));
  return ids;
}

/// One model and one decoder at a time, made when a row first runs.
class one_decoder {
 public:
  explicit one_decoder(const cuda::context& ctx) : ctx_(ctx) {}

  decoder<model>& of(index_t sequences, index_t max_rollback) {
    if (!model_) model_ = mamba2_2_7b();
    if (!decoder_ || decoder_->sequences() != sequences ||
        decoder_->state().max_rollback() != max_rollback) {
      decoder_.reset();
      decoder_ = std::make_unique<decoder<model>>(*model_, sequences, max_rollback,
                                                  sampling_options{}, ctx_);
      (void)decoder_->read(token_rows(static_cast<std::size_t>(sequences), {1, 2, 3}));
    }
    return *decoder_;
  }

 private:
  cuda::context ctx_;
  std::shared_ptr<const model> model_;
  std::unique_ptr<decoder<model>> decoder_;
};

}  // namespace

/// Steps through `decoder`, what generate() and speculate() run; the state is float. A verified
/// piece leaves its snapshots, and all of it but one token is rolled back.
void add_decoding_rows(std::vector<row>& rows, const cuda::context& ctx) {
  const auto one = std::make_shared<one_decoder>(ctx);
  const bytes_of_a_step bytes(shape_2_7b());
  const struct {
    index_t sequences;
    double peer, goal;
  } steps[] = {{1, 3.65, 2.1}, {8, 4.50, 2.6}, {64, 11.4, 9.9}};
  for (const auto& s : steps) {
    rows.push_back({"decoding step Mamba-2 2.7B, batch " + std::to_string(s.sequences),
                    [one, b = s.sequences] { (void)one->of(b, 0).step(); },
                    bytes.weights + static_cast<double>(s.sequences) * bytes.state, 0, s.peer,
                    s.goal});
  }
  const struct {
    index_t tokens;
    double peer;
  } pieces[] = {{2, 3.51}, {4, 3.59}, {8, 3.75}};
  for (const auto& piece : pieces) {
    const auto ids = random_tokens(1, piece.tokens);
    const std::string name =
        "Mamba-2 2.7B, verify " + std::to_string(piece.tokens) + " tokens, batch 1";
    rows.push_back({name, [one, ids] { (void)one->of(1, ids.extent(1) - 1).step(ids); },
                    bytes.weights + bytes.state, 0, piece.peer, std::nullopt});
    rows.push_back({name + ", roll back all but one",
                    [one, ids] {
                      (void)one->of(1, ids.extent(1) - 1).step(ids);
                      one->of(1, ids.extent(1) - 1).rollback(ids.extent(1) - 1);
                    },
                    bytes.weights + bytes.state, 0, std::nullopt, std::nullopt});
  }
}

}  // namespace cuda_bench
