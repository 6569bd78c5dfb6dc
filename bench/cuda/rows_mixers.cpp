#include "harness.hpp"

#include <memory>

namespace cuda_bench {

using namespace ssm;

namespace {

using tokens3 = tensor<float, 3, cuda>;
using tokens4 = tensor<bf16, 4, cuda>;

constexpr double bf16_bytes = 2, float_bytes = 4;

/// Queues y = e, and with `dy` the gradient of everything too.
template <class E>
std::function<void()> forward_of(const E& e, const cuda::context& ctx) {
  const tokens4 y(e.extents());
  return [=, &ctx] { eval_into(e, y, {}, ctx); };
}
template <class E>
std::function<void()> training_of(const E& e, const cuda::context& ctx) {
  const tokens4 y(e.extents()), dy = random_bf16<4>(e.extents(), 1.0, 99);
  const auto gradients = std::make_shared<E>(zeros_like(e));
  return [=, &ctx] {
    eval_into(e, y, {}, ctx);
    vjp_into(e, dy, *gradients, {}, ctx);
  };
}

struct ssd_shape {
  index_t batch, length, heads, groups;
  double peer, goal;
  double training_peer, training_goal;  // 0: not asked for
};

std::string name_of(const char* what, const ssd_shape& s) {
  return std::string(what) + " b" + std::to_string(s.batch) + " T" + std::to_string(s.length) +
         " H" + std::to_string(s.heads) + " G" + std::to_string(s.groups);
}

}  // namespace

// With the step sizes' softplus and the log decays as a layer makes them, in the time.
void add_ssd_rows(std::vector<row>& rows, const cuda::context& ctx) {
  constexpr index_t p = 64, n = 128;
  for (const ssd_shape& s : {ssd_shape{8, 2048, 80, 1, 0.745, 0.25, 3.298, 1.3},
                             {1, 2048, 80, 1, 0.111, 0.045, 0.580, 0.23},
                             {1, 16384, 80, 1, 0.751, 0.25, 0, 0},
                             {1, 65536, 80, 1, 3.615, 1.0, 14.11, 5.6},
                             {8, 2048, 24, 1, 0.245, 0.085, 0, 0},
                             {8, 2048, 128, 8, 1.261, 0.42, 5.688, 2.3}}) {
    const cuda::scope scope(ctx);
    const auto dt = random_bf16<3>({s.batch, s.length, s.heads}, 1.0, 1);
    const auto x = random_bf16<4>({s.batch, s.length, s.heads, p}, 1.0, 2);
    const auto b = random_bf16<4>({s.batch, s.length, s.groups, n}, 0.3, 3);
    const auto c = random_bf16<4>({s.batch, s.length, s.groups, n}, 0.3, 4);
    const auto a = to<cuda>(uniform<float, 1>({s.heads}, -16.0, -1.0, 5), ctx);
    const auto bias = to<cuda>(uniform<float, 1>({s.heads}, -6.0, -2.0, 6), ctx);
    const auto d = tensor<float, 1, cuda>::full({s.heads}, 1.0f);
    const auto product = [=](const tokens3& delta, const tokens3& log_a) {
      return (hadamard(semiseparable(log_a, delta), c * transpose(b)) + diagonal(d)) * x;
    };
    const tokens4 y(x.extents());
    const double count = static_cast<double>(s.batch * s.length);
    const double bytes =
        count * bf16_bytes * static_cast<double>(2 * s.heads * p + 2 * s.groups * n + s.heads);
    const double flops = count * (64.0 * static_cast<double>(n * s.groups) +
                                  static_cast<double>(s.heads) * (64.0 * p + 4.0 * n * p));
    const pass<bf16, cuda> pass{ctx};
    rows.push_back({name_of("SSD forward", s),
                    [=, &ctx] {
                      const auto [delta, log_a] = discretize(pass, dt, a, bias);
                      eval_into(product(delta, log_a), y, {}, ctx);
                    },
                    bytes, flops, s.peer, s.goal});
    if (s.training_peer == 0) continue;
    // Through a tape, as a layer's training does it.
    const auto dy = random_bf16<4>(x.extents(), 1.0, 7);
    rows.push_back({name_of("SSD forward + backward", s),
                    [=, &ctx] {
                      tape<bf16, cuda> t;
                      t.watch(dt);
                      t.watch(x);
                      t.watch(b);
                      t.watch(c);
                      t.watch(a);
                      t.watch(bias);
                      t.watch(d);
                      const ssm::pass<bf16, cuda> recorded{ctx, &t};
                      const auto [delta, log_a] = discretize(recorded, dt, a, bias);
                      const auto out = eval(product(delta, log_a), &t, ctx);
                      t.gradient(out).copy_from(dy);
                      t.backward();
                    },
                    2.5 * bytes, 3.5 * flops, s.training_peer, s.training_goal});
  }
}

void add_attention_rows(std::vector<row>& rows, const cuda::context& ctx) {
  struct shape_of {
    index_t d, length;
    double peer, goal, training_peer, training_goal;  // flash-2, cuDNN
  };
  for (const shape_of& s : {shape_of{128, 2048, 0.889, 0.511, 4.23, 2.28},
                            {128, 16384, 6.59, 3.75, 24.2, 14.5},
                            {64, 2048, 0.519, 0.347, 2.38, 2.37},
                            {64, 16384, 3.63, 2.33, 16.5, 9.73}}) {
    const cuda::scope scope(ctx);
    constexpr index_t heads = 32, kv = 8, count = 16384;
    const index_t batch = count / s.length;
    const auto q = random_bf16<4>({batch, s.length, heads, s.d}, 1.0, 1);
    const auto k = random_bf16<4>({batch, s.length, kv, s.d}, 1.0, 2);
    const auto v = random_bf16<4>({batch, s.length, kv, s.d}, 1.0, 3);
    const auto e =
        softmax(q * transpose(k) * (1.0 / std::sqrt(static_cast<double>(s.d))) + causal) * v;
    const double bytes = bf16_bytes * static_cast<double>(count * s.d * (2 * heads + 2 * kv));
    const double flops =
        2.0 * static_cast<double>(heads * s.d * count) * static_cast<double>(s.length);
    const std::string shape = " D" + std::to_string(s.d) + " T" + std::to_string(s.length);
    rows.push_back({"attention forward" + shape, forward_of(e, ctx), bytes, flops, s.peer, s.goal});
    rows.push_back({"attention forward + backward" + shape, training_of(e, ctx), 3 * bytes,
                    3.5 * flops, s.training_peer, s.training_goal});
  }
}

void add_selective_rows(std::vector<row>& rows, const cuda::context& ctx) {
  struct shape_of {
    index_t batch, length;
    double peer, goal, training_peer, training_goal;
  };
  for (const shape_of& s :
       {shape_of{8, 2048, 1.362, 0.9, 7.405, 5.0}, {1, 16384, 1.808, 0.9, 8.131, 5.0}}) {
    const cuda::scope scope(ctx);
    constexpr index_t d = 5120, n = 16;
    const auto delta =
        to<cuda>(cast<bf16>(uniform<float, 3>({s.batch, s.length, d}, 0.001, 0.1, 1)), ctx);
    const auto a = to<cuda>(uniform<float, 2>({d, n}, -16.0, -1.0, 2), ctx);
    const auto b = random_bf16<4>({s.batch, s.length, 1, n}, 0.5, 3);
    const auto c = random_bf16<4>({s.batch, s.length, 1, n}, 0.5, 4);
    const auto u = random_bf16<3>({s.batch, s.length, d}, 1.0, 5);
    const auto skip = tensor<float, 1, cuda>::full({d}, 1.0f);
    const auto e = (selective(delta, a, c, b) + diagonal(skip)) * channels(u);
    const double count = static_cast<double>(s.batch * s.length);
    const double bytes = bf16_bytes * count * (3.0 * d + 2.0 * n);
    const std::string shape = " b" + std::to_string(s.batch) + " T" + std::to_string(s.length);
    rows.push_back(
        {"selective scan forward" + shape, forward_of(e, ctx), bytes, 0, s.peer, s.goal});
    rows.push_back({"selective scan forward + backward" + shape, training_of(e, ctx),
                    bytes + bf16_bytes * count * 5.0 * d, 0, s.training_peer, s.training_goal});
  }
}

}  // namespace cuda_bench
