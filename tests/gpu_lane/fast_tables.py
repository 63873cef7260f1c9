"""Times of fast ops and decoder layers as tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fast_calls import AnyCall, FastCall, LayerCall, from_dict
from shapes import SAMPLING
from tables import NOTHING, table

BUILDS = ("generic", "known")


def _micros(taken: float | None) -> str:
    return NOTHING if taken is None else f"{taken * 1e6:.1f}"


class FastTimes:
    """Of the suite `time`: seconds by call and build, NaN where a result was wrong."""

    def __init__(self, results: dict[str, Any]) -> None:
        self._copy = results["copy"]
        self._times = {(from_dict(t["call"]), t["build"]): t for t in results["fast_times"]}
        self._calls = list(dict.fromkeys(call for call, _ in self._times))
        self._peers = {from_dict(peer["call"]): peer["seconds"] for peer in results["fast_peers"]}

    def tables(self) -> list[str]:
        return [self._attention(), self._norms(), self._mixtures(), self._sampling(), self._layers()]

    def _of_op(self, *ops: str) -> list[FastCall]:
        return [call for call in self._calls if call.op in ops]

    def _ours(self, call: AnyCall) -> list[str]:
        cells = []
        for build in BUILDS:
            found = self._times.get((call, build))
            taken = found and found["seconds"]
            share = f"{100 * call.moved_bytes / taken / self._copy:.0f}%" if taken else NOTHING
            cells += [_micros(taken), share]
        return cells

    def _kernels(self, call: AnyCall) -> list[dict[str, Any]]:
        found = self._times.get((call, "generic"))
        names = ("kernels", "registers")
        return [dict(zip(names, each, strict=True)) for each in zip(*map(found.get, names), strict=True)]

    def _attention(self) -> str:
        rows = []
        for call in self._of_op("scaled_dot_product_attention"):
            registers = self._kernels(call)[0]["registers"]
            peer = _micros(self._peers[call])
            rows.append((call.layouts["keys"].shape[2], len(self._kernels(call)), registers, *self._ours(call), peer))
        header = ("keys", "launches", "registers", *_OURS, "torch's SDPA, us")
        title = "One query of 32 heads, 8 heads of keys and values, head size 128, float16"
        return table(title, header, rows, "Of copy: keys and values are read at that share of the copy bandwidth.")

    def _norms(self) -> str:
        rows = [
            (call.op, call.layouts["x"].shape[0], *self._ours(call), _micros(self._peers[call]))
            for call in self._of_op("rms_norm", "add_rms_norm")
        ]
        note = "Of copy: all tensors, each counted once. torch's add_rms_norm is a sum and a norm."
        return table("Norms, rows of 2560, float16", ("op", "rows", *_OURS, "torch's, us"), rows, note)

    def _mixtures(self) -> str:
        rows = [
            (call.op, call.layouts["x"].shape[0], *self._ours(call), _micros(self._peers[call]))
            for call in self._of_op("moe_router", "moe_combine")
        ]
        title = "Mixtures, 128 experts, 8 of a token, rows of 2048, float16"
        note = "Of copy: all tensors, each counted once. torch's: softmax, topk and a division; a product of matrices."
        return table(title, ("op", "tokens", *_OURS, "torch's, us"), rows, note)

    def _sampling(self) -> str:
        kept = {tuple(rules.items()): name for name, rules in SAMPLING.items()}
        rows = []
        for call in self._of_op("sample"):
            name = next(name for rules, name in reversed(kept.items()) if call.options[: len(rules)] == rules)
            rows.append((name, call.layouts["x"].shape[0], *self._ours(call), _micros(self._peers[call])))
        note = "Of copy: logits, counted once. torch's: softmax and multinomial, behind topk, or sort, sum and scatter."
        title = "Sampling, 151936 tokens, temperature 0.25, float16"
        return table(title, ("kept", "rows", *_OURS, "torch's, us"), rows, note)

    def _layers(self) -> str:
        calls: Sequence[LayerCall] = [call for call in self._calls if isinstance(call, LayerCall)]
        rows = []
        for call in calls:
            peer, found = self._peers[call], self._times.get((call, "generic"))
            faster = f"{peer / found['seconds']:.2f}" if found and peer else NOTHING
            cores = call.cores or "usual"
            rows.append((call.context, cores, len(self._kernels(call)), *self._ours(call), _micros(peer), faster))
        header = ("context", "planned cores", "launches", *_OURS, "dense in torch, us", "times as fast")
        note = (
            "Of copy: packed weights, keys and values. Dense: bfloat16, torch's ops one by one, in one graph as ours."
        )
        title = "A decoder layer of Qwen3-4B, one token, affine, 4 bits, group_size 64, bfloat16"
        return table(title, header, rows, note)


_OURS = ("generic, us", "of copy", "known, us", "of copy")
