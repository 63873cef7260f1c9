#include "decoder.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/linear.h>

#include <algorithm>
#include <tuple>
#include <utility>

namespace quantization_mlx {

using namespace classes;

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* op = "decoder_step";

// Everything that a layer reads and writes beside its weights.
struct Step {
  at::TensorList cosines;
  at::TensorList sines;
  int64_t position;
  const OptionalTensor& mask;  // [batch, 1, 1, position + tokens], bool
};

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
    Tensor y,
    const OptionalTensor& norm_out,
    const OptionalTensor& norm,
    double residual_scale,
    double epsilon) {
  if (norm_out.has_value()) {
    y = ops::rms_norm(y, norm_out, epsilon);
  }
  if (residual_scale != 1.0) {
    y = y.mul(residual_scale);
  }
  if (!norm.has_value()) {
    const Tensor sum = stream.sum.add(y);
    return {sum, sum};
  }
  auto [sum, normal] = ops::add_rms_norm(y, stream.sum, norm, epsilon);
  return {sum, normal};
}

Tensor attention(
    const DecoderLayer& layer,
    const Tensor& x,
    const Tensor& keys,
    const Tensor& values,
    const Step& step) {
  const bool is_single = layer.attention_in.size() == 1;
  const Tensor heads = is_single ? product(*layer.attention_in.front(), x) : project(layer.attention_in, x);
  const OptionalTensor bias = is_single ? layer.attention_in.front()->bias : std::nullopt;
  const auto angles = [&](at::TensorList all) {
    return layer.rotation < 0 ? std::nullopt : OptionalTensor(all[layer.rotation]);
  };
  const Tensor queries = ops::rope_into_cache(
      heads, angles(step.cosines), angles(step.sines), keys, values, step.position, bias, layer.query_norm,
      layer.key_norm, layer.epsilon);
  const int64_t tokens = x.size(1);
  const int64_t length = step.position + tokens;
  const auto filled = [&](const Tensor& cache) { return cache.narrow(2, 0, length); };
  // One token sees all that is there, unless a window hides the first.
  const bool causal = tokens > 1 || (layer.window.has_value() && *layer.window < length);
  const Tensor y = ops::scaled_dot_product_attention(
      queries, filled(keys), filled(values), layer.scale, step.mask, causal, layer.sinks,
      causal ? layer.window : std::nullopt);
  return project(layer.attention_out, y.transpose(1, 2).reshape({x.size(0), tokens, -1}));
}

Tensor gated(const DecoderLayer& layer, const Tensor& x) {
  const Tensor y = project(layer.mlp_in, x);
  const int64_t length = y.size(-1) / 2;
  const Tensor gates = y.narrow(-1, 0, length);
  const Tensor values = y.narrow(-1, length, length);
  const Tensor activated = layer.activation == "silu" ? ops::swiglu(gates, values, 1.0, std::nullopt, 0.0)
                                                      : ops::geglu(gates, values, layer.activation);
  return project(layer.mlp_out, activated);
}

void check_lists(
    const Decoder& decoder,
    const Step& step,
    at::TensorList keys,
    at::TensorList values,
    const Tensor& x) {
  TORCH_CHECK_VALUE(
      keys.size() == decoder.layers.size() && values.size() == keys.size() && !keys.empty(), "[", op, "] ", keys.size(),
      " keys and ", values.size(), " values do not fit ", decoder.layers.size(), " layers; there must be one or more.");
  for (const auto& layer : decoder.layers) {
    TORCH_CHECK_VALUE(
        layer->rotation < static_cast<int64_t>(std::min(step.cosines.size(), step.sines.size())), "[", op,
        "] a layer has rotation ", layer->rotation, ", and there are ", step.cosines.size(), " cosines and ",
        step.sines.size(), " sines.");
  }
  TORCH_CHECK_VALUE(x.dim() == 3, "[", op, "] x of shape ", x.sizes(), " must be [batch, tokens, hidden size].");
}

Tensor decoder_step(
    const c10::intrusive_ptr<Decoder>& decoder,
    const Tensor& x,
    at::TensorList cosines,
    at::TensorList sines,
    at::TensorList keys,
    at::TensorList values,
    int64_t position,
    const OptionalTensor& mask) {
  const Step step{cosines, sines, position, mask};
  check_lists(*decoder, step, keys, values, x);
  const at::AutoDispatchBelowADInplaceOrView no_gradients;
  const auto& layers = decoder->layers;
  const auto& first = layers.front()->attention_norm;
  Stream stream{x, first.has_value() ? ops::rms_norm(x, first, layers.front()->epsilon) : x};
  for (size_t i = 0; i < layers.size(); ++i) {
    const DecoderLayer& layer = *layers[i];
    const auto add = [&](const Tensor& y, const OptionalTensor& norm_out, const OptionalTensor& norm, double epsilon) {
      stream = added(stream, y, norm_out, norm, layer.residual_scale, epsilon);
    };
    add(attention(layer, stream.normal, keys[i], values[i], step), layer.attention_norm_out, layer.mlp_norm,
        layer.epsilon);
    const Tensor y = gated(layer, stream.normal);
    const bool is_last = i + 1 == layers.size();
    add(y, layer.mlp_norm_out, is_last ? decoder->norm : layers[i + 1]->attention_norm,
        is_last ? decoder->epsilon : layers[i + 1]->epsilon);
  }
  return stream.normal;
}

// What a layer is made of, by name.
c10::intrusive_ptr<DecoderLayer> make_layer(
    Projections attention_in,
    Projections attention_out,
    Projections mlp_in,
    Projections mlp_out,
    const c10::Dict<std::string, Tensor>& norms,
    const OptionalTensor& sinks,
    double epsilon,
    double scale,
    std::optional<int64_t> window,
    int64_t rotation,
    double residual_scale,
    std::string activation) {
  auto layer = c10::make_intrusive<DecoderLayer>();
  layer->attention_in = std::move(attention_in);
  layer->attention_out = std::move(attention_out);
  layer->mlp_in = std::move(mlp_in);
  layer->mlp_out = std::move(mlp_out);
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
  library.class_<DecoderLayer>("DecoderLayer").def(torch::init(make_layer));
  library.class_<Decoder>("Decoder").def(torch::init(make_decoder));
  const std::string name = QUANTIZATION_MLX_STRING_EXPAND(QUANTIZATION_MLX_NAMESPACE);
  library.def((std::string(op) + "(__torch__.torch.classes." + name +
               ".Decoder decoder, Tensor x, Tensor[] cosines, Tensor[] sines, Tensor(a!)[] keys, Tensor(b!)[] values, "
               "int position, Tensor? mask=None) -> Tensor")
                  .c_str());
}

void implement_decoder(torch::Library& library) { library.impl(op, decoder_step); }

}  // namespace quantization_mlx
