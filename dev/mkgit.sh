#!/bin/bash
# a small repository with one commit per NAME=REV, models left out -> /work/main/.carry/git.tgz
set -e
rm -rf /tmp/mine/g; mkdir /tmp/mine/g; cd /tmp/mine/g; git init -q .; git config user.name a; git config user.email a@b
for p in "$@"; do n=${p%%=*}; r=${p##*=}
git rm -rqf --cached . 2>/dev/null || true; find . -mindepth 1 -maxdepth 1 ! -name .git -exec rm -rf {} +
git -C /work/main archive $r | tar x --exclude=models --exclude=docs/results
git -c filter.lfs.process= -c filter.lfs.clean=cat -c filter.lfs.required=false add -A -f; git commit -qm $n; git tag -f $n; done
find . -mindepth 1 -maxdepth 1 ! -name .git -exec rm -rf {} +
git gc -q --aggressive --prune=now; tar czf /work/main/.carry/git.tgz .git; ls -la /work/main/.carry/git.tgz
