#include "harness.hpp"

#include <array>
#include <cmath>
#include <memory>

namespace cuda_bench {

using namespace ssm;

namespace {

using steps3 = tensor<float, 3, cuda>;
using tokens4 = tensor<bf16, 4, cuda>;

constexpr double bf16_bytes = 2, float_bytes = 4;

/// Queues y = e, and with `backward` the gradients of everything too, through a tape as a layer's
/// training does it.
template <class E>
std::function<void()> work_of(const E& e, bool backward, const cuda::context& ctx) {
  if (!backward) {
    const tokens4 y(e.extents());
    return [=, &ctx] { eval_into(e, y, {}, ctx); };
  }
  const tokens4 dy = random_bf16<4>(e.extents(), 1.0, 99);
  return [=, &ctx] {
    tape<bf16, cuda> t;
    E operands = e;
    E::operands(operands, [&](std::string_view, const auto& operand, ssm::operand) {
      if (operand) t.watch(operand);
    });
    const auto y = eval(e, &t, ctx);
    t.gradient(y).copy_from(dy);
    t.backward();
  };
}

std::string shape_name(index_t batch, index_t length) {
  return " b" + std::to_string(batch) + " T" + std::to_string(length);
}

struct ssd_shape {
  index_t batch, length, heads, groups;
  std::optional<double> peer = {}, goal = {}, training_peer = {}, training_goal = {};
};

constexpr index_t ssd_p = 64, ssd_n = 128;

// With the step sizes' softplus and the log decays as a layer makes them, in the time.
std::function<void()> ssd_work(const ssd_shape& s, bool backward, const cuda::context& ctx) {
  const auto dt = random_bf16<3>({s.batch, s.length, s.heads}, 1.0, 1);
  const auto x = random_bf16<4>({s.batch, s.length, s.heads, ssd_p}, 1.0, 2);
  const auto b = random_bf16<4>({s.batch, s.length, s.groups, ssd_n}, 0.3, 3);
  const auto c = random_bf16<4>({s.batch, s.length, s.groups, ssd_n}, 0.3, 4);
  const auto a = to<cuda>(uniform<float, 1>({s.heads}, -16.0, -1.0, 5), ctx);
  const auto bias = to<cuda>(uniform<float, 1>({s.heads}, -6.0, -2.0, 6), ctx);
  const auto d = tensor<float, 1, cuda>::full({s.heads}, 1.0f);
  const auto product = [=](const steps3& delta, const steps3& log_a) {
    return (hadamard(semiseparable(log_a, delta), c * transpose(b)) + diagonal(d)) * x;
  };
  if (!backward) {
    const tokens4 y(x.extents());
    return [=, &ctx] {
      const auto [delta, log_a] = discretize(pass<bf16, cuda>{ctx}, dt, a, bias);
      eval_into(product(delta, log_a), y, {}, ctx);
    };
  }
  const auto dy = random_bf16<4>(x.extents(), 1.0, 7);
  return [=, &ctx] {
    tape<bf16, cuda> t;
    t.watch(dt);
    t.watch(x);
    t.watch(b);
    t.watch(c);
    t.watch(a);
    t.watch(bias);
    t.watch(d);
    const auto [delta, log_a] = discretize(pass<bf16, cuda>{ctx, &t}, dt, a, bias);
    const auto y = eval(product(delta, log_a), &t, ctx);
    t.gradient(y).copy_from(dy);
    t.backward();
  };
}

void add_ssd(std::vector<row>& rows, const ssd_shape& s, const cuda::context& ctx) {
  const std::string shape = shape_name(s.batch, s.length) + " H" + std::to_string(s.heads) + " G" +
                            std::to_string(s.groups);
  const double count = static_cast<double>(s.batch * s.length);
  const double bytes = count * bf16_bytes *
                       static_cast<double>(2 * s.heads * ssd_p + 2 * s.groups * ssd_n + s.heads);
  const double flops =
      count * (64.0 * static_cast<double>(ssd_n * s.groups) +
               static_cast<double>(s.heads) * (64.0 * ssd_p + 4.0 * ssd_n * ssd_p));
  rows.push_back({"SSD forward" + shape,
                  made_first(ctx, [=, &ctx] { return ssd_work(s, false, ctx); }), bytes, flops,
                  s.peer, s.goal});
  if (!s.training_peer) return;
  rows.push_back({"SSD forward + backward" + shape,
                  made_first(ctx, [=, &ctx] { return ssd_work(s, true, ctx); }), 2.5 * bytes,
                  3.5 * flops, s.training_peer, s.training_goal});
}

struct attention_shape {
  index_t heads, kv_heads, head_dim, batch, length;
};

std::function<void()> attention_work(const attention_shape& s, bool backward,
                                     const cuda::context& ctx) {
  const auto q = random_bf16<4>({s.batch, s.length, s.heads, s.head_dim}, 1.0, 1);
  const auto k = random_bf16<4>({s.batch, s.length, s.kv_heads, s.head_dim}, 1.0, 2);
  const auto v = random_bf16<4>({s.batch, s.length, s.kv_heads, s.head_dim}, 1.0, 3);
  const double scale = 1.0 / std::sqrt(static_cast<double>(s.head_dim));
  return work_of(softmax(q * transpose(k) * scale + causal) * v, backward, ctx);
}

void add_attention(std::vector<row>& rows, const std::string& shape, const attention_shape& s,
                   const std::array<std::optional<double>, 4>& others, const cuda::context& ctx) {
  const double count = static_cast<double>(s.batch * s.length);
  const double bytes =
      bf16_bytes * count * static_cast<double>(s.head_dim * (2 * s.heads + 2 * s.kv_heads));
  const double flops =
      2.0 * count * static_cast<double>(s.heads * s.head_dim) * static_cast<double>(s.length);
  rows.push_back({"attention forward" + shape,
                  made_first(ctx, [=, &ctx] { return attention_work(s, false, ctx); }), bytes,
                  flops, others[0], others[1]});
  rows.push_back({"attention forward + backward" + shape,
                  made_first(ctx, [=, &ctx] { return attention_work(s, true, ctx); }), 3 * bytes,
                  3.5 * flops, others[2], others[3]});
}

}  // namespace

void add_ssd_rows(std::vector<row>& rows, const cuda::context& ctx) {
  add_ssd(rows, {8, 2048, 80, 1, 0.745, 0.25, 3.298, 1.3}, ctx);
  add_ssd(rows, {1, 2048, 80, 1, 0.111, 0.045, 0.580, 0.23}, ctx);
  add_ssd(rows, {1, 16384, 80, 1, 0.751, 0.25, {}, {}}, ctx);
  add_ssd(rows, {1, 65536, 80, 1, 3.615, 1.0, 14.11, 5.6}, ctx);
  add_ssd(rows, {8, 2048, 24, 1, 0.245, 0.085, {}, {}}, ctx);
  add_ssd(rows, {8, 2048, 128, 8, 1.261, 0.42, 5.688, 2.3}, ctx);
}

// How time grows with the length at batch 1, and where a layer's mixer of width 2560 (Mamba-2's 80
// heads of 64, attention's 40 heads of 64) is cheaper than the other's.
void add_length_rows(std::vector<row>& rows, const cuda::context& ctx) {
  for (index_t length = 512; length <= 8192; length *= 2)
    add_ssd(rows, {1, length, 80, 1}, ctx);
  for (index_t length = 32768; length <= index_t{1} << 20; length *= 2) {
    if (length != 65536) add_ssd(rows, {1, length, 80, 1}, ctx);
  }
  for (index_t length = 512; length <= 16384; length *= 2) {
    add_attention(rows, " width 2560" + shape_name(1, length), {40, 40, 64, 1, length}, {}, ctx);
  }
}

// The peer is PyTorch's flash-2, the goal cuDNN.
void add_attention_rows(std::vector<row>& rows, const cuda::context& ctx) {
  const auto add = [&](index_t d, index_t length, double peer, double goal, double training_peer,
                       double training_goal) {
    add_attention(rows, " D" + std::to_string(d) + " T" + std::to_string(length),
                  {32, 8, d, 16384 / length, length}, {peer, goal, training_peer, training_goal},
                  ctx);
  };
  add(128, 2048, 0.889, 0.511, 4.23, 2.28);
  add(128, 16384, 6.59, 3.75, 24.2, 14.5);
  add(64, 2048, 0.519, 0.347, 2.38, 2.37);
  add(64, 16384, 3.63, 2.33, 16.5, 9.73);
}

void add_selective_rows(std::vector<row>& rows, const cuda::context& ctx) {
  struct shape_of {
    index_t batch, length;
    double peer, goal, training_peer, training_goal;
  };
  for (const shape_of& s :
       {shape_of{8, 2048, 1.362, 0.9, 7.405, 5.0}, {1, 16384, 1.808, 0.9, 8.131, 5.0}}) {
    constexpr index_t d = 5120, n = 16;
    const auto work = [=, &ctx](bool backward) {
      const auto delta =
          to<cuda>(cast<bf16>(uniform<float, 3>({s.batch, s.length, d}, 0.001, 0.1, 1)), ctx);
      const auto a = to<cuda>(uniform<float, 2>({d, n}, -16.0, -1.0, 2), ctx);
      const auto b = random_bf16<4>({s.batch, s.length, 1, n}, 0.5, 3);
      const auto c = random_bf16<4>({s.batch, s.length, 1, n}, 0.5, 4);
      const auto u = random_bf16<3>({s.batch, s.length, d}, 1.0, 5);
      const auto skip = tensor<float, 1, cuda>::full({d}, 1.0f);
      return work_of((selective(delta, a, c, b) + diagonal(skip)) * channels(u), backward, ctx);
    };
    const double count = static_cast<double>(s.batch * s.length);
    const double bytes = bf16_bytes * count * (3.0 * d + 2.0 * n);
    const std::string shape = shape_name(s.batch, s.length);
    rows.push_back({"selective scan forward" + shape, made_first(ctx, [=] { return work(false); }),
                    bytes, 0, s.peer, s.goal});
    rows.push_back({"selective scan forward + backward" + shape,
                    made_first(ctx, [=] { return work(true); }),
                    bytes + bf16_bytes * count * 5.0 * d, 0, s.training_peer, s.training_goal});
  }
}

void add_convolution_rows(std::vector<row>& rows, const cuda::context& ctx) {
  struct shape_of {
    index_t batch, length;
    std::optional<double> peer, goal, training_peer, training_goal;
  };
  for (const shape_of& s :
       {shape_of{8, 2048, 0.140, 0.13, 0.464, 0.40}, {1, 16384, {}, {}, {}, {}}}) {
    constexpr index_t channels = 5376, width = 4;
    const auto work = [=, &ctx](bool backward) -> std::function<void()> {
      const auto x = random_bf16<3>({s.batch, s.length, channels}, 1.0, 1);
      const auto weight = to<cuda>(uniform<float, 2>({channels, width}, -0.5, 0.5, 2), ctx);
      const auto bias = to<cuda>(uniform<float, 1>({channels}, -0.5, 0.5, 3), ctx);
      const conv1d_options<bf16, cuda> silu{.activation = conv1d_activation::silu};
      if (!backward) {
        return [=, &ctx] { (void)op::causal_conv1d(pass<bf16, cuda>{ctx}, x, weight, bias, silu); };
      }
      const auto dy = random_bf16<3>(x.extents(), 1.0, 4);
      return [=, &ctx] {
        tape<bf16, cuda> t;
        t.watch(x);
        t.watch(weight);
        t.watch(bias);
        const auto y = op::causal_conv1d(pass<bf16, cuda>{ctx, &t}, x, weight, bias, silu);
        t.gradient(y).copy_from(dy);
        t.backward();
      };
    };
    const double bytes = 2 * bf16_bytes * static_cast<double>(s.batch * s.length * channels);
    const std::string shape = shape_name(s.batch, s.length);
    rows.push_back({"conv forward" + shape, made_first(ctx, [=] { return work(false); }), bytes, 0,
                    s.peer, s.goal});
    rows.push_back({"conv forward + backward" + shape, made_first(ctx, [=] { return work(true); }),
                    2.5 * bytes, 0, s.training_peer, s.training_goal});
  }
}

void add_gated_rows(std::vector<row>& rows, const cuda::context& ctx) {
  constexpr index_t batch = 8, length = 2048, heads = 16, size = 128;
  const shape<4> extents{batch, length, heads, size};
  const auto kernel = [=] {
    return random_bf16<4>(extents, 1.0, 1) *
           transpose(random_bf16<4>(extents, 1.0 / std::sqrt(static_cast<double>(size)), 2));
  };
  const auto gla = [=, &ctx](bool backward) {
    const auto gate = to<cuda>(uniform<float, 4>(extents, -0.1, 0.0, 4), ctx);
    return work_of(gated<bf16>(gate, kernel()) * random_bf16<4>(extents, 1.0, 3), backward, ctx);
  };
  const auto delta = [=, &ctx](bool backward) {
    const shape<3> numbers{batch, length, heads};
    const auto decay = to<cuda>(uniform<float, 3>(numbers, -0.1, 0.0, 4), ctx);
    const auto rate = to<cuda>(uniform<float, 3>(numbers, 0.0, 1.0, 5), ctx);
    const auto unit = [&](std::uint64_t seed) {
      return op::l2_normalize(pass<bf16, cuda>{ctx}, random_bf16<4>(extents, 1.0, seed));
    };
    return work_of(delta_rule<bf16>(decay, rate, unit(1) * transpose(unit(2))) *
                       random_bf16<4>(extents, 1.0, 3),
                   backward, ctx);
  };
  const double elements = static_cast<double>(batch * length * heads * size);
  const double bytes = elements * (4 * bf16_bytes + float_bytes);
  const double delta_bytes = elements * 4 * bf16_bytes;
  const std::string shape = shape_name(batch, length) + " H16 N128 P128";
  rows.push_back({"gated linear attention forward" + shape,
                  made_first(ctx, [=] { return gla(false); }),
                  bytes,
                  0,
                  {},
                  {}});
  rows.push_back({"gated linear attention forward + backward" + shape,
                  made_first(ctx, [=] { return gla(true); }),
                  2.5 * bytes,
                  0,
                  {},
                  {}});
  rows.push_back({"gated delta rule forward" + shape,
                  made_first(ctx, [=] { return delta(false); }),
                  delta_bytes,
                  0,
                  {},
                  {}});
  rows.push_back({"gated delta rule forward + backward" + shape,
                  made_first(ctx, [=] { return delta(true); }),
                  2.5 * delta_bytes,
                  0,
                  {},
                  {}});
}

}  // namespace cuda_bench
