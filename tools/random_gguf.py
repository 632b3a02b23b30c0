"""Writes a model with random Q4_0 weights in the shape of Llama 3.1 8B, or another, with FASA's metadata: for speed.

Weights are blocks of a random pool, tiled from another place for every tensor, with the scale that keeps activations
near 1; norms are 1. Activations and logits are finite and differ from token to token, and mean nothing. The first 256
tokens of the vocabulary that are not control tokens are the bytes. FCs are random, as of `--criterion random`.
"""

import argparse
import hashlib
import os
import sys

import gguf
import numpy as np
from tqdm import tqdm

from fasa_calibrate.calibrate import Calibration, Options
from fasa_calibrate.gguf_file import STRING, GgufFile
from fasa_calibrate.metadata import U32, fasa_keys

BLOCK, BLOCK_BYTES = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q4_0]
BLOCK_RMS = np.sqrt(np.mean((np.arange(16) - 8.0) ** 2))  # of a weight with scale 1 and random bits
POOL_BYTES = 64 << 20
N_CONTROL = 3  # <unk>, <s>, </s>


class Pool:
    """Random Q4_0 blocks; the sign of the scale is random too, so that weights have no mean."""

    def __init__(self, rng):
        # an odd number: rows of a tensor larger than the pool differ
        self.blocks = np.zeros(POOL_BYTES // BLOCK_BYTES | 1, [("d", "<f2"), ("qs", "u1", BLOCK // 2)])
        self.blocks["qs"] = np.frombuffer(rng.bytes(self.blocks.size * BLOCK // 2), np.uint8).reshape(-1, BLOCK // 2)
        self.signs = rng.integers(0, 2, self.blocks.size) * 2.0 - 1.0
        self.rng = rng
        self.scaled = {}

    def write(self, file, n_in, n_out):
        """Writes a weight of n_out rows of n_in values with standard deviation n_in ** -0.5."""
        if n_in not in self.scaled:
            self.scaled[n_in] = self.blocks.copy()
            self.scaled[n_in]["d"] = self.signs / (BLOCK_RMS * np.sqrt(n_in))
        blocks = self.scaled[n_in]
        at, left = self.rng.integers(blocks.size), n_out * n_in // BLOCK
        while left:
            n = min(left, blocks.size - at)
            file.write(blocks[at : at + n].data)
            at, left = 0, left - n


def tensors(args):
    """(name, n_in, n_out) of every tensor; n_out is 0 for a norm, which is F32."""
    n_q, n_kv = args.n_head * args.head_size, args.n_head_kv * args.head_size
    yield "token_embd.weight", args.n_embd, args.n_vocab
    yield "output_norm.weight", args.n_embd, 0
    if not args.tie:
        yield "output.weight", args.n_embd, args.n_vocab
    for il in range(args.n_layer):
        for name, n_in, n_out in (
            ("attn_norm", args.n_embd, 0),
            ("attn_q", args.n_embd, n_q),
            ("attn_k", args.n_embd, n_kv),
            ("attn_v", args.n_embd, n_kv),
            ("attn_output", n_q, args.n_embd),
            ("ffn_norm", args.n_embd, 0),
            ("ffn_gate", args.n_embd, args.n_ff),
            ("ffn_up", args.n_embd, args.n_ff),
            ("ffn_down", args.n_ff, args.n_embd),
        ):
            yield f"blk.{il}.{name}.weight", n_in, n_out


def add_model_keys(writer, args):
    writer.add_name("random")
    writer.add_context_length(args.n_ctx)
    writer.add_embedding_length(args.n_embd)
    writer.add_block_count(args.n_layer)
    writer.add_feed_forward_length(args.n_ff)
    writer.add_head_count(args.n_head)
    writer.add_head_count_kv(args.n_head_kv)
    writer.add_key_length(args.head_size)
    writer.add_value_length(args.head_size)
    writer.add_rope_dimension_count(args.head_size)
    writer.add_rope_freq_base(args.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(args.n_vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)


def add_vocabulary(writer, n_vocab):
    unknown, control, byte, normal = 2, 3, 6, 1
    n_other = n_vocab - N_CONTROL - 256
    writer.add_tokenizer_model("llama")
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *(f"t{i}" for i in range(n_other))]
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types([unknown, control, control] + [byte] * 256 + [normal] * n_other)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def add_fasa_keys(writer, args, rng):
    """FASA's metadata as fasa-calibrate writes it, less what weights say that are not there yet."""
    layers = range(args.n_layer)

    def fcs():
        return [np.sort(rng.permutation(args.head_size // 2)[: args.n_tip]).tolist() for _ in range(args.n_head_kv)]

    calibration = Calibration(
        rope="norm",
        n_layer=args.n_layer,
        n_rot={il: args.head_size for il in layers},
        n_head_kv={il: args.n_head_kv for il in layers},
        fcs={il: fcs() for il in layers if il >= args.dense_layers},
        centers={},
        quality={},
        n_tokens=0,
        n_query=0,
    )
    options = Options(criterion="random", n_tip=args.n_tip, n_dense=args.dense_layers, seed=args.seed)
    known = {"general.architecture": "llama", "llama.attention.head_count": args.n_head}
    no_weights = GgufFile(os.devnull, 3, 0, 0, 0, 0, 32, values=known)
    for name, kind, value in fasa_keys(
        no_weights, "", calibration, options, "none", hashlib.sha256().hexdigest(), None
    ):
        add = {U32: writer.add_uint32, STRING: writer.add_string}.get(kind, writer.add_array)
        add(name, value)


def write_model(path, args):
    rng = np.random.default_rng(args.seed)
    writer = gguf.GGUFWriter(path, "llama")
    add_model_keys(writer, args)
    add_vocabulary(writer, args.n_vocab)
    add_fasa_keys(writer, args, rng)
    for name, n_in, n_out in tensors(args):
        if n_out:
            n_bytes = n_in // BLOCK * BLOCK_BYTES
            q4_0 = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor_info(name, (n_out, n_bytes), np.dtype(np.uint8), n_out * n_bytes, q4_0)
        else:
            writer.add_tensor_info(name, (n_in,), np.dtype(np.float32), 4 * n_in)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    pool = Pool(rng)
    with writer.fout[0] as file:
        for _, n_in, n_out in tqdm(list(tensors(args)), desc="writing", unit="tensor", disable=args.quiet or None):
            writer.write_padding(file, file.tell())
            if n_out:
                pool.write(file, n_in, n_out)
            else:
                file.write(np.ones(n_in, np.float32).data)
        writer.write_padding(file, file.tell())


def check(args):
    """One sentence about what is wrong with the shape, or None."""
    if args.n_embd % BLOCK or args.n_ff % BLOCK or args.n_head * args.head_size % BLOCK:
        return f"--embd, --ff and --heads times --head-size must be multiples of {BLOCK}"
    if args.n_head % args.n_head_kv or args.head_size % 2:
        return "--heads must be a multiple of --heads-kv, and --head-size even"
    if not 1 <= args.n_tip <= args.head_size // 2:
        return f"--n-tip must be 1 to {args.head_size // 2}, the FCs of a head"
    if not 0 <= args.dense_layers < args.n_layer:
        return "--dense-layers must leave a layer to FASA"
    if args.n_vocab < N_CONTROL + 256:
        return f"--vocab must be at least {N_CONTROL + 256}"
    return None


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", metavar="OUT.gguf", help="the file to write; an existing one is replaced")
    add("--layers", type=positive, default=32, dest="n_layer", metavar="N")
    add("--embd", type=positive, default=4096, dest="n_embd", metavar="N")
    add("--heads", type=positive, default=32, dest="n_head", metavar="N")
    add("--heads-kv", type=positive, default=8, dest="n_head_kv", metavar="N")
    add("--head-size", type=positive, default=128, metavar="N")
    add("--ff", type=positive, default=14336, dest="n_ff", metavar="N")
    add("--vocab", type=positive, default=128256, dest="n_vocab", metavar="N")
    add("--tie", action="store_true", help="use the token embedding as the output weight")
    add("--ctx", type=positive, default=131072, dest="n_ctx", metavar="N", help="context length in the metadata")
    add("--rope-base", type=float, default=500000.0, metavar="X")
    add("--n-tip", type=positive, default=16, metavar="N", help="FCs per head (default: 16)")
    add("--dense-layers", type=int, default=2, metavar="N", help="first layers that stay dense (default: 2)")
    add("--seed", type=int, default=0, metavar="N")
    add("--quiet", action="store_true")
    args = parser.parse_args(argv)
    wrong = check(args)
    if wrong:
        parser.error(wrong)
    part = args.out + ".part"
    try:
        write_model(part, args)
        os.replace(part, args.out)
    except OSError as err:
        raise SystemExit(f"error: cannot write {args.out}: {err.strerror}") from err
    finally:
        if os.path.exists(part):
            os.unlink(part)
    if not args.quiet:
        print(f"wrote {args.out}, {os.path.getsize(args.out) / 1e9:.2f} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
