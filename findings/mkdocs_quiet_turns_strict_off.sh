#!/usr/bin/env bash
# mkdocs 1.6.1: a page has a broken link. `mkdocs build --strict` ends with 1, `mkdocs build --strict
# --quiet` with 0 and without a word. --strict counts the warnings that its log handler sees, and --quiet
# keeps warnings from it. A build in CI that is both quiet and strict checks no link.
#
# Seen on Python 3.11: exit codes 1 and 0, quiet output of 0 bytes
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet mkdocs==1.6.1
mkdir docs
echo "site_name: x" > mkdocs.yml
echo "[a page that is not there](gone.md)" > docs/index.md
loud=0 quiet=0
venv/bin/mkdocs build --strict > loud.txt 2>&1 || loud=$?
venv/bin/mkdocs build --strict --quiet > quiet.txt 2>&1 || quiet=$?
echo "exit codes $loud and $quiet, quiet output of $(wc -c < quiet.txt) bytes"
grep "gone.md" loud.txt
[ "$loud $quiet $(wc -c < quiet.txt)" = "1 0 0" ]
