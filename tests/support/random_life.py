"""Random lives of a KV cache under LLAMA_FASA_VERIFY, one process for many; run by tests/test_lifecycle_random.py.

    LLAMA_FASA_VERIFY=1 python -m support.random_life --arch llama --lives 50 --seed 1 [--first 17 --lives 1]

Each life is a context with random settings, a few random operations on its sequences, and at the end comparisons of
sparse steps with other contexts. The index is checked against K by the library after every step, which aborts on a
difference. Prints a line per life before it begins, and counts as JSON at the end.
"""

import argparse
import ctypes
import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from support import gguf_keys, native, tiny_gguf, tolerances
from support.runtime import ON, Model, NoSlot, fasa_params, llama
from support.tiny_gguf import N_VOCAB, Shape, write_tiny_gguf

BUDGET, N_SINK, N_RECENT, MAX_BATCH = 64, 4, 12, 8
N_CTX, N_SEQ = 512, 3  # cells of a stream; a single stream has N_SEQ times as many
STEPS = 9  # sparse steps compared at the end of a life
LONG = 270  # more cells than the budget, padded to 256: a sequence as long as that decodes sparse
PARTIAL_ONLY, ON_DEVICE = 1, 2  # LLAMA_STATE_SEQ_FLAGS
F16, Q8_0 = 1, 8  # ggml_type

# arch: (shape, FCs of each layer)
SMALL = dict(n_head=2, n_head_kv=1, n_ff=32)
ARCHS = {
    "llama": (Shape(n_layer=2, head_size=64, n_embd=128, **SMALL), [6, 4]),
    "qwen2": (Shape(n_layer=3, head_size=32, n_embd=64, **SMALL), [0, 4, 5]),
    "gemma3": (Shape(n_layer=6, head_size=32, n_embd=64, **SMALL), [0, 0, 0, 0, 0, 6]),  # the others have a window
    "stablelm": (Shape(n_layer=2, head_size=32, n_embd=64, **SMALL), [4, 3]),
    "lfm2": (Shape(n_layer=4, head_size=64, n_embd=128, **SMALL), [0, 6, 0, 5]),
}


def write_model(folder, arch):
    """A tiny model with random FCs; its attention is sharp, so that a wrong selection shows."""
    shape, n_tip = ARCHS[arch]
    plain = write_tiny_gguf(Path(folder) / "plain.gguf", arch, shape, sharpness=3.0)
    rng, n_rot, heads = np.random.default_rng(3), tiny_gguf.n_rot(arch, shape), tiny_gguf.n_head_kv(arch, shape)
    fcs = [gguf_keys.random_fcs(rng, g, n_rot, [n])[0] for g, n in zip(heads, n_tip) if n]
    rope = "norm" if arch == "llama" else "neox"
    center = rng.standard_normal(2 * sum(g * n for g, n in zip(heads, n_tip))).astype(np.float32).tolist()
    center = gguf_keys.array(gguf_keys.F32, center)
    keys = gguf_keys.fasa_keys(len(n_tip), heads, n_rot, n_tip, fcs, rope, center=center)
    return gguf_keys.with_keys(plain, Path(folder) / "model.gguf", keys)


class Sequence:
    """What a sequence has read. pure: each token with all earlier ones in sight, densely, from position 0."""

    def __init__(self, tokens=(), pure=True):
        self.tokens, self.pure = list(tokens), pure

    def copy(self):
        return Sequence(self.tokens, self.pure)


class Life:
    """One context and what is known of its sequences."""

    def __init__(self, model, arch, rng, unified, folder):
        self.model, self.arch, self.rng, self.unified, self.folder = model, arch, rng, unified, folder
        self.kwargs = {}
        if arch == "gemma3":
            self.kwargs["swa_full"] = bool(rng.integers(2))
        if ARCHS[arch][0].head_size == 64:  # llama.cpp cannot shift a quantised K of other head sizes
            self.kwargs["type_k"] = int(rng.choice([F16, Q8_0]))
        self.index_type = str(rng.choice(["f16", "q8", "q4"]))
        self.done = Counter()
        self.seqs = {i: Sequence() for i in range(N_SEQ)}
        self.shared = False  # sequences of one stream share cells
        self.pending = False  # a shift or a copy between streams waits for the next batch
        self.ctx = self.context()

    def context(self):
        with fasa_params(ON, BUDGET, N_SINK, N_RECENT, MAX_BATCH, self.index_type):
            return self.model.context(
                n_ctx=N_SEQ * N_CTX, n_ubatch=256, n_seq=N_SEQ, unified=self.unified, **self.kwargs
            )

    def close(self):
        stats = self.ctx.stats()
        self.done += Counter({"steps sparse": stats.n_step_sparse, "steps mixed": stats.n_step_mixed})
        self.done += Counter({"rebuilt": stats.n_index_rebuild})
        self.ctx.close()

    def restart(self):
        self.close()
        self.ctx = self.context()

    # --- operations; each leaves a context that llama.cpp allows ---

    def text(self, n):
        return [int(t) for t in self.rng.integers(3, N_VOCAB, n)]

    def pos(self, seq):
        return llama().llama_memory_seq_pos_max(self.ctx.memory, seq) + 1

    def seq(self, used=True):
        """A sequence, one with tokens if there is one and used says so."""
        full = [i for i, s in self.seqs.items() if s.tokens]
        return int(self.rng.choice(full if used and full else list(self.seqs)))

    def decode(self, news):
        """Decodes {sequence: tokens} as one batch; where there is no room, sequences are removed first."""
        rows = [(t, self.pos(i) + n, [i]) for i, tokens in news.items() for n, t in enumerate(tokens)]
        before = self.ctx.stats()
        try:
            logits = self.ctx.decode_rows(rows)
        except NoSlot:
            self.done["no room"] += 1
            self.remove(int(self.rng.choice(list(news))))
            return None
        after = self.ctx.stats()
        sparse = after.n_step_sparse + after.n_step_mixed > before.n_step_sparse + before.n_step_mixed
        for i, tokens in news.items():
            self.seqs[i].tokens += tokens
            self.seqs[i].pure &= not (sparse and (len(tokens) <= MAX_BATCH or not self.unified))
        self.pending = False
        return logits

    def op_prompt(self, low=20, high=350):
        self.decode({self.seq(used=False): self.text(int(self.rng.integers(low, high)))})

    def op_token(self):
        seq = self.seq()
        for _ in range(int(self.rng.integers(1, 4))):
            self.decode({seq: self.text(1)})

    def op_batch(self):
        """Several sequences in one batch: single tokens, drafts and prompts."""
        n = int(self.rng.integers(2, N_SEQ + 1))
        order = self.rng.permutation(N_SEQ)[:n]
        self.decode({int(i): self.text(int(self.rng.choice([1, 1, 3, MAX_BATCH, 40]))) for i in order})

    def remove(self, seq):
        assert llama().llama_memory_seq_rm(self.ctx.memory, seq, -1, -1)
        self.seqs[seq] = Sequence()

    def op_rm(self):
        self.remove(self.seq())

    def op_rm_tail(self):
        seq, end = (s := self.seq()), self.pos(s)
        first = end - min(end, int(self.rng.choice([1, 2, 5, 60])))
        if llama().llama_memory_seq_rm(self.ctx.memory, seq, first, -1):
            self.seqs[seq].tokens = self.seqs[seq].tokens[:first]
            # a window that has moved on has forgotten what the shorter sequence would see
            self.seqs[seq].pure &= self.kwargs.get("swa_full", True) or first == 0

    def op_rm_range(self):
        seq, end = (s := self.seq()), self.pos(s)
        first = int(self.rng.integers(0, max(end, 1)))
        if llama().llama_memory_seq_rm(self.ctx.memory, seq, first, first + int(self.rng.integers(1, 80))):
            self.seqs[seq].pure = False

    def op_cp(self):
        source, target = (int(i) for i in self.rng.permutation(N_SEQ)[:2])
        self.remove(target)
        end = -1
        if self.unified and self.arch not in ("lfm2", "gemma3"):
            end = int(self.rng.choice([-1, max(self.pos(source) - 20, 1)]))
        llama().llama_memory_seq_cp(self.ctx.memory, source, target, -1, end)
        self.seqs[target] = self.seqs[source].copy()
        if end >= 0:
            self.seqs[target].tokens = self.seqs[target].tokens[:end]
        self.shared |= self.unified
        self.pending |= not self.unified

    def op_keep(self):
        seq = self.seq()
        llama().llama_memory_seq_keep(self.ctx.memory, seq)
        if not self.unified:  # llama.cpp keeps other streams as they are, but not a recurrent state
            if self.arch != "lfm2":
                return
            for other in [i for i in self.seqs if i != seq]:
                self.remove(other)
        self.seqs = {i: s if i == seq else Sequence() for i, s in self.seqs.items()}

    def spoil(self, seq):
        """Positions have changed: of this sequence, and of those that share its cells."""
        for i, s in self.seqs.items():
            s.pure &= i != seq and not self.shared
        self.pending = True

    def op_add(self):
        """A context shift: a part is forgotten and what follows moves into its place."""
        seq, end = (s := self.seq()), self.pos(s)
        if end < 30 or not llama().llama_memory_can_shift(self.ctx.memory):
            return
        first = int(self.rng.integers(0, end - 20))
        n = int(self.rng.integers(1, end - first))
        if llama().llama_memory_seq_rm(self.ctx.memory, seq, first, first + n):
            llama().llama_memory_seq_add(self.ctx.memory, seq, first + n, -1, -n)
            self.spoil(seq)

    def op_div(self):
        seq, end = (s := self.seq()), self.pos(s)
        if end < 30 or not llama().llama_memory_can_shift(self.ctx.memory):
            return
        first = int(self.rng.integers(0, end - 8))
        llama().llama_memory_seq_div(self.ctx.memory, seq, first, -1, int(self.rng.integers(2, 4)))
        self.spoil(seq)

    def op_clear(self):
        llama().llama_memory_clear(self.ctx.memory, bool(self.rng.integers(2)))
        self.seqs, self.shared = {i: Sequence() for i in self.seqs}, False

    def settle(self):
        """Lets shifts and copies that wait take place: a state would hold K from before."""
        while self.pending:
            self.decode({self.seq(): self.text(1)})

    def device(self, seq):
        """LLAMA_STATE_SEQ_FLAGS for a state of seq on the device, where llama.cpp needs cells side by side."""
        return ON_DEVICE if not self.unified and self.seqs[seq].pure and self.rng.integers(2) else 0

    def op_state(self):
        """All of the context, into itself or into a new one."""
        self.settle()
        state = self.ctx.save()
        if self.rng.integers(2):
            self.restart()
        self.ctx.load(state)

    def op_state_file(self):
        self.settle()
        path, kept, n = str(Path(self.folder) / "state").encode(), (ctypes.c_int32 * 1)(1), ctypes.c_size_t()
        assert llama().llama_state_save_file(self.ctx.handle, path, kept, 1)
        self.restart()
        assert llama().llama_state_load_file(self.ctx.handle, path, kept, 1, n)

    def op_seq_state(self):
        """One sequence over another, or over itself, through memory, device memory or a file."""
        self.settle()
        source, target = self.seq(), self.seq(used=False)
        if not self.seqs[source].tokens:
            return
        try:
            if self.rng.integers(3) == 0:
                path, kept = str(Path(self.folder) / "sequence").encode(), (ctypes.c_int32 * 1)(1)
                n = ctypes.c_size_t()
                assert llama().llama_state_seq_save_file(self.ctx.handle, path, source, kept, 1)
                assert llama().llama_state_seq_load_file(self.ctx.handle, path, target, kept, 1, n)
            else:
                flags = self.device(source)
                self.ctx.load(self.ctx.save(source, flags), target, flags)
        except AssertionError:  # no room; the target may be gone
            self.remove(target)
            self.done["no room"] += 1
            return
        self.seqs[target] = self.seqs[source].copy()

    def op_checkpoint(self):
        """As llama-server rolls back: a partial state, more tokens, the partial state again, and the tail removed."""
        self.settle()
        seq = self.seq()
        kept, end = self.seqs[seq].copy(), self.pos(seq)
        if not kept.tokens:
            return
        flags = PARTIAL_ONLY | self.device(seq)
        state = self.ctx.save(seq, flags)
        if self.decode({seq: self.text(int(self.rng.choice([1, 5, 30])))}) is None:
            return
        self.ctx.load(state, seq, flags)
        assert llama().llama_memory_seq_rm(self.ctx.memory, seq, end, -1)
        self.seqs[seq] = kept

    def op_budget(self):
        assert self.ctx.set_budget(int(self.rng.choice([0, 40, BUDGET, 300])))[0] == 0

    # --- the end of a life ---

    def compare(self):
        """Sparse steps of a sequence against a context that loads it, and against one that reads its tokens."""
        self.ctx.set_budget(BUDGET)
        seq = self.seq()
        for other in [i for i in self.seqs if i != seq]:
            if self.rng.integers(2):
                self.remove(other)
        if not self.seqs[seq].pure:  # it may have fewer cells than positions
            self.decode({seq: self.text(LONG)})
        while self.pending or self.pos(seq) < LONG:
            self.decode({seq: self.text(100)})
        state, text = self.ctx.save(seq), self.text(STEPS)
        actual = self.probe(self.ctx, seq, text)
        with self.context() as loaded:
            loaded.load(state, seq)
            self.check("loaded", actual, self.probe(loaded, seq, text), tolerances.LIFECYCLE_NMSE)
        # a quantised K is coarse enough to show that other batches round otherwise
        if self.seqs[seq].pure and self.kwargs.get("type_k", F16) == F16:
            with self.context() as fresh:
                fresh.decode(self.seqs[seq].tokens, seq=seq)
                expected = self.probe(fresh, seq, text)
                # K of other batches among other cells rounds otherwise: dense steps show how much
                dense = [self.probe(ctx, seq, text, 0) for ctx in (self.ctx, fresh)]
                rounding = self.difference(*dense)
                self.check("read anew", actual, expected, max(tolerances.LIFECYCLE_NMSE, 10 * rounding))

    def probe(self, ctx, seq, text, budget=BUDGET):
        """Logits of steps, each token at the same place; one after the other if nothing can be undone."""
        ctx.set_budget(budget)
        logits, before = [], ctx.stats().n_step_sparse
        for token in text:
            logits.append(ctx.decode([token], seq=seq))
            llama().llama_memory_seq_rm(ctx.memory, seq, llama().llama_memory_seq_pos_max(ctx.memory, seq), -1)
        assert ctx.stats().n_step_sparse == before + (len(text) if budget else 0), "the steps were not sparse"
        return logits

    def difference(self, actual, expected):
        """Median NMSE over steps: one in many may decide a near tie otherwise, a stale index spoils every one."""
        return float(np.median([tolerances.nmse(a, e) for a, e in zip(actual, expected)]))

    def check(self, name, actual, expected, bound):
        nmse = self.difference(actual, expected)
        assert nmse <= bound, f"{name}: NMSE {nmse:.2e}"
        self.done["compared: " + name] += 1

    def run(self):
        names = [name for name in dir(self) if name.startswith("op_")] + ["op_prompt"] * 3 + ["op_token"] * 2
        self.op_prompt(280, 400)
        for _ in range(int(self.rng.integers(5, 14))):
            name = str(self.rng.choice(names))
            print(" ", name[3:], flush=True)
            getattr(self, name)()
            self.done[name[3:]] += 1
        try:
            self.compare()
        except NoSlot:
            self.done["no room at the end"] += 1
        self.close()
        return self.done


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=ARCHS, required=True)
    parser.add_argument("--streams", action="store_true", help="a stream for each sequence")
    parser.add_argument("--lives", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first", type=int, default=0, help="number of the first life")
    args = parser.parse_args()
    done = Counter()
    with tempfile.TemporaryDirectory() as folder, Model(write_model(folder, args.arch)) as model:
        for number in range(args.first, args.first + args.lives):
            print(f"--arch {args.arch}{' --streams' * args.streams} --seed {args.seed} --first {number}", flush=True)
            rng = np.random.default_rng([args.seed, list(ARCHS).index(args.arch), args.streams, number])
            done += Life(model, args.arch, rng, not args.streams, folder).run()
            done["lives"] += 1
    done["index writes"] = native.ggml()[1].ggml_fasa_cpu_n_index_write()
    print(json.dumps(done))


if __name__ == "__main__":
    main()
