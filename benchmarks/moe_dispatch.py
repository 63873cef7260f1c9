"""What `marlin.dispatch_moe_optimized` takes on the CPU beside `gather_qmm` alone, with the same tokens and experts.

    python benchmarks/moe_dispatch.py                    # with all threads
    python benchmarks/moe_dispatch.py --threads 1

Both take turns, call by call, and every call has other tokens and so other experts than the one before. The table shows
the medians of both and of the ratios of calls that follow each other.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from quantization_mlx import gather_qmm
from quantization_mlx.fast import moe_router
from quantization_mlx.marlin import dispatch_moe_optimized, get_default_library

GROUP_SIZE = 128
INPUTS = 40
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def seconds(call: Callable[[int], object], turn: int) -> float:
    start = time.perf_counter()
    call(turn)
    return time.perf_counter() - start


def compare(sizes: tuple[int, ...], tokens: int, dtype: torch.dtype, calls: int) -> tuple[float, float, float]:
    """The median seconds of the product, those of the whole, and the median ratio."""
    K, N, experts, top_k = sizes
    lib = get_default_library()
    words = torch.randint(-(2**31), 2**31 - 1, (experts, K // 8, N), dtype=torch.int32)
    scales = (torch.rand(experts, K // GROUP_SIZE, N) * 0.01).half()
    router = (torch.randn(K, experts) * 0.05).to(dtype)
    inputs = torch.randn(INPUTS, tokens, K).to(dtype)
    chosen = [moe_router(x.float() @ router.float(), top_k, scoring="softmax_of_selected")[0] for x in inputs]

    def product(turn: int) -> torch.Tensor:
        x, indices = inputs[turn % len(inputs), :, None, None], chosen[turn % len(inputs)]
        options = {"transpose": False, "group_size": GROUP_SIZE, "bits": 4, "mode": "marlin_fp4"}
        return gather_qmm(x, words, scales, rhs_indices=indices, **options)

    def whole(turn: int) -> torch.Tensor:
        weights = router, words, scales, None, None
        return dispatch_moe_optimized(lib, inputs[turn % len(inputs)], *weights, tokens, *sizes, GROUP_SIZE)

    # Tokens of neither are those of the call before.
    times = [(seconds(product, turn + len(inputs) // 2), seconds(whole, turn)) for turn in range(calls)]
    alone, together = zip(*times[calls // 10 :], strict=True)
    ratios = [after / before for before, after in zip(alone, together, strict=True)]
    return statistics.median(alone), statistics.median(together), statistics.median(ratios)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64])
    names = ("K", "N", "EXPERTS", "TOP_K")
    parser.add_argument("--sizes", type=int, nargs=4, default=[2048, 1024, 64, 4], metavar=names)
    parser.add_argument("--calls", type=int, default=400, help="of one token; of more, fewer")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    K, N, experts, top_k = sizes = tuple(arguments.sizes)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{top_k} of {experts} experts {K} x {N}, groups of {GROUP_SIZE}\n")
    print("| tokens | x | gather_qmm | dispatch_moe_optimized | ratio |\n|---|---|---|---|---|")
    for tokens in arguments.tokens:
        for dtype in DTYPES:
            calls = max(20, arguments.calls // tokens)
            alone, together, ratio = compare(sizes, tokens, dtype, calls)
            name = str(dtype).removeprefix("torch.")
            print(f"| {tokens} | {name} | {alone * 1e3:.3f} ms | {together * 1e3:.3f} ms | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
