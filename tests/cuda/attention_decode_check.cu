#include "check.cuh"
#include <ssmlib/kernels/cuda/attention_decode.cuh>

/// @file
/// Attention from a cache on the GPU against float64, and bit by bit over splits, batches and
/// rings.

namespace {

using namespace ssm;
using namespace ssm::cuda_check;
using namespace ssm::kernels::cuda;

struct decode_case {
  const char* name;
  std::vector<index_t> lengths;
  index_t heads, q_heads, k_heads, v_heads, size, features, window;
  index_t start;     // tokens that come at once first; then up to 16 at a time
  bool heads_first;  // the layout of the cache
};

template <class T>
rows_buffer<T> gathered(const rows_buffer<T>& from, const std::vector<index_t>& rows) {
  const auto all = from.matrix();
  rows_buffer<T> to(static_cast<index_t>(rows.size()), all.extents[1], 1);
  const auto out = to.mutable_matrix();
  for (std::size_t i = 0; i < rows.size();) {
    std::size_t n = 1;
    while (i + n < rows.size() && rows[i + n] == rows[i] + static_cast<index_t>(n))
      ++n;
    SSMLIB_CHECK_CUDA(cudaMemcpy2D(out.data + i * out.strides[0], out.strides[0] * sizeof(T),
                                   all.data + rows[i] * all.strides[0], all.strides[0] * sizeof(T),
                                   all.extents[1] * sizeof(T), n, cudaMemcpyDeviceToDevice));
    i += n;
  }
  return to;
}

template <class T>
struct cache_memory {
  rows_buffer<T> memory;
  view<T, 4> v;

  cache_memory(index_t sequences, index_t rows, index_t heads, index_t size, bool heads_first)
      : memory(sequences * rows * heads, size) {
    memory.poison();
    const index_t all = rows * heads * size;
    v = heads_first
            ? view<T, 4>{memory.data(), {sequences, rows, heads, size}, {all, size, rows * size, 1}}
            : view<T, 4>{
                  memory.data(), {sequences, rows, heads, size}, {all, heads * size, size, 1}};
  }
};

template <class T>
void check(table& results, const decode_case& s) {
  const index_t sequences = static_cast<index_t>(s.lengths.size()), H = s.heads;
  const index_t D = s.size, P = s.features;
  std::vector<index_t> offsets{0};
  for (const index_t n : s.lengths)
    offsets.push_back(offsets.back() + n);
  const index_t tokens = offsets.back();
  const index_t longest = *std::max_element(s.lengths.begin(), s.lengths.end());
  rows_buffer<T> q(tokens, s.q_heads * D, 1), k(tokens, s.k_heads * D, 3), v(tokens, s.v_heads * P);
  const auto hq = q.fill(1, -1, 1), hk = k.fill(2, -1, 1), hv = v.fill(3, -1, 1);
  const double scale = 2.0 / std::sqrt(static_cast<double>(D));
  // The last tokens of every sequence; all of short ones.
  std::vector<std::pair<index_t, index_t>> checked;
  for (index_t i = 0; i < sequences; ++i)
    for (index_t t = std::max<index_t>(0, s.lengths[i] - 60); t < s.lengths[i]; ++t)
      checked.emplace_back(i, t);
  const index_t count = static_cast<index_t>(checked.size());
  std::vector<double> wanted(count * H * P);
  parallel(count * H, [&](index_t task) {
    const auto [i, t] = checked[task / H];
    const index_t h = task % H, from = s.window ? std::max<index_t>(0, t - s.window + 1) : 0;
    std::vector<double> logit(t + 1);
    double most = -INFINITY, sum = 0;
    for (index_t p = from; p <= t; ++p) {
      const double* a = &hq[((offsets[i] + t) * s.q_heads + h * s.q_heads / H) * D];
      const double* b = &hk[((offsets[i] + p) * s.k_heads + h * s.k_heads / H) * D];
      for (index_t d = 0; d < D; ++d)
        logit[p] += a[d] * b[d];
      logit[p] *= scale;
      most = std::max(most, logit[p]);
    }
    double* out = &wanted[task * P];
    for (index_t p = from; p <= t; ++p) {
      const double weight = std::exp(logit[p] - most);
      sum += weight;
      for (index_t c = 0; c < P; ++c)
        out[c] += weight * hv[((offsets[i] + p) * s.v_heads + h * s.v_heads / H) * P + c];
    }
    for (index_t c = 0; c < P; ++c)
      out[c] /= sum;
  });

  const auto run = [&](const std::vector<index_t>& rows, const std::vector<index_t>& cuts,
                       const std::vector<index_t>& at, const attention_cache<T>& cache,
                       index_t max_keys, std::vector<double>& all) {
    const auto pq = gathered(q, rows), pk = gathered(k, rows), pv = gathered(v, rows);
    rows_buffer<T> out(static_cast<index_t>(rows.size()), H * P, 1);
    out.poison();
    const index_t batch = static_cast<index_t>(at.size());
    const buffer<index_t> o(cuts), position(at);
    attention_decode_problem<T> p{pq.heads(s.q_heads),
                                  pk.heads(s.k_heads),
                                  pv.heads(s.v_heads),
                                  H,
                                  cache,
                                  position.data(),
                                  o.data(),
                                  batch};
    for (index_t i = 0; i < batch; ++i)
      p.max_length = std::max(p.max_length, cuts[i + 1] - cuts[i]);
    p.max_keys = max_keys, p.scale = scale, p.window = s.window;
    rows_buffer<float> work(1, static_cast<index_t>(attention_decode_workspace_bytes(p) / 4) + 1);
    work.poison();
    attention_decode<T>(nullptr, p, out.mutable_heads(H), work.data());
    SSMLIB_CHECK_CUDA(cudaDeviceSynchronize());
    const auto y = out.read();
    for (std::size_t r = 0; r < rows.size(); ++r)
      std::copy_n(&y[r * H * P], H * P, &all[rows[r] * H * P]);
  };
  const auto pick = [&](const std::vector<double>& all) {
    std::vector<double> some;
    for (const auto& [i, t] : checked) {
      const double* r = &all[(offsets[i] + t) * H * P];
      some.insert(some.end(), r, r + H * P);
    }
    return some;
  };
  // Everything in one call.
  cache_memory<T> keys(sequences, std::max<index_t>(1, longest + s.window), s.k_heads, D,
                       s.heads_first),
      values(sequences, std::max<index_t>(1, longest + s.window), s.v_heads, P, s.heads_first);
  std::vector<double> whole(tokens * H * P), split(tokens * H * P), alone(tokens * H * P);
  std::vector<index_t> rows(tokens);
  for (index_t t = 0; t < tokens; ++t)
    rows[t] = t;
  run(rows, offsets, std::vector<index_t>(sequences, 0), {keys.v, values.v}, 0, whole);
  const double bound = sizeof(T) == 2 ? 6e-3 : sizeof(T) == 4 ? 2e-6 : 1e-13;
  results.row(s.name, sizeof(T) == 2 ? "bf16" : sizeof(T) == 4 ? "f32" : "f64");
  results.error("y", pick(whole), wanted, bound);
  // In steps, all sequences together, and each one by itself from a ring of another length.
  const auto steps = [&](index_t first, index_t last, index_t ring, std::vector<double>& all) {
    const index_t batch = last - first;
    cache_memory<T> step_keys(batch, ring, s.k_heads, D, !s.heads_first);
    cache_memory<T> step_values(batch, ring, s.v_heads, P, s.heads_first);
    std::vector<index_t> at(batch, 0);
    for (index_t call = 0;; ++call) {
      std::vector<index_t> take, cuts{0};
      const auto was = at;
      for (index_t i = 0; i < batch; ++i) {
        const index_t left = s.lengths[first + i] - at[i];
        const index_t n =
            std::min(call == 0 && s.start > 0 ? s.start : (5 * call + 3 * i) % 17, left);
        for (index_t t = 0; t < n; ++t)
          take.push_back(offsets[first + i] + at[i] + t);
        cuts.push_back(static_cast<index_t>(take.size()));
        at[i] += n;
      }
      run(take, cuts, was, {step_keys.v, step_values.v}, s.window ? 0 : ring, all);
      if (std::equal(at.begin(), at.end(), s.lengths.begin() + first)) break;
    }
  };
  const index_t ring = s.window ? s.window - 1 + 16 : std::max<index_t>(1, longest);
  steps(0, sequences, ring, split);
  results.error("split", pick(split), pick(whole), 0);
  for (index_t i = 0; i < sequences; ++i)
    steps(i, i + 1, ring + 37, alone);
  results.error("alone", pick(alone), pick(whole), 0);
  results.end();
}

void measure(index_t sequences, index_t keys, index_t tokens, double copy) {
  using T = bf16;
  const index_t H = 32, K = 8, D = 128, rows = keys;
  const double bytes = 4.0 * sequences * keys * K * D;
  const index_t layers = std::clamp<index_t>(static_cast<index_t>(400e6 / bytes), 1, 24);
  cache_memory<T> k(layers * sequences, rows, K, D, true), v(layers * sequences, rows, K, D, true);
  rows_buffer<T> q(sequences * tokens, H * D), nk(sequences * tokens, K * D),
      nv(sequences * tokens, K * D), y(sequences * tokens, H * D);
  for (auto* r : {&k.memory, &v.memory, &q, &nk, &nv})
    r->fill_device(3, -1, 1);
  const buffer<index_t> position(std::vector<index_t>(sequences, keys - tokens));
  attention_decode_problem<T> p{q.heads(H), nk.heads(K), nv.heads(K), H, {}, position.data()};
  p.sequences = sequences, p.max_length = tokens, p.scale = 0.088;
  const auto part = [&](view<T, 4> all, index_t l) {
    all.data += l * sequences * all.strides[0];
    all.extents[0] = sequences;
    return all;
  };
  p.cache = {part(k.v, 0), part(v.v, 0)};
  buffer<unsigned char> work(static_cast<index_t>(attention_decode_workspace_bytes(p)));
  const double ms = median_ms([&](cudaStream_t stream) {
                      for (index_t l = 0; l < layers; ++l) {
                        p.cache = {part(k.v, l), part(v.v, l)};
                        attention_decode<T>(stream, p, y.mutable_heads(H), work.data());
                      }
                    }) /
                    static_cast<double>(layers);
  std::printf("b%lld, %lld keys, %lld new: %.4f ms (%.0f%% of copy)\n",
              static_cast<long long>(sequences), static_cast<long long>(keys),
              static_cast<long long>(tokens), ms, 100 * bytes / copy * 1e3 / ms);
}

}  // namespace

int main(int argc, char** argv) {
  if (!have_device()) return 2;
  const bool small = wants_small(argc, argv), all = !wants_bf16_only(argc, argv);
  table results;
  const std::vector<index_t> mixed{300, 0, 1, 77, 530};
  const std::vector<decode_case> cases{
      {"128", mixed, 8, 8, 2, 2, 128, 128, 0, 100, false},
      {"128 far", {4700, 4090}, 4, 4, 1, 1, 128, 128, 0, 4600, true},
      {"64 window", mixed, 6, 6, 2, 2, 64, 64, 70, 0, true},
      {"256", mixed, 4, 4, 2, 2, 256, 256, 0, 20, false},
      {"96", mixed, 3, 1, 3, 1, 96, 96, 0, 30, false},
      {"192 window", mixed, 4, 4, 4, 4, 192, 192, 300, 0, true},
      {"32", mixed, 16, 16, 1, 1, 32, 32, 0, 200, true},
      {"odd", mixed, 6, 6, 2, 3, 40, 21, 0, 60, false},
      {"odd window", mixed, 4, 2, 1, 4, 33, 300, 5, 0, true},
  };
  for (const auto& s : cases) {
    if (all) check<double>(results, s), check<float>(results, s);
    check<bf16>(results, s);
  }
  if (small) return finish();
  check<bf16>(results, {"33k", {33500}, 4, 4, 1, 1, 128, 128, 0, 33450, true});
  const double copy = copy_bandwidth();
  std::printf("device copy %.2f TB/s\n", copy / 1e12);
  for (const index_t b : {1, 8, 64})
    for (const index_t n : {4096, 32768, 131072})
      for (const index_t t : {1, 4, 16})
        if (t == 1 || n < 131072) measure(b, n, t, copy);
  return finish();
}
