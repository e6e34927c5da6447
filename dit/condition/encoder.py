"""Frozen text encoders of transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Encoded(NamedTuple):
    """What an encoder makes of captions."""

    text: Tensor  # (B, L, W), the last hidden state
    mask: Tensor  # (B, L), which tokens are there
    pooled: Tensor  # (B, W): CLIP's own, else the mean over the tokens that are there


class TextEncoder:
    """A CLIP or T5 encoder, frozen, padded to a fixed length.

    Args:
        name: a hub name, or a folder that `save_pretrained` wrote.
        width: of its embeddings, W, checked against it.
        max_length: tokens L; longer captions are cut.

    Raises:
        ImportError: if transformers is missing.
        ValueError: if the weights or the tokenizer are not there, are another kind of model's, or of another width.
    """

    def __init__(self, name: str, width: int, max_length: int):
        config = read_config(name)
        found = getattr(config, "hidden_size", None) or getattr(config, "d_model", None)
        if found != width:
            raise ValueError(f"condition.width={width}, but the embeddings of {name} have {found}")
        kind, most = config.model_type, getattr(config, "max_position_embeddings", None)
        if most is not None and max_length > most:
            raise ValueError(f"condition.max_length={max_length}, but {name} reads at most {most} tokens")
        import transformers

        model = {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}.get(kind)
        if model is None:
            raise ValueError(f"condition.name={name} is a {kind} model: give a CLIP or T5 one")
        transformers.utils.logging.disable_progress_bar()
        self.tokenizer: Any = _from_pretrained(transformers.AutoTokenizer, name)
        self.model: Any = _from_pretrained(getattr(transformers, model), name).requires_grad_(False).eval()
        self.name = name
        self.width = width
        self.max_length = max_length
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token is None or self.tokenizer("a").input_ids == self.tokenizer("b").input_ids:
            raise ValueError(f"condition.name={name}: its tokenizer lacks its vocabulary or padding: save it anew")

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], device: torch.device | str = "cpu") -> Encoded:
        """What the encoder makes of captions, in float32."""
        options = {"padding": "max_length", "max_length": self.max_length, "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(list(captions), **options).to(device)
        with torch.autocast(torch.device(device).type, enabled=False):  # of the network, whose training it sits in
            output = self.model.to(device)(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        text, mask = output.last_hidden_state.float(), tokens.attention_mask.bool()
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            pooled = (text * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return Encoded(text, mask, pooled.float())


def read_config(name: str) -> Any:
    """The configuration of a text encoder, without its weights.

    Raises:
        ImportError: if transformers is missing.
        ValueError: if it is not there.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ImportError("condition=text needs transformers: pip install 'ditforge[text]'") from error
    config = _from_pretrained(AutoConfig, name)
    return getattr(config, "text_config", config)


def _from_pretrained(cls: Any, name: str) -> Any:
    try:
        if not Path(name).exists() and (name.startswith((".", "/")) or (Path(name).parent.exists() and "/" in name)):
            raise OSError("there is no such folder")  # and no need to ask the hub
        return cls.from_pretrained(name)
    except Exception as error:  # transformers, tokenizers and safetensors raise many kinds
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"condition.name={name} is neither a folder with a text encoder and its tokenizer nor to be had from the "
            f"hub (offline, or a wrong name): {reason}"
        ) from error
