"""What people do with llama-cpp-python, done with FASA: states, caches, several models, threads, and docs/python.md."""

from __future__ import annotations

import itertools
import pickle
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fasa
from support import loopback, openai_stub
from test_bindings import PROMPT, python
from test_bindings import load as load_with

PAGE = Path(__file__).resolve().parent.parent / "docs" / "python.md"
SETTINGS: dict[str, dict[str, object]] = {
    "dense": {"fasa": False, "flash_attn": True},
    "sparse": {"fasa": True, "fasa_budget": 64},
    "sparse, q8_0": {"fasa": True, "fasa_budget": 64, "type_k": 8, "type_v": 8},
}
EACH = pytest.mark.parametrize("name", SETTINGS)


def load(path: Path, **kwargs: object) -> fasa.Llama:
    """One thread each: some of these tests run several at a time."""
    return load_with(path, **{"n_threads": 1, "n_threads_batch": 1, **kwargs})


def read_prompt(llm: fasa.Llama) -> fasa.Llama:
    llm.eval(llm.tokenize(PROMPT.encode()))
    return llm


def proceed(llm: fasa.Llama, n: int = 16) -> list[int]:
    """The n likeliest next tokens, each from the one before, which is decoded alone."""
    said = [llm.sample(temp=0.0)] if not llm._requires_eval else []
    while len(said) < n:
        llm.eval(said[-1:])
        said.append(llm.sample(temp=0.0))
    return said


def complete(llm: fasa.Llama, prompt: str = PROMPT) -> str:
    text = llm.create_completion(prompt, max_tokens=12, temperature=0.0)["choices"][0]["text"]
    assert isinstance(text, str)
    return text


def at_once(*tasks: Callable[[], Any]) -> list[Any]:
    """What the tasks return, each run in a thread of its own."""
    results: list[Any] = [None] * len(tasks)

    def run(i: int) -> None:
        try:
            results[i] = tasks[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


# --- state ----------------------------------------------------------------------------------------------------------


@EACH
def test_state_goes_on_as_without_a_break(calibrated: Path, name: str) -> None:
    """Saved, pickled, and loaded into another object: the same tokens, and the index was rebuilt for it."""
    llm = read_prompt(load(calibrated, **SETTINGS[name]))
    first = proceed(llm, 4)
    state = pickle.dumps(llm.save_state())
    llm.eval(first[-1:])
    expected = proceed(llm)

    other = load(calibrated, **SETTINGS[name])
    other.load_state(pickle.loads(state))
    other.eval(first[-1:])
    assert proceed(other) == expected
    if name != "dense":
        assert other.fasa_stats().n_index_rebuild > 0
        assert other.fasa_stats().n_step_sparse == len(expected) and other.fasa_stats().n_step_dense == 0


def test_state_rewinds(calibrated: Path) -> None:
    """Loading into the object that saved, after it went another way."""
    llm = read_prompt(load(calibrated, **SETTINGS["sparse"]))
    first = proceed(llm, 2)
    state = llm.save_state()
    llm.eval(first[-1:])
    expected = proceed(llm)
    llm.reset()
    llm.eval(llm.tokenize(b"Something else altogether, and at some length. " * 20))
    llm.load_state(state)
    llm.eval(first[-1:])
    assert proceed(llm) == expected


@pytest.mark.parametrize("source, target", list(itertools.permutations(["dense", "sparse"])))
def test_state_between_fasa_and_dense(calibrated: Path, source: str, target: str) -> None:
    """K and V of a dense prompt are the same with and without FASA; what follows is the target's."""
    donor, own = read_prompt(load(calibrated, **SETTINGS[source])), read_prompt(load(calibrated, **SETTINGS[target]))
    first = own.sample(temp=0.0)
    assert donor.sample(temp=0.0) == first
    own.eval([first])
    expected = proceed(own)
    other = load(calibrated, **SETTINGS[target])
    other.load_state(donor.save_state())
    other.eval([first])
    assert proceed(other) == expected
    assert (other.fasa_stats().n_step_sparse > 0) == (target == "sparse")


def test_state_in_a_new_process(calibrated: Path, tmp_path: Path) -> None:
    llm = read_prompt(load(calibrated, **SETTINGS["sparse"]))
    first = llm.sample(temp=0.0)
    (tmp_path / "state").write_bytes(pickle.dumps(llm.save_state()))
    llm.eval([first])
    expected = proceed(llm)
    done = python(
        "import fasa, pickle; fasa.LlamaState\n"
        "from test_python_use import SETTINGS, load, proceed\n"
        f"llm = load({str(calibrated)!r}, **SETTINGS['sparse'])\n"
        f"llm.load_state(pickle.load(open({str(tmp_path / 'state')!r}, 'rb')))\n"
        f"llm.eval([{first}])\n"
        "print(proceed(llm))\n",
        PYTHONPATH=str(Path(__file__).parent),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(expected)


# --- prefixes and caches --------------------------------------------------------------------------------------------


LONG_REST = " Then the dog, which had been asleep until that moment, opened one eye and said that"


@pytest.mark.parametrize("rest", [LONG_REST, " Then the dog", ""])
def test_prefix_reuse(calibrated: Path, rest: str) -> None:
    """The rest of the prompt is read densely, however short it is: the answer is that to the whole prompt."""
    fresh = complete(load(calibrated, **SETTINGS["sparse"]), PROMPT + rest)
    llm = load(calibrated, **SETTINGS["sparse"])
    complete(llm)
    n_prefill = llm.fasa_stats().n_step_prefill
    assert complete(llm, PROMPT + rest) == fresh
    assert llm.fasa_stats().n_step_prefill == n_prefill + 1


@EACH
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_prompt_cache(calibrated: Path, tmp_path: Path, kind: str, name: str) -> None:
    """A hit in another object answers as a hit in the object's own context does."""
    own = load(calibrated, **SETTINGS[name])
    complete(own)
    expected = complete(own)

    cache = fasa.LlamaRAMCache() if kind == "ram" else fasa.LlamaDiskCache(str(tmp_path / "cache"))
    first = load(calibrated, **SETTINGS[name])
    first.set_cache(cache)
    complete(first)
    other = load(calibrated, **SETTINGS[name])
    other.set_cache(cache)
    assert complete(other) == expected
    assert other.fasa_stats().n_step_prefill == (name != "dense") and cache.cache_size > 0  # of the prompt's last token
    if name != "dense":
        assert other.fasa_stats().n_index_rebuild > 0 and other.fasa_stats().n_step_sparse > 0


# --- several at once ------------------------------------------------------------------------------------------------


def test_models_side_by_side(calibrated: Path, smollm2: Path) -> None:
    """Turn by turn, each object says what it says alone."""
    kinds = [(calibrated, SETTINGS["sparse"]), (calibrated, SETTINGS["dense"]), (smollm2, {"flash_attn": True})]
    alone = [proceed(read_prompt(load(path, **settings))) for path, settings in kinds]
    together = [read_prompt(load(path, **settings)) for path, settings in kinds]
    said = [[llm.sample(temp=0.0)] for llm in together]
    while len(said[0]) < len(alone[0]):
        for llm, tokens in zip(together, said):
            llm.eval(tokens[-1:])
            tokens.append(llm.sample(temp=0.0))
    assert said == alone
    assert [llm.fasa_info().active for llm in together] == [True, False, False]


def test_threads(calibrated: Path) -> None:
    """Objects made and used in threads of their own keep their settings and their tokens."""
    settings = [SETTINGS["sparse"], SETTINGS["dense"], {**SETTINGS["sparse"], "fasa_budget": 100}, SETTINGS["dense"]]

    def task(kwargs: dict[str, object]) -> Callable[[], Any]:
        def run() -> Any:
            llm = load(calibrated, **kwargs)
            return llm.fasa_info().budget, proceed(read_prompt(llm))

        return run

    expected = [task(kwargs)() for kwargs in settings]
    assert [budget for budget, _ in expected] == [64, 0, 100, 0]
    assert at_once(*map(task, settings)) == expected


# --- ways to make one -----------------------------------------------------------------------------------------------


@pytest.fixture
def hub(calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub with one repository of two files, and no network."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Files:
        def ls(self, repo: str, recursive: bool) -> list[dict[str, str]]:
            return [{"name": f"{repo}/{name}"} for name in ("some-model.gguf", "some-model-fasa.gguf")]

    def download(repo_id: str, filename: str, **_: object) -> str:
        assert (repo_id, filename) == ("someone/some-model", "some-model-fasa.gguf")
        return str(calibrated)

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)


@pytest.mark.usefixtures("hub")
def test_from_pretrained() -> None:
    llm = fasa.Llama.from_pretrained(
        "someone/some-model", "*-fasa.gguf", n_ctx=512, fasa=True, fasa_budget=80, verbose=False
    )
    assert isinstance(llm, fasa.Llama) and llm.fasa_info().budget == 80


# --- docs/python.md -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hub")
def test_page(calibrated: Path, bin_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the page from top to bottom, with the server it starts and a stand-in for the package openai."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "openai", openai_stub)
    (tmp_path / "model.gguf").symlink_to(calibrated)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    (command,) = (text.split() for kind, text in blocks if kind == "sh")
    port = str(loopback.free_port())
    code = "".join(text for kind, text in blocks if kind == "python").replace(":8080/", f":{port}/")
    assert command[0] == "llama-server" and command[-2:] == ["--port", "8080"] and port in code
    names: dict[str, Any] = {}
    with loopback.serving([str(bin_dir / command[0]), *command[1:-1], port], tmp_path / "log"):
        exec(compile(code, str(PAGE), "exec"), names)
    assert names["chat"].choices[0].message.content and names["answer"]
    assert names["other"].fasa_stats().n_step_sparse > 0


def test_pickled_object_says_the_same(calibrated: Path) -> None:
    """"Pickling a Llama keeps its settings", for an object that has run."""
    llm = read_prompt(load(calibrated, **SETTINGS["sparse, q8_0"]))
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.fasa_info() == llm.fasa_info()
    assert proceed(read_prompt(copy)) == proceed(llm)
