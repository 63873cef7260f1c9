// A transformer decoder as data, and one op for new tokens through all of its layers.
#pragma once

#include <torch/custom_class.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "namespace.h"
#include "ops.h"

// Torch knows a class by its C++ name, which has to be another one for each build that a process loads.
namespace quantization_mlx::classes {
inline namespace QUANTIZATION_MLX_NAMESPACE {

// x @ w.T + bias, for packed rows of w or, without scales, for rows of x's dtype.
struct Projection : torch::CustomClassHolder {
  Projection(
      at::Tensor weight,
      std::optional<at::Tensor> scales,
      std::optional<at::Tensor> biases,
      std::optional<at::Tensor> bias,
      int64_t group_size,
      int64_t bits,
      std::string mode)
      : weight(std::move(weight)),
        scales(std::move(scales)),
        biases(std::move(biases)),
        bias(std::move(bias)),
        group_size(group_size),
        bits(bits),
        mode(std::move(mode)) {}

  at::Tensor weight;
  std::optional<at::Tensor> scales;
  std::optional<at::Tensor> biases;
  std::optional<at::Tensor> bias;
  int64_t group_size;
  int64_t bits;
  std::string mode;
};

// Projections of one input, whose outputs lie side by side.
using Projections = std::vector<c10::intrusive_ptr<Projection>>;

// What a layer has in the place of queries, keys and values of its own: keys and values of all heads are made of one
// latent vector of a position and a part that is turned, which is what the cache holds.
struct LatentAttention : torch::CustomClassHolder {
  Projections in;  // queries or what they are made of, the latent vector, and the part that is turned
  Projections queries;  // of what is normalised; empty where `in` has them
  std::optional<at::Tensor> query_norm;
  at::Tensor latent_norm;
  double epsilon = 1e-6;  // of these norms
  c10::intrusive_ptr<Projection> heads;  // of each head, rows that make its keys, then those that make its values
  int64_t head_count = 1;
  int64_t key_dim = 0;  // of a head, without the part that is turned
  bool interleaved = false;  // neighbours are turned together
};

// What a layer has in the place of the MLP: a gated one for each expert, of which a router chooses k for a token.
struct Mixture : torch::CustomClassHolder {
  c10::intrusive_ptr<Projection> router;
  Projections in;  // gates and values of all experts
  c10::intrusive_ptr<Projection> out;
  bool in_turns = false;  // a row of gates, one of values
  Projections shared_in;  // of the gated MLP that every token passes; empty where there is none
  Projections shared_out;
  // Of moe_router.
  int64_t k = 1;
  std::string scoring;
  std::optional<at::Tensor> correction;
  int64_t groups = 1;
  int64_t groups_used = 1;
  bool normalise = false;
  double scale = 1.0;
  // Of swiglu.
  double alpha = 1.0;
  std::optional<double> limit;
  double offset = 0.0;
};

// y = norm_out(attention(norm(x))) * residual_scale + x, then the same with the gated MLP or the mixture of experts.
// Norms that are not given are left out.
struct DecoderLayer : torch::CustomClassHolder {
  Projections attention_in;  // queries, keys and values
  c10::intrusive_ptr<LatentAttention> latent;  // null where these are there
  Projections attention_out;
  Projections mlp_in;  // gates and values
  Projections mlp_out;
  c10::intrusive_ptr<Mixture> mixture;  // null where there is an MLP
  std::optional<at::Tensor> attention_norm;
  std::optional<at::Tensor> attention_norm_out;
  std::optional<at::Tensor> mlp_norm;
  std::optional<at::Tensor> mlp_norm_out;
  std::optional<at::Tensor> query_norm;  // of each head, or of all heads together
  std::optional<at::Tensor> key_norm;
  std::optional<at::Tensor> sinks;
  double epsilon = 1e-6;
  double scale = 1.0;  // of scores
  std::optional<int64_t> window;
  std::optional<double> softcap;  // of scores
  int64_t rotation = 0;  // which of the step's cosines and sines turn its heads; below 0: none
  double residual_scale = 1.0;
  std::string activation = "silu";
};

struct Decoder : torch::CustomClassHolder {
  std::vector<c10::intrusive_ptr<DecoderLayer>> layers;
  std::optional<at::Tensor> norm;  // behind the last layer
  double epsilon = 1e-6;
};

}  // namespace QUANTIZATION_MLX_NAMESPACE
}  // namespace quantization_mlx::classes

namespace quantization_mlx {

// Registers these classes and the op decoder_step.
void define_decoder(torch::Library& library);
void implement_decoder(torch::Library& library);

}  // namespace quantization_mlx
