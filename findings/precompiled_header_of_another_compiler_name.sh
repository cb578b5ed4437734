#!/usr/bin/env bash
# torch 2.13.0: torch.compile on a CPU precompiles its C++ headers once, so that each kernel takes g++
# a second or two. With CXX=c++, which is g++ itself on Debian, the precompiled header (150 MB) is written as
# .pch, as for clang, and g++ looks for .gch only. So it is never read, and every kernel parses all headers
# again: three times as long, with no warning. inductor knows GCC by "gcc", "g++" or "gnu-c++" in the name of
# the compiler.
#
# Seen on Python 3.11, Debian 12, GCC 12.2, two cores, for a second kernel: g++ .gch 1.8 s, c++ .pch 5.4 s
# Exit code 0: as described. 1: the behaviour has changed. 2: c++ is not GCC here.
set -euo pipefail
case $(echo | c++ -dM -E -x c++ -) in *__clang__*) exit 2 ;; *__GNUC__*) ;; *) exit 2 ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy
cat > try.py <<'PY'
import pathlib
import tempfile
import time

import torch


def first(x):  # compiles the header too
    return (x.sin() + 1).sum()


def second(x):
    return (x.cos() * 2).sum()


x = torch.randn(100, 101)
torch.compile(first)(x)
began = time.perf_counter()
torch.compile(second)(x)
seconds = time.perf_counter() - began
(header,) = {file.suffix for file in pathlib.Path(tempfile.gettempdir()).rglob("*.h.?ch")}
print(f"{header} {seconds:.1f}")
PY
for compiler in g++ c++; do
  mkdir "$work/$compiler"
  TMPDIR=$work/$compiler CXX=$compiler venv/bin/python try.py > "$compiler.txt"
  echo "$compiler $(cat "$compiler.txt")"
done
read -r header_of_gcc seconds_of_gcc < g++.txt
read -r header_of_cxx seconds_of_cxx < c++.txt
[ "$header_of_gcc" = .gch ] && [ "$header_of_cxx" = .pch ] || exit 1
awk "BEGIN { exit !($seconds_of_cxx > 1.5 * $seconds_of_gcc) }"
