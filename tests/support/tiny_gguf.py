"""Tiny random models as GGUF files that llama.cpp loads and runs, written in milliseconds.

The vocabulary is one token per byte, so a text of n characters has about n + 2 tokens.
"""

from dataclasses import dataclass

import gguf
import numpy as np

N_VOCAB = 3 + 256


@dataclass(frozen=True)
class Shape:
    """Sizes of a tiny model; every layer has the same. qwen2 needs n_embd == n_head * head_size."""

    n_layer: int = 4
    n_head: int = 4
    n_head_kv: int = 2
    head_size: int = 32
    n_embd: int = 128
    n_ff: int = 64
    n_ctx: int = 8192


# llama: NORM rope. qwen2: NEOX rope, biases on q, k and v. smollm3: NORM, every fourth layer without rope.
# gemma3: NEOX, five layers of six with a sliding window of `WINDOW` tokens. stablelm: NEOX on the first half of a head.
# lfm2: NEOX, hybrid: every layer with an even number is a short convolution; needs n_embd == n_head * head_size.
ARCHS = ("llama", "qwen2", "smollm3", "gemma3", "stablelm", "lfm2")
WINDOW = 128
L_CACHE = 3  # taps of a short convolution


def n_rot(arch, shape):
    """How many dims of a head are rotated."""
    return shape.head_size // 2 if arch == "stablelm" else shape.head_size


def n_head_kv(arch, shape):
    """KV heads of each layer."""
    return [0 if arch == "lfm2" and il % 2 == 0 else shape.n_head_kv for il in range(shape.n_layer)]


def write_tiny_gguf(path, arch="llama", shape=None, seed=0, sharpness=4.0, extra=None):
    """Writes a model with random F32 weights to path and returns it.

    sharpness: scale of the q and k weights; the larger, the fewer tokens attention looks at
    extra: {key: value} of further u32, str or list-of-i32 keys
    """
    shape = shape or Shape()
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), arch)
    _add_keys(writer, arch, shape)
    _add_vocabulary(writer)
    for key, value in (extra or {}).items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, np.array(value, np.int32).tolist())
        else:
            writer.add_uint32(key, value)
    for name, value in _tensors(arch, shape, rng, sharpness):
        writer.add_tensor(name, value.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_keys(writer, arch, shape):
    writer.add_name("tiny")
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(n_head_kv(arch, shape) if arch == "lfm2" else shape.n_head_kv)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(n_rot(arch, shape))
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if arch == "gemma3":
        writer.add_sliding_window(WINDOW)
    if arch == "lfm2":
        writer.add_shortconv_l_cache(L_CACHE)
        writer.add_vocab_size(N_VOCAB)


def _add_vocabulary(writer):
    unknown, control, byte = 2, 3, 6
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([unknown, control, control] + [byte] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _tensors(arch, s, rng, sharpness):
    """(name, array) of all tensors; a weight of ggml shape [n_in, n_out] is an array [n_out, n_in]."""

    def weight(n_out, n_in, scale=1.0):
        return rng.standard_normal((n_out, n_in)) * (scale / np.sqrt(n_in))

    def norm(n):
        return 1 + 0.1 * rng.standard_normal(n)

    n_q, n_kv = s.n_head * s.head_size, s.n_head_kv * s.head_size
    yield "token_embd.weight", rng.standard_normal((N_VOCAB, s.n_embd))
    yield "token_embd_norm.weight" if arch == "lfm2" else "output_norm.weight", norm(s.n_embd)
    if arch == "stablelm":
        yield "output_norm.bias", 0.1 * rng.standard_normal(s.n_embd)
    yield "output.weight", weight(N_VOCAB, s.n_embd)
    for il in range(s.n_layer):
        block = f"blk.{il}."
        yield block + "attn_norm.weight", norm(s.n_embd)
        if n_head_kv(arch, s)[il]:
            yield block + "attn_q.weight", weight(n_q, s.n_embd, np.sqrt(sharpness))
            yield block + "attn_k.weight", weight(n_kv, s.n_embd, np.sqrt(sharpness))
            yield block + "attn_v.weight", weight(n_kv, s.n_embd)
            yield block + "attn_output.weight", weight(s.n_embd, n_q)
        else:
            yield block + "shortconv.conv.weight", weight(s.n_embd, L_CACHE)
            yield block + "shortconv.in_proj.weight", weight(3 * s.n_embd, s.n_embd)
            yield block + "shortconv.out_proj.weight", weight(s.n_embd, s.n_embd)
        if arch == "lfm2" and n_head_kv(arch, s)[il]:
            yield block + "attn_q_norm.weight", norm(s.head_size)
            yield block + "attn_k_norm.weight", norm(s.head_size)
        if arch == "stablelm":
            yield block + "attn_norm.bias", 0.1 * rng.standard_normal(s.n_embd)
            yield block + "ffn_norm.bias", 0.1 * rng.standard_normal(s.n_embd)
        if arch == "qwen2":
            yield block + "attn_q.bias", rng.standard_normal(n_q)
            yield block + "attn_k.bias", rng.standard_normal(n_kv)
            yield block + "attn_v.bias", rng.standard_normal(n_kv)
        if arch == "gemma3":
            yield block + "attn_q_norm.weight", norm(s.head_size)
            yield block + "attn_k_norm.weight", norm(s.head_size)
            yield block + "post_attention_norm.weight", norm(s.n_embd)
            yield block + "post_ffw_norm.weight", norm(s.n_embd)
        yield block + "ffn_norm.weight", norm(s.n_embd)
        yield block + "ffn_gate.weight", weight(s.n_ff, s.n_embd)
        yield block + "ffn_up.weight", weight(s.n_ff, s.n_embd)
        yield block + "ffn_down.weight", weight(s.n_embd, s.n_ff)
