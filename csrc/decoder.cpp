#include "decoder.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

#include "cpu/parallel.h"

namespace quantization_mlx {

using namespace classes;

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* op = "decoder_step";

// New tokens whose step keeps the CPU's threads waiting for the next op's tasks.
constexpr int64_t most_tokens_of_team = 16;

// Everything that a layer reads and writes beside its weights.
struct Step {
  at::TensorList cosines;
  at::TensorList sines;
  int64_t position;
  const OptionalTensor& mask;  // [batch, 1, 1, position + tokens], bool
  int64_t group_size;  // of a packed cache
  int64_t bits;  // 0 where the cache is not packed
};

// Where a layer has its keys and values [batch, heads, capacity, ...]: as they are or, both in one tensor
// [2, batch, heads, capacity, ...] each, as packed words, scales and biases.
using LayerCache = c10::ArrayRef<Tensor>;

// Without the bias, which another op may add in passing.
Tensor product(const Projection& projection, const Tensor& x) {
  return projection.scales.has_value()
      ? ops::quantized_matmul(
            x, projection.weight, *projection.scales, projection.biases, /*transpose=*/true, projection.group_size,
            projection.bits, projection.mode, std::nullopt, op)
      : at::linear(x, projection.weight);
}

Tensor plus_bias(const Tensor& y, const OptionalTensor& bias) { return bias.has_value() ? y.add(*bias) : y; }

Tensor project(const Projections& projections, const Tensor& x) {
  if (projections.size() == 1) {
    const Projection& only = *projections.front();
    return plus_bias(product(only, x), only.bias);
  }
  std::vector<Tensor> parts;
  for (const auto& each : projections) {
    parts.push_back(plus_bias(product(*each, x), each->bias));
  }
  return at::cat(parts, -1);
}

// The residual stream and what the next part reads: the stream normalised.
struct Stream {
  Tensor sum;
  Tensor normal;
};

// The stream with y added, and the norm of that.
Stream added(
    const Stream& stream,
    const Tensor& y,
    const OptionalTensor& norm_out,
    const OptionalTensor& norm,
    double residual_scale,
    double epsilon) {
  if (!norm_out.has_value() && !norm.has_value()) {
    const Tensor sum = stream.sum.add(y, residual_scale);
    return {sum, sum};
  }
  auto [sum, normal] = ops::add_rms_norm(y, stream.sum, norm, epsilon, norm_out, residual_scale);
  return {sum, norm.has_value() ? normal : sum};
}

// Queries, keys and values of all heads side by side, and what has to be added to them.
struct Heads {
  Tensor x;
  OptionalTensor bias;
};

Heads heads_of(const DecoderLayer& layer, const Tensor& x) {
  if (layer.attention_in.size() > 1) {
    return {project(layer.attention_in, x), std::nullopt};
  }
  const Projection& only = *layer.attention_in.front();
  return {product(only, x), only.bias};
}

// New keys and values [2, batch, heads, tokens, dim], quantized.
void pack_into_cache(const Tensor& heads, LayerCache cache, const Step& step) {
  const auto [words, scales, biases] = ops::quantize(heads, step.group_size, step.bits, "affine", std::nullopt);
  const Tensor parts[] = {words.view(cache[0].scalar_type()), scales, biases};
  for (size_t i = 0; i < cache.size(); ++i) {
    cache[i].narrow(3, step.position, parts[i].size(3)).copy_(parts[i]);
  }
}

// Of states [batch, heads, capacity, dim]: in one call what narrow does in three.
Tensor first_positions(const Tensor& states, int64_t length) {
  return states.as_strided({states.size(0), states.size(1), length, states.size(3)}, states.strides());
}

// [batch, heads, tokens, dim] -> [batch, tokens, heads * dim]
Tensor heads_side_by_side(const Tensor& y) {
  const std::array<int64_t, 3> sizes{y.size(0), y.size(2), y.size(1) * y.size(3)};
  return y.size(2) == 1 ? y.view(sizes) : y.transpose(1, 2).reshape(sizes);
}

Tensor attention(const DecoderLayer& layer, const Tensor& x, LayerCache cache, const Step& step) {
  const auto angles = [&](at::TensorList all) {
    return layer.rotation < 0 ? std::nullopt : OptionalTensor(all[layer.rotation]);
  };
  const auto queries_of = [&](const Tensor& keys, const Tensor& values, int64_t position) {
    const Heads heads = heads_of(layer, x);
    return ops::rope_into_cache(
        heads.x, angles(step.cosines), angles(step.sines), keys, values, position, heads.bias, layer.query_norm,
        layer.key_norm, layer.epsilon);
  };
  const int64_t tokens = x.size(1);
  const int64_t length = step.position + tokens;
  // One token sees all that is there, unless a window hides the first.
  const bool causal = tokens > 1 || (layer.window.has_value() && *layer.window < length);
  const auto window = causal ? layer.window : std::nullopt;
  Tensor y;
  if (step.bits == 0) {
    const auto filled = [&](const Tensor& states) { return first_positions(states, length); };
    const Tensor queries = queries_of(cache[0], cache[1], step.position);
    y = ops::scaled_dot_product_attention(
        queries, filled(cache[0]), filled(cache[1]), layer.scale, step.mask, causal, layer.sinks, window,
        layer.softcap);
  } else {
    const auto filled = [&](int part, int which) { return cache[part].select(0, which).narrow(2, 0, length); };
    const int64_t dim = cache[1].size(4) * step.group_size;
    const auto new_states = [&] { return at::empty({x.size(0), cache[1].size(2), tokens, dim}, x.options()); };
    const Tensor keys = new_states();
    const Tensor values = new_states();
    const Tensor queries = queries_of(keys, values, 0);
    pack_into_cache(at::stack({keys, values}), cache, step);
    y = ops::quantized_scaled_dot_product_attention(
        queries, filled(0, 0), filled(1, 0), filled(2, 0), filled(0, 1), filled(1, 1), filled(2, 1), layer.scale,
        step.mask, causal, layer.sinks, window, step.group_size, step.bits);
  }
  return project(layer.attention_out, heads_side_by_side(y));
}

// --- Latent attention ------------------------------------------------------------------------------------------------

// New tokens that attend in the absorbed form: queries meet latent vectors, and what they give becomes values. More of
// them are worth making keys and values of all positions.
constexpr int64_t most_absorbed_tokens = 16;

// x [heads, n, K] times rows of each head: their transpose or, for absorbing them, themselves.
Tensor product_of_heads(const LatentAttention& latent, const Tensor& x, int64_t first, int64_t count, bool transpose) {
  const Projection& all = *latent.heads;
  const auto rows = [&](const Tensor& tensor) {
    return tensor.view({latent.head_count, -1, tensor.size(-1)}).narrow(1, first, count);
  };
  if (!all.scales.has_value()) {
    const Tensor weight = rows(all.weight);
    return at::matmul(x, transpose ? weight.mT() : weight);
  }
  return ops::quantized_matmul(
      x, rows(all.weight), rows(*all.scales), all.biases.has_value() ? OptionalTensor(rows(*all.biases)) : std::nullopt,
      transpose, all.group_size, all.bits, all.mode, std::nullopt, op);
}

// Latent vectors and turned parts [batch, 1, positions, ...] side by side: as they lie, or copied.
Tensor side_by_side(const Tensor& latents, const Tensor& turned) {
  const bool adjacent = latents.strides() == turned.strides() && latents.is_alias_of(turned) &&
      turned.storage_offset() == latents.storage_offset() + latents.size(-1);
  if (!adjacent) {
    return at::cat({latents, turned}, -1);
  }
  auto sizes = latents.sizes().vec();
  sizes.back() += turned.size(-1);
  return latents.as_strided(sizes, latents.strides());
}

// The parts of queries and keys that are turned, [batch, heads, tokens, dim] and [batch, 1, tokens, dim].
std::pair<Tensor, Tensor> turned_parts(
    const LatentAttention& latent,
    const Tensor& queries,  // [batch, tokens, heads, dim]
    const Tensor& keys,  // [batch, tokens, dim]
    const Tensor& cosines,
    const Tensor& sines) {
  const int64_t dim = keys.size(-1);
  const Tensor key = keys.unsqueeze(2);
  Tensor all = at::cat({queries, key, key}, 2);  // the last in the place of values
  if (latent.interleaved) {
    all = all.unflatten(-1, {dim / 2, 2}).transpose(-1, -2);
  }
  const Tensor turned = at::empty({keys.size(0), 1, keys.size(1), dim}, keys.options());
  const Tensor turned_queries = ops::rope_into_cache(
      all.reshape({keys.size(0), keys.size(1), -1}), cosines, sines, turned, at::empty_like(turned), 0, std::nullopt,
      std::nullopt, std::nullopt, latent.epsilon);
  return {turned_queries, turned};
}

Tensor latent_attention(
    const DecoderLayer& layer,
    const Tensor& x,
    const Tensor& latents,
    const Tensor& turned,
    const Step& step) {
  const LatentAttention& latent = *layer.latent;
  const int64_t batch = x.size(0);
  const int64_t tokens = x.size(1);
  const int64_t length = step.position + tokens;
  const int64_t rank = latents.size(-1);
  const int64_t turned_dim = turned.size(-1);
  const int64_t heads = latent.head_count;
  const Tensor in = project(latent.in, x);
  const auto parts = in.split_with_sizes({in.size(-1) - rank - turned_dim, rank, turned_dim}, -1);
  const Tensor queries =
      (latent.queries.empty() ? parts[0]
                              : project(latent.queries, ops::rms_norm(parts[0], latent.query_norm, latent.epsilon)))
          .view({batch, tokens, heads, -1});
  const auto [turned_queries, turned_keys] = turned_parts(
      latent, queries.narrow(-1, latent.key_dim, turned_dim), parts[2], step.cosines[layer.rotation],
      step.sines[layer.rotation]);
  const auto write = [&](const Tensor& cache, const Tensor& states) {
    cache.narrow(2, step.position, tokens).copy_(states);
  };
  write(latents, ops::rms_norm(parts[1], latent.latent_norm, latent.epsilon).unsqueeze(1));
  write(turned, turned_keys);

  const auto filled = [&](const Tensor& cache) { return cache.narrow(2, 0, length); };
  const auto attend = [&](const Tensor& q, const Tensor& k, const Tensor& v) {
    return ops::scaled_dot_product_attention(
        q, k, v, layer.scale, step.mask, /*causal=*/tokens > 1, std::nullopt, std::nullopt, std::nullopt);
  };
  const Tensor keys = queries.narrow(-1, 0, latent.key_dim);  // what queries multiply keys with
  const int64_t value_dim = latent.heads->weight.size(0) / heads - latent.key_dim;
  if (tokens > most_absorbed_tokens) {
    const Tensor made = product(*latent.heads, filled(latents).squeeze(1)).view({batch, length, heads, -1});
    const Tensor of_all = filled(turned).transpose(1, 2).expand({batch, length, heads, turned_dim});
    const Tensor k = at::cat({made.narrow(-1, 0, latent.key_dim), of_all}, -1).transpose(1, 2);
    const Tensor v = made.narrow(-1, latent.key_dim, value_dim).transpose(1, 2);
    const Tensor y = attend(at::cat({keys.transpose(1, 2), turned_queries}, -1), k, v);
    return project(layer.attention_out, y.transpose(1, 2).reshape({batch, tokens, -1}));
  }
  const auto by_head = [&](const Tensor& tensor) { return tensor.reshape({heads, batch * tokens, -1}); };
  const Tensor absorbed = product_of_heads(latent, by_head(keys.permute({2, 0, 1, 3})), 0, latent.key_dim, false);
  const Tensor q = at::cat({absorbed.view({heads, batch, tokens, rank}).transpose(0, 1), turned_queries}, -1);
  const Tensor k = side_by_side(filled(latents), filled(turned));
  const Tensor y = attend(q, k, k.narrow(-1, 0, rank));
  const Tensor values = product_of_heads(latent, by_head(y.transpose(0, 1)), latent.key_dim, value_dim, true);
  return project(
      layer.attention_out,
      values.view({heads, batch, tokens, value_dim}).permute({1, 2, 0, 3}).reshape({batch, tokens, -1}));
}

// --- MLPs and mixtures -----------------------------------------------------------------------------------------------

struct Gated {
  Tensor gates;
  Tensor values;
};

Gated halves(const Tensor& y) {
  const int64_t length = y.size(-1) / 2;
  return {y.narrow(-1, 0, length), y.narrow(-1, length, length)};
}

Gated in_turns(const Tensor& y) { return {y.slice(-1, 0, std::nullopt, 2), y.slice(-1, 1, std::nullopt, 2)}; }

Tensor gated(const Projections& in, const Projections& out, const std::string& activation, const Tensor& x) {
  const Projection& first = *in.front();
  if (in.size() == 1 && first.scales.has_value() && !first.bias.has_value()) {
    return project(
        out,
        ops::quantized_gated_matmul(
            x, first.weight, *first.scales, first.biases, first.group_size, first.bits, first.mode, activation,
            std::nullopt));
  }
  const auto [gates, values] = halves(project(in, x));
  return project(out, ops::activated(gates, values, activation));
}

// x [..., 1 or k, K] by the experts of indices [..., k], without their biases.
Tensor gathered(const Projection& experts, const Tensor& x, const Tensor& indices) {
  return ops::gather_qmm(
             x.unsqueeze(-2), experts.weight, *experts.scales, experts.biases, std::nullopt, indices,
             /*transpose=*/true, experts.group_size, experts.bits, experts.mode, std::nullopt,
             /*sorted_indices=*/false, op)
      .squeeze(-2);
}

// What the first product of the experts becomes.
Tensor activated(const Mixture& mixture, const Tensor& x, const Tensor& indices) {
  const auto of_products = [&](const auto& function) {
    if (mixture.in.size() > 1) {
      return Gated{function(*mixture.in[0]), function(*mixture.in[1])};
    }
    const Tensor both = function(*mixture.in[0]);
    return mixture.in_turns ? in_turns(both) : halves(both);
  };
  const Gated y = of_products([&](const Projection& experts) { return gathered(experts, x, indices); });
  const bool has_biases = mixture.in.front()->bias.has_value();
  const Gated biases = has_biases ? of_products([](const Projection& experts) { return *experts.bias; }) : Gated{};
  const auto given = [&](const Tensor& tensor) { return has_biases ? OptionalTensor(tensor) : std::nullopt; };
  return ops::swiglu(
      y.gates, y.values, mixture.alpha, mixture.limit, mixture.offset, given(biases.gates), given(biases.values),
      given(indices));
}

Tensor mixed(const Mixture& mixture, const Tensor& x) {
  const Projection& router = *mixture.router;  // which may be of a wider dtype
  const Tensor logits = at::linear(x.to(router.weight.scalar_type()), router.weight, router.bias);
  const auto [indices, weights] = ops::moe_router(
      logits, mixture.k, mixture.scoring, mixture.correction, mixture.groups, mixture.groups_used, mixture.normalise,
      mixture.scale);
  const Tensor y = gathered(*mixture.out, activated(mixture, x.unsqueeze(-2), indices), indices);
  const OptionalTensor shared = mixture.shared_in.empty()
      ? std::nullopt
      : OptionalTensor(gated(mixture.shared_in, mixture.shared_out, "silu", x));
  const OptionalTensor& bias = mixture.out->bias;
  return ops::moe_combine(y, weights, shared, bias, bias.has_value() ? OptionalTensor(indices) : std::nullopt);
}

Tensor mlp(const DecoderLayer& layer, const Tensor& x) {
  return layer.mixture ? mixed(*layer.mixture, x) : gated(layer.mlp_in, layer.mlp_out, layer.activation, x);
}

bool are_packed(const Projections& projections) {
  return std::all_of(
      projections.begin(), projections.end(), [](const auto& projection) { return projection->scales.has_value(); });
}

bool is_packed(const DecoderLayer& layer) {
  const LatentAttention* latent = layer.latent.get();
  const Mixture* mixture = layer.mixture.get();
  return are_packed(layer.attention_in) && are_packed(layer.attention_out) && are_packed(layer.mlp_in) &&
      are_packed(layer.mlp_out) &&
      (latent == nullptr || (are_packed(latent->in) && are_packed(latent->queries) && are_packed({latent->heads}))) &&
      (mixture == nullptr ||
       (are_packed(mixture->in) && are_packed({mixture->out}) && are_packed(mixture->shared_in) &&
        are_packed(mixture->shared_out)));
}

// But for routers, which are small.
bool has_packed_products(const Decoder& decoder) {
  return std::all_of(decoder.layers.begin(), decoder.layers.end(), [](const auto& layer) { return is_packed(*layer); });
}

void check_lists(
    const Decoder& decoder,
    const Step& step,
    at::TensorList keys,
    at::TensorList values,
    const Tensor& x) {
  const size_t count = decoder.layers.size();
  if (step.bits == 0) {
    TORCH_CHECK_VALUE(
        keys.size() == count && values.size() == keys.size() && !keys.empty(), "[", op, "] ", keys.size(), " keys and ",
        values.size(), " values do not fit ", count, " layers; there must be one or more.");
  } else {
    TORCH_CHECK_VALUE(
        keys.size() == 3 * count && values.empty() && !keys.empty(), "[", op, "] ", keys.size(), " keys and ",
        values.size(), " values do not fit ", count, " layers with a packed cache; there must be words, scales and ",
        "biases of each layer's keys and values as keys, and no values.");
    for (const Tensor& tensor : keys) {
      TORCH_CHECK_VALUE(
          tensor.dim() == 5 && tensor.size(0) == 2, "[", op, "] packed keys and values of shape ", tensor.sizes(),
          " must be [2, batch, heads, capacity, words or groups].");
    }
  }
  for (const auto& layer : decoder.layers) {
    TORCH_CHECK_VALUE(
        step.bits == 0 || (!layer->softcap.has_value() && layer->latent == nullptr), "[", op,
        "] a layer caps its scores or has latent attention, which no packed cache serves.");
    TORCH_CHECK_VALUE(
        layer->rotation < static_cast<int64_t>(std::min(step.cosines.size(), step.sines.size())), "[", op,
        "] a layer has rotation ", layer->rotation, ", and there are ", step.cosines.size(), " cosines and ",
        step.sines.size(), " sines.");
  }
  TORCH_CHECK_VALUE(x.dim() == 3, "[", op, "] x of shape ", x.sizes(), " must be [batch, tokens, hidden size].");
}

// Tokens through all layers.
Tensor run_layers(
    const Decoder& decoder,
    const Tensor& x,
    at::TensorList keys,
    at::TensorList values,
    const Step& step) {
  const auto& layers = decoder.layers;
  const auto& first = layers.front()->attention_norm;
  Stream stream{x, first.has_value() ? ops::rms_norm(x, first, layers.front()->epsilon) : x};
  for (size_t i = 0; i < layers.size(); ++i) {
    const DecoderLayer& layer = *layers[i];
    const auto add = [&](const Tensor& y, const OptionalTensor& norm_out, const OptionalTensor& norm, double epsilon) {
      stream = added(stream, y, norm_out, norm, layer.residual_scale, epsilon);
    };
    const Tensor states[] = {keys[i], step.bits == 0 ? values[i] : Tensor()};
    const LayerCache cache = step.bits == 0 ? LayerCache(states) : keys.slice(3 * i, 3);
    const Tensor attended = layer.latent ? latent_attention(layer, stream.normal, cache[0], cache[1], step)
                                         : attention(layer, stream.normal, cache, step);
    add(attended, layer.attention_norm_out, layer.mlp_norm, layer.epsilon);
    const Tensor y = mlp(layer, stream.normal);
    const bool is_last = i + 1 == layers.size();
    add(y, layer.mlp_norm_out, is_last ? decoder.norm : layers[i + 1]->attention_norm,
        is_last ? decoder.epsilon : layers[i + 1]->epsilon);
  }
  return stream.normal;
}

Tensor decoder_step(
    const c10::intrusive_ptr<Decoder>& decoder,
    const Tensor& x,
    at::TensorList cosines,
    at::TensorList sines,
    at::TensorList keys,
    at::TensorList values,
    int64_t position,
    const OptionalTensor& mask,
    int64_t group_size,
    int64_t bits) {
  const Step step{cosines, sines, position, mask, group_size, bits};
  check_lists(*decoder, step, keys, values, x);
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  const auto run = [&] { return run_layers(*decoder, x, keys, values, step); };
  // Of many tokens, and in torch's own products, each op has work enough for waking threads.
  if (!x.is_cpu() || x.size(0) * x.size(1) > most_tokens_of_team || !has_packed_products(*decoder)) {
    return run();
  }
  Tensor y;
  cpu::with_waiting_threads([&] { y = run(); });
  return y;
}

c10::intrusive_ptr<LatentAttention> make_latent_attention(
    Projections in,
    Projections queries,
    OptionalTensor query_norm,
    Tensor latent_norm,
    double epsilon,
    c10::intrusive_ptr<Projection> heads,
    int64_t head_count,
    int64_t key_dim,
    bool interleaved) {
  auto latent = c10::make_intrusive<LatentAttention>();
  latent->in = std::move(in);
  latent->queries = std::move(queries);
  latent->query_norm = std::move(query_norm);
  latent->latent_norm = std::move(latent_norm);
  latent->epsilon = epsilon;
  latent->heads = std::move(heads);
  latent->head_count = head_count;
  latent->key_dim = key_dim;
  latent->interleaved = interleaved;
  return latent;
}

c10::intrusive_ptr<Mixture> make_mixture(
    c10::intrusive_ptr<Projection> router,
    Projections in,
    c10::intrusive_ptr<Projection> out,
    bool in_turns,
    Projections shared_in,
    Projections shared_out,
    int64_t k,
    std::string scoring,
    OptionalTensor correction,
    int64_t groups,
    int64_t groups_used,
    bool normalise,
    double scale,
    double alpha,
    std::optional<double> limit,
    double offset) {
  auto mixture = c10::make_intrusive<Mixture>();
  mixture->router = std::move(router);
  mixture->in = std::move(in);
  mixture->out = std::move(out);
  mixture->in_turns = in_turns;
  mixture->shared_in = std::move(shared_in);
  mixture->shared_out = std::move(shared_out);
  mixture->k = k;
  mixture->scoring = std::move(scoring);
  mixture->correction = std::move(correction);
  mixture->groups = groups;
  mixture->groups_used = groups_used;
  mixture->normalise = normalise;
  mixture->scale = scale;
  mixture->alpha = alpha;
  mixture->limit = limit;
  mixture->offset = offset;
  return mixture;
}

// What a layer is made of, by name.
c10::intrusive_ptr<DecoderLayer> make_layer(
    Projections attention_in,
    std::optional<c10::intrusive_ptr<LatentAttention>> latent,
    Projections attention_out,
    Projections mlp_in,
    Projections mlp_out,
    std::optional<c10::intrusive_ptr<Mixture>> mixture,
    const c10::Dict<std::string, Tensor>& norms,
    const OptionalTensor& sinks,
    double epsilon,
    double scale,
    std::optional<int64_t> window,
    std::optional<double> softcap,
    int64_t rotation,
    double residual_scale,
    std::string activation) {
  auto layer = c10::make_intrusive<DecoderLayer>();
  layer->attention_in = std::move(attention_in);
  layer->latent = latent.has_value() ? std::move(*latent) : nullptr;
  layer->attention_out = std::move(attention_out);
  layer->mlp_in = std::move(mlp_in);
  layer->mlp_out = std::move(mlp_out);
  layer->mixture = mixture.has_value() ? std::move(*mixture) : nullptr;
  std::pair<const char*, OptionalTensor*> places[] = {
      {"attention", &layer->attention_norm},
      {"attention_out", &layer->attention_norm_out},
      {"mlp", &layer->mlp_norm},
      {"mlp_out", &layer->mlp_norm_out},
      {"query", &layer->query_norm},
      {"key", &layer->key_norm}};
  size_t known = 0;
  for (auto& [name, place] : places) {
    if (norms.contains(name)) {
      *place = norms.at(name);
      ++known;
    }
  }
  TORCH_CHECK_VALUE(
      known == norms.size(), "[", op,
      "] norms has unknown names; known are attention, attention_out, mlp, mlp_out, "
      "query and key.");
  layer->sinks = sinks;
  layer->epsilon = epsilon;
  layer->scale = scale;
  layer->window = window;
  layer->softcap = softcap;
  layer->rotation = rotation;
  layer->residual_scale = residual_scale;
  layer->activation = std::move(activation);
  return layer;
}

c10::intrusive_ptr<Decoder> make_decoder(
    std::vector<c10::intrusive_ptr<DecoderLayer>> layers,
    OptionalTensor norm,
    double epsilon) {
  auto decoder = c10::make_intrusive<Decoder>();
  decoder->layers = std::move(layers);
  decoder->norm = std::move(norm);
  decoder->epsilon = epsilon;
  return decoder;
}

}  // namespace

void define_decoder(torch::Library& library) {
  library.class_<Projection>("Projection")
      .def(torch::init<Tensor, OptionalTensor, OptionalTensor, OptionalTensor, int64_t, int64_t, std::string>());
  library.class_<LatentAttention>("LatentAttention").def(torch::init(make_latent_attention));
  library.class_<Mixture>("Mixture").def(torch::init(make_mixture));
  library.class_<DecoderLayer>("DecoderLayer").def(torch::init(make_layer));
  library.class_<Decoder>("Decoder").def(torch::init(make_decoder));
  const std::string name = op_namespace();
  library.def((std::string(op) + "(__torch__.torch.classes." + name +
               ".Decoder decoder, Tensor x, Tensor[] cosines, Tensor[] sines, Tensor(a!)[] keys, Tensor(b!)[] values, "
               "int position, Tensor? mask=None, int group_size=0, int bits=0) -> Tensor")
                  .c_str());
}

void implement_decoder(torch::Library& library) { library.impl(op, decoder_step); }

}  // namespace quantization_mlx
