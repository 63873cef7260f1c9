"""Text from models with Marlin's layers: a model, its tokenizer and Transformers' `generate`."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..checkpoint.read import has_tokenizer
from ..hf import compat
from ..optional import PreTrainedModel, PreTrainedTokenizerBase
from .layers import mode_of_bits, mode_of_quant_type
from .models import LayerFilter, load_dense, quantize_model, replace_linear_layers
from .sampler import usable_options
from .saved import is_saved, load_quantized, usable_device


class TransformersMarlinPipeline:
    """A causal language model with its tokenizer, which turns text into text.

    Args:
        model: a Transformers model, quantized or not; it is moved to the device and put into eval mode.
        tokenizer: its tokenizer, which is never changed.
        device: "mps" or "cpu"; None is the GPU of a Mac, and the CPU where there is none.

    Raises:
        ValueError: the device is not here.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device | str | None = "mps"
    ) -> None:
        self.device = usable_device(device, type(self).__name__)
        self.model = model.to(self.device).eval()
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | os.PathLike[str],
        *,
        quantize: bool = True,
        bits: int = 4,
        group_size: int = 128,
        device: torch.device | str | None = "mps",
        skip_layers: Iterable[str] | None = None,
        layer_filter: LayerFilter | None = None,
        trust_remote_code: bool = False,
        **model_options: Any,
    ) -> TransformersMarlinPipeline:
        """Loads a model and its tokenizer, and replaces the model's linear layers before it reaches the device.

        Args:
            model_id: on the Hugging Face Hub, or a directory; one that `save_quantized` wrote is loaded as it is, with
                the layers that it has.
            quantize: whether layers are replaced.
            bits, group_size, skip_layers, layer_filter: as in `replace_linear_layers`.
            device: as in the constructor.
            trust_remote_code: whether Python code that comes with the model may run.
            model_options: for `AutoModelForCausalLM.from_pretrained`.

        Raises:
            ImportError: transformers or safetensors is not installed.
            TypeError: model_options are given for a saved model.
            ValueError: an option or the device is not supported, or the model is of another quantized kind.
        """
        op = f"{cls.__name__}.from_pretrained"
        mode_of_bits(op, bits, group_size)  # raises before anything is loaded

        def replace(model: PreTrainedModel) -> PreTrainedModel:
            if quantize:
                replace_linear_layers(model, bits, group_size, skip_layers, layer_filter)
            return model

        return cls(*_load(op, model_id, device, trust_remote_code, model_options, replace))

    def __call__(
        self,
        prompt: str | Sequence[str],
        max_tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stream: bool = False,
        **options: Any,
    ) -> str | list[str] | Iterator[str]:
        """Continues a text, or each of a list of texts.

        Args:
            prompt: one text, or a list of them, which is generated as one batch.
            max_tokens: as many new tokens at most.
            temperature: 0 takes the likeliest token; any other samples, after a division of the logits by it.
            top_p: only the likeliest tokens of at least this total probability are sampled; 1 for all.
            top_k: only so many of the likeliest tokens are sampled; 0 for all.
            stream: whether the text comes in pieces, as it is generated.
            options: for `model.generate`.

        Returns:
            The prompt with its continuation, without special tokens; a list of these for a list; with stream, an
            iterator over pieces of it, which raises what generation raises.

        Raises:
            ValueError: a list with stream, a prompt without tokens, a value out of its range, or an option that asks
                for several texts or for more than text.
        """
        sampling = self._sampling(max_tokens, temperature, top_p, top_k, options)
        if not isinstance(prompt, str):
            if stream:
                raise ValueError(f"[{type(self).__name__}] stream takes one prompt, not a list of {len(prompt)}")
            return self._batch(list(prompt), sampling)
        inputs = self._encode([prompt])
        return self._stream(inputs, sampling, False) if stream else self._decode(inputs, sampling)[0]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stream: bool = False,
        **options: Any,
    ) -> str | Iterator[str]:
        """The reply to a conversation, in the words of the tokenizer's chat template.

        Args:
            messages: [{"role": …, "content": …}, …], the oldest first.
            max_tokens, temperature, top_p, top_k, stream, options: as in `__call__`.

        Returns:
            The reply alone, without special tokens; with stream, an iterator over its pieces.

        Raises:
            ValueError: the tokenizer has no chat template, or a value is out of its range.
        """
        sampling = self._sampling(max_tokens, temperature, top_p, top_k, options)
        encoded = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        inputs = {name: encoded[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return self._stream(inputs, sampling, True) if stream else self._decode(inputs, sampling, True)[0]

    def batch_generate(
        self,
        prompts: Sequence[str],
        max_tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        **options: Any,
    ) -> list[str]:
        """Continues each of several texts, all together, with padding on the left; see `__call__`.

        Raises:
            ValueError: a prompt has no tokens, or a value is out of its range.
        """
        return self._batch(list(prompts), self._sampling(max_tokens, temperature, top_p, top_k, options))

    def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """`model.generate` with input_ids [batch, tokens], which are moved to the device."""
        return self.model.generate(input_ids.to(self.device), **kwargs)

    # Tokens

    def _sampling(
        self, max_tokens: int, temperature: float, top_p: float, top_k: int, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The arguments of `model.generate`, options among them. Raises ValueError if a value is out of its range, or
        an option asks for other results than one text for a prompt."""
        for name, wanted in (("num_return_sequences", 1), ("return_dict_in_generate", False)):
            if options.get(name, wanted) != wanted:
                raise ValueError(
                    f"[{type(self).__name__}] {name} is {options[name]!r}; a pipeline returns one text for each "
                    "prompt, and its method generate what the model returns"
                )
        given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        filters = usable_options(type(self).__name__, **given)
        count = filters.pop("max_tokens")
        if temperature == 0:
            return {"max_new_tokens": count, "do_sample": False, **options}
        return {"max_new_tokens": count, "do_sample": True, **filters, **options}

    @property
    def _pad_token_id(self) -> int:
        """What fills rows up; where the tokenizer has nothing for that, the mask tells it from the token that it is."""
        found = (getattr(self.tokenizer, name) for name in ("pad_token_id", "eos_token_id"))
        return next((token for token in found if token is not None), 0)

    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask [prompts, tokens], padded on the left: the last token of a row is continued."""
        rows = [torch.tensor(row, dtype=torch.int64) for row in self.tokenizer(prompts)["input_ids"]]
        if empty := [prompt for prompt, row in zip(prompts, rows, strict=True) if row.numel() == 0]:
            raise ValueError(f"[{type(self).__name__}] the prompt {empty[0]!r} has no tokens")
        options = {"batch_first": True, "padding_side": "left"}
        masks = [torch.ones_like(row) for row in rows]
        encoded = {
            "input_ids": pad_sequence(rows, padding_value=self._pad_token_id, **options),
            "attention_mask": pad_sequence(masks, padding_value=0, **options),
        }
        return {name: tensor.to(self.device) for name, tensor in encoded.items()}

    def _batch(self, prompts: list[str], sampling: dict[str, Any]) -> list[str]:
        return self._decode(self._encode(prompts), sampling) if prompts else []

    def _decode(self, inputs: dict[str, torch.Tensor], sampling: dict[str, Any], reply_only: bool = False) -> list[str]:
        """The text of each generated row."""
        tokens = self.model.generate(**inputs, **{"pad_token_id": self._pad_token_id, **sampling})
        width = inputs["input_ids"].shape[1]
        begins = [width if reply_only else width - int(mask.sum()) for mask in inputs["attention_mask"]]
        rows = [row[begin:] for row, begin in zip(tokens, begins, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def _stream(self, inputs: dict[str, torch.Tensor], sampling: dict[str, Any], reply_only: bool) -> Iterator[str]:
        """Pieces of text while another thread generates them; the thread ends when the iterator is closed."""
        transformers = compat.require("transformers")
        streamer = transformers.TextIteratorStreamer(self.tokenizer, skip_prompt=reply_only, skip_special_tokens=True)
        closed = threading.Event()
        failures: list[BaseException] = []

        def is_closed(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full(input_ids.shape[:1], closed.is_set(), device=input_ids.device)

        criteria = transformers.StoppingCriteriaList([*sampling.pop("stopping_criteria", ()), is_closed])

        def generate() -> None:
            try:
                options = {"pad_token_id": self._pad_token_id, **sampling, "stopping_criteria": criteria}
                self.model.generate(**inputs, **options, streamer=streamer)
            except BaseException as error:  # raised again in the consumer's thread
                failures.append(error)
                streamer.text_queue.put(streamer.stop_signal)

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            closed.set()
            thread.join()
        if failures:
            raise failures[0]


class MarlinPipeline(TransformersMarlinPipeline):
    """Deprecated: `TransformersMarlinPipeline` by its former name and arguments.

    Args:
        model: a Transformers model, or a pipeline, whose model and device are taken as they are.
        tokenizer: may be left out with a pipeline.
        device: "mps" or "cpu"; None is the GPU of a Mac, and the CPU where there is none.

    Raises:
        ValueError: the tokenizer is missing, or the device is not here.
    """

    def __init__(
        self,
        model: PreTrainedModel | TransformersMarlinPipeline,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str | None = "mps",
    ) -> None:
        _deprecate()
        if isinstance(model, TransformersMarlinPipeline):
            tokenizer, device, model = tokenizer or model.tokenizer, model.device, model.model
        if tokenizer is None:
            raise ValueError("[MarlinPipeline] a model needs its tokenizer; only a pipeline comes with one")
        super().__init__(model, tokenizer, device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        quant_type: str = "fp4",
        device: torch.device | str | None = None,
        *,
        group_size: int = 128,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> MarlinPipeline:
        """Loads a model and its tokenizer, and replaces the model's linear layers by `quantize_model`.

        Args:
            path: on the Hugging Face Hub, or a directory; one that `save_quantized` wrote is loaded as it is.
            quant_type, group_size: as in `quantize_model`.
            device: as in the constructor.
            trust_remote_code: whether Python code that comes with the model may run.
            kwargs: `skip_layers` of `quantize_model`; others are for `AutoModelForCausalLM.from_pretrained`.

        Raises:
            ImportError, TypeError, ValueError: as in `TransformersMarlinPipeline.from_pretrained`.
        """
        _deprecate()
        op = "MarlinPipeline.from_pretrained"
        mode_of_quant_type(op, quant_type, group_size)  # raises before anything is loaded
        skip = {"skip_layers": kwargs.pop("skip_layers")} if "skip_layers" in kwargs else {}
        quantize = functools.partial(quantize_model, quant_type=quant_type, group_size=group_size, **skip)
        pipeline = cls.__new__(cls)  # __init__ would warn again
        TransformersMarlinPipeline.__init__(pipeline, *_load(op, path, device, trust_remote_code, kwargs, quantize))
        return pipeline


def _deprecate() -> None:
    """Warns the caller of the caller."""
    warnings.warn("MarlinPipeline is deprecated; use TransformersMarlinPipeline", DeprecationWarning, stacklevel=3)


def _load(
    op: str,
    source: str | os.PathLike[str],
    device: torch.device | str | None,
    trust_remote_code: bool,
    options: Mapping[str, Any],
    quantize: Callable[[PreTrainedModel], PreTrainedModel],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, torch.device]:
    """A model, as `save_quantized` wrote it or else after `quantize`, its tokenizer, and the device for both."""
    device, directory = usable_device(device, op), Path(source)
    if directory.is_dir() and not has_tokenizer(directory):
        raise ValueError(
            f"[{op}] {source} has no tokenizer; save one there by its save_pretrained, or give it to the constructor"
        )
    load_tokenizer = compat.require("transformers").AutoTokenizer.from_pretrained
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    if not directory.is_dir() or not is_saved(directory):
        return quantize(load_dense(source, op, trust_remote_code=trust_remote_code, **options)), tokenizer, device
    if options:
        raise TypeError(f"[{op}] {source} is loaded as it was saved, without the options {', '.join(options)}")
    return load_quantized(directory, device, trust_remote_code=trust_remote_code), tokenizer, device
