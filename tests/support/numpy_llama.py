"""The forward pass of a transformers Llama or Qwen2 in NumPy float64, whose attention can be the FASA oracle."""

import numpy as np

from oracle import fasa_oracle as oracle


def rms_norm(x, weight, eps):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def rope(x, positions, base):
    """Rotates [T, H, D] by positions; plane i is dims (i, i + D/2), as transformers pairs them."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class NumpyLlama:
    """Reads tokens in chunks and keeps K and V; with f16 its cache is rounded to f16 as llama.cpp's is.

    fcs: for each layer FC ids [G, n_tip]; layers with n_tip 0 stay dense. budget: one, or one for each layer. forward() gives
    logits and how clear-cut the selections of each row were (oracle.margin, the least over layers and KV heads).
    """

    def __init__(self, model, fcs=None, budget=0, n_sink=0, n_recent=0, f16=True, index_type="f16"):
        self.config = model.config
        self.w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
        self.fcs, self.budget, self.n_sink, self.n_recent = fcs, budget, n_sink, n_recent
        self.cache_type, self.index_type = np.float16 if f16 else np.float64, index_type
        self.d = self.config.hidden_size // self.config.num_attention_heads
        self.clear()

    def clear(self):
        empty = np.zeros((0, self.config.num_key_value_heads, self.d), self.cache_type)
        self.k = [empty] * self.config.num_hidden_layers
        self.v = [empty] * self.config.num_hidden_layers

    def keep(self, n):
        """Forgets all but the first n tokens."""
        self.k, self.v = [k[:n] for k in self.k], [v[:n] for v in self.v]

    def forward(self, tokens, sparse=False):
        eps = self.config.rms_norm_eps
        x = self.w["model.embed_tokens.weight"][tokens]
        margins = np.full(len(tokens), np.inf)
        for layer in range(self.config.num_hidden_layers):
            name = f"model.layers.{layer}."
            h = rms_norm(x, self.w[name + "input_layernorm.weight"], eps)
            out, margin = self._attention(layer, name + "self_attn.", h, sparse)
            margins = np.minimum(margins, margin)
            x = x + out @ self.w[name + "self_attn.o_proj.weight"].T
            h = rms_norm(x, self.w[name + "post_attention_layernorm.weight"], eps)
            gate = h @ self.w[name + "mlp.gate_proj.weight"].T
            up = h @ self.w[name + "mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self.w[name + "mlp.down_proj.weight"].T
        return rms_norm(x, self.w["model.norm.weight"], eps) @ self.w["lm_head.weight"].T, margins

    def _heads(self, name, h, n_head):
        y = h @ self.w[name + ".weight"].T + self.w.get(name + ".bias", 0)
        return y.reshape(len(h), n_head, self.d)

    def _attention(self, layer, name, h, sparse):
        n_head, n_head_kv = self.config.num_attention_heads, self.config.num_key_value_heads
        first = len(self.k[layer])
        positions = np.arange(first, first + len(h))
        q = rope(self._heads(name + "q_proj", h, n_head), positions, 10000.0)
        k = rope(self._heads(name + "k_proj", h, n_head_kv), positions, 10000.0)
        v = self._heads(name + "v_proj", h, n_head_kv)
        self.k[layer] = np.concatenate([self.k[layer], k.astype(self.cache_type)])
        self.v[layer] = np.concatenate([self.v[layer], v.astype(self.cache_type)])

        k, v = self.k[layer].swapaxes(0, 1), self.v[layer].swapaxes(0, 1)  # [G, N, D]
        age = positions[:, None] - np.arange(first + len(h))
        mask = np.where(age < 0, -np.inf, 0.0)
        if not sparse or not self.fcs[layer].size:
            return dense(q, k.astype(np.float64), v.astype(np.float64), mask).reshape(len(h), -1), np.inf
        mask[((positions[:, None] - age < self.n_sink) | (age < self.n_recent)) & (age >= 0)] = -0.0
        dims = oracle.fc_dims(self.fcs[layer], self.d, "neox")
        index = index_of(k, dims, self.index_type)
        q, k, v, mask = q.swapaxes(0, 1)[None], k[None], v[None], mask[None]
        budget = self.budget if np.isscalar(self.budget) else self.budget[layer]
        out, margins = oracle.attn(q, k, v, mask, index, dims, self.d**-0.5, budget, index_type=self.index_type)
        return out[0].reshape(len(h), -1), margins[0].min(axis=-1)


def dense(q, k, v, mask):
    """Softmax attention of [T, H, D] over [G, N, D]."""
    n_group = q.shape[1] // len(k)
    logits = np.einsum("thd,hnd->htn", q, k.repeat(n_group, axis=0)) * q.shape[2] ** -0.5 + mask
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("htn,hnd->thd", p / p.sum(axis=-1, keepdims=True), v.repeat(n_group, axis=0))


def index_of(k, dims, index_type):
    """The index cache over K rows [G, N, D]."""
    n = k.shape[1]
    rows = np.zeros((1, -(-n // oracle.TILE) * oracle.TILE, len(k), k.shape[2]), k.dtype)
    rows[0, :n] = k.swapaxes(0, 1)
    empty = oracle.new_index(1, len(k), rows.shape[1], dims.shape[1], index_type)
    return oracle.index_cache(rows, np.arange(n), empty, dims, index_type)
