"""Shapes, lengths and useful work of a benchmark step; shared by both halves, and free of imports that take time or memory."""

import json
import pathlib

T5_1_1 = {  # num_layers counts for the encoder and for the decoder
    "small": {"d_model": 512, "d_kv": 64, "num_heads": 6, "d_ff": 1024, "num_layers": 8},
    "base": {"d_model": 768, "d_kv": 64, "num_heads": 12, "d_ff": 2048, "num_layers": 12},
    "large": {"d_model": 1024, "d_kv": 64, "num_heads": 16, "d_ff": 2816, "num_layers": 24},
    "xl": {"d_model": 2048, "d_kv": 64, "num_heads": 32, "d_ff": 5120, "num_layers": 24},
    "xxl": {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24},
}
COMMON = {
    "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "vocab_size": 32128, "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True, "tie_word_embeddings": False, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6, "dropout_rate": 0.0,
}  # fmt: skip


def shape_config(shape: str) -> dict:
    """The config.json of a preset, or of a model directory."""
    if shape in T5_1_1:
        preset = T5_1_1[shape]
        return COMMON | preset | {"num_decoder_layers": preset["num_layers"]}
    return json.loads((pathlib.Path(shape) / "config.json").read_text())


def parse_lengths(text: str) -> list[int]:
    """`96,82,131` or `8x128`: the input length of each example."""
    if "x" in text:
        count, length = text.split("x")
        return [int(length)] * int(count)
    return [int(part) for part in text.split(",")]


def useful_tflop(config: dict, lengths: list[int], prompt_length: int, target_length: int) -> float:
    """4 x (weights that a token passes) x tokens: forward, and backward to the input. No padding, no recomputing, no attention scores.

    A token of the encoder passes its layers and, once encoded, the keys and values of every decoder layer's cross-attention.
    """
    d_model, inner = config["d_model"], config["d_kv"] * config["num_heads"]
    gated = config["feed_forward_proj"].startswith("gated")
    feed_forward = d_model * config["d_ff"] * (3 if gated else 2)
    projection = d_model * inner
    depth, decoder_depth = config["num_layers"], config.get("num_decoder_layers") or config["num_layers"]
    per_encoder_token = depth * (4 * projection + feed_forward) + decoder_depth * 2 * projection
    per_decoder_token = decoder_depth * (6 * projection + feed_forward) + d_model * config["vocab_size"]
    encoder_tokens = sum(lengths) + prompt_length * len(lengths)
    return 4e-12 * (per_encoder_token * encoder_tokens + per_decoder_token * target_length * len(lengths))
