"""The shapes that are timed: what the suites and the tables of their results have in common."""

# Of the timing tables: n and k, rows of x, rows of tiled products, rows where w is not transposed.
SHAPES = ((4096, 4096), (8192, 8192), (4096, 14336), (14336, 4096))  # n, k
ROWS = (1, 2, 4, 8, 16, 32, 64, 512)
# One row where K is short or odd, as of experts and of small models' heads; n: enough to fill the GPU.
SMALL_N, SMALL_KS = 32768, (512, 768, 1024, 2880, 3072)
SMALL_PAIRS = 64
LARGE = {"n": 8192, "k": 8192}
GATED = {"op": "quantized_gated_matmul", "activation": "silu", "n": 4096, "k": 8192}  # of as many rows of w
GATED_ROWS = (1, 2, 4, 8)
EXPERT = {"op": "gather_qmm", "n": 1024, "k": 2048}
TILE_ROWS = (64, 512)
SWEEP = range(1, 65)
PLAIN_ROWS = (1, 2, 3, 4, 8, 16, 64, 512)
# Of what stands between products: keys of one query, rows of norms, and the cores of the GPU that a decoder layer is
# planned for, as it comes (0) and as many as an H200 has multiprocessors.
CONTEXTS = (512, 4096, 32768)
NORM_ROWS, NORM_LENGTH = (1, 64, 4096), 2560
LAYER_CORES = (0, 132)
# Mixtures of experts: Qwen3-30B-A3B's. Sampling: rows of Qwen3's vocabulary, by what is kept of it; logits are normal,
# so that a temperature of 0.25 leaves few hundreds of tokens with most of the weight.
EXPERTS, MIXTURE_TOKENS = {"experts": 128, "k": 8, "length": 2048}, (1, 64, 4096)
VOCABULARY, SAMPLED_ROWS = 151936, (1, 64)
SAMPLING = {
    "all": {"temperature": 0.25},
    "top_k 50": {"temperature": 0.25, "top_k": 50},
    "top_p 0.9": {"temperature": 0.25, "top_p": 0.9},
}
