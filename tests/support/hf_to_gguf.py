"""A transformers Llama, Qwen2 or Gemma 3 as a GGUF file of F32 weights without a vocabulary: logits from token ids only."""

import gguf
import numpy as np

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA3 = {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
GLOBAL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def pair_neighbours(weight, n_head):
    """Rows of q or k reordered from transformers' rotary pairs (i, i + d/2) to the pairs (2i, 2i + 1) of NORM rope."""
    d = weight.shape[0] // n_head
    return weight.reshape(n_head, 2, d // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def hf_to_gguf(model, path):
    """Writes the model to path; llama models get NORM rope, the others NEOX, as llama.cpp expects. Returns path."""
    config = model.config
    arch = config.model_type.replace("_text", "")
    gemma3 = arch == "gemma3"
    head_size = config.head_dim if gemma3 else config.hidden_size // config.num_attention_heads
    parts = {**LAYER, **GEMMA3} if gemma3 else LAYER
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(1e6 if gemma3 else 1e4)
    if gemma3:
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
        writer.add_sliding_window(config.sliding_window)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in model.state_dict().items():
        name, _, kind = name.rpartition(".")
        weight = tensor.float().numpy()
        if gemma3 and name.endswith("norm"):
            weight = weight + 1
        if name in GLOBAL:
            target = GLOBAL[name]
        else:
            _, _, layer, part = name.split(".", 3)
            target = f"blk.{layer}.{parts[part]}"
            if arch == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                n_head = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
                weight = pair_neighbours(weight, n_head)
        writer.add_tensor(f"{target}.{kind}", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
