"""Save a tiny random text encoder in transformers' own format: python tools/tiny_encoder.py data/tiny_clip.

Its weights are random, yet different words have different embeddings, which is enough to learn the digits' names by.
Tests and `experiment=digits_text` load it as they would load a published one.
"""

import argparse
import string
from pathlib import Path

WIDTH = 64


def main() -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=["clip", "t5"], default="clip")
    options = parser.parse_args()
    {"clip": clip, "t5": t5}[options.kind](options.folder)
    print(options.folder)


def clip(folder: Path) -> None:
    """A CLIP text model that spells, with its tokenizer."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    first, last = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        bos_token_id=first,
        eos_token_id=last,
        pad_token_id=last,
        initializer_factor=10.0,  # of random weights; 1 leaves words nearly alike
    )
    CLIPTextModel(config).save_pretrained(folder)


def t5(folder: Path) -> None:
    """A T5 encoder that spells, with its tokenizer."""
    import torch
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokens = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    T5Tokenizer(vocab=[(token, 0.0) for token in tokens], extra_ids=0).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokens),
        d_model=WIDTH,
        d_kv=16,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        is_encoder_decoder=False,
    )
    T5EncoderModel(config).save_pretrained(folder)


if __name__ == "__main__":
    main()
