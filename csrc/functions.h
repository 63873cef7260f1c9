// Functions of real numbers that the ops between products need, as what C++ and Metal shaders have in common: tables of
// coefficients, highest power first, fitted to the least largest error; either side has its own arithmetic for them.
#pragma once

#ifdef __METAL_VERSION__
#include <metal_stdlib>
#define QUANTIZATION_MLX_CONSTANT static constant constexpr const
#else
#include <cstdint>
#define QUANTIZATION_MLX_CONSTANT inline constexpr
#endif

namespace quantization_mlx {

// --- Sine and cosine of up to an eighth of a turn -------------------------------------------------------------------
// Angles of positions are counted in turns, as 64 bits behind the binary point: whole turns drop out of a product with
// an integer, which leaves it exact however large the position is. The upper 32 bits are turned into a quadrant and a
// rest of at most an eighth of a turn, and with x the rest in radians and s = x^2,
//   sin x = x + x * s * sine(s),  cos x = 1 - s / 2 + s^2 * cosine(s)
// within 4e-9, less than the arithmetic's own rounding.

QUANTIZATION_MLX_CONSTANT float radians_of_fraction = 1.4629180792671596e-9f;  // 2 pi / 2^32
QUANTIZATION_MLX_CONSTANT float sine_coefficients[] = {-1.95172336e-4f, 8.33217768e-3f, -1.66666549e-1f};
QUANTIZATION_MLX_CONSTANT float cosine_coefficients[] = {2.44383776e-5f, -1.38873669e-3f, 4.16666469e-2f};

// --- Hyperbolic tangent ---------------------------------------------------------------------------------------------

// For |x| <= tanh_small, with s = x^2, tanh x = x + x * s * tanh_odd(s) within 4e-9 of itself; beyond,
// 1 - 2 / (exp(2 * |x|) + 1) with the sign of x loses no digits.
QUANTIZATION_MLX_CONSTANT float tanh_small = 0.625f;
QUANTIZATION_MLX_CONSTANT float tanh_odd[] = {
    -5.717035848647356e-3f, 2.0650578662753105e-2f, -5.374349653720856e-2f, 1.3331490755081177e-1f,
    -3.333328366279602e-1f};

// --- Gates ----------------------------------------------------------------------------------------------------------

// What becomes of a gate x:
//   swiglu      x * sigmoid(alpha * x)
//   geglu       x * P(x), where P is the standard normal distribution
//   geglu_tanh  its approximation x * (1 + tanh(u)) / 2 = x * sigmoid(2 * u), u = sqrt(2 / pi) * (x + 0.044715 * x^3)
enum class Gate : uint8_t { swiglu, geglu, geglu_tanh };

// geglu_tanh's 2 * u = x * (first + third * x^2).
QUANTIZATION_MLX_CONSTANT float tanh_first = 1.5957691216057308f;
QUANTIZATION_MLX_CONSTANT float tanh_third = 0.07135481282052037f;

// P(-z) = exp(-z^2 / 2) * t * tail(t), t = 1 / (1 + tail_rate * z), for z >= 0, within 4e-8 of itself.
QUANTIZATION_MLX_CONSTANT float tail_rate = 0.35f;
QUANTIZATION_MLX_CONSTANT float tail_coefficients[] = {-2.91494476e-2f, 1.43988209e-1f,  -2.55746928e-1f,
                                                       1.59209593e-1f,  -2.31327408e-2f, 1.05516988e-1f,
                                                       1.19830793e-1f,  1.39862126e-1f,  1.39621391e-1f};

}  // namespace quantization_mlx
