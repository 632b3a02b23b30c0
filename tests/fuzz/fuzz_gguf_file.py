#!/usr/bin/env python3
"""Fuzzes the Python reader of GGUF files with atheris (pip install atheris); arguments are those of libFuzzer.

    tests/fuzz/fuzz_gguf_file.py -runs=100000 CORPUS
"""

import pathlib
import sys
import tempfile

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
with atheris.instrument_imports(include=["fasa_calibrate.gguf_file", "fasa_calibrate.metadata"]):
    from support.mutate import check_reader

with tempfile.NamedTemporaryFile() as file:

    def one_input(data):
        file.seek(0)
        file.truncate()
        file.write(data)
        file.flush()
        check_reader(file.name)

    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
