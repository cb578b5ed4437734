# one H200: windows by cuDNN, the speedrun beside 74df706 for a minute each; .carry holds vd (shards), git.tgz, .whl wheels
export PYTHONUNBUFFERED=1
tar xzf .carry/git.tgz
python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl 2>&1 | tail -1; export PYTHONPATH=/tmp/site
timeout 90 python3 -m pytest -q -m gpu tests/kernels/test_window_attention.py -p no:cacheprovider > $OUT/tests.txt 2>&1; tail -5 $OUT/tests.txt
timeout 60 python3 -m benchmarks.masks --block_size=2048 --batch_size=32 --window=128 > $OUT/masks.txt 2>&1; tail -12 $OUT/masks.txt
mkdir -p /tmp/old; git archive 74df706 | tar x -C /tmp/old
D=$PWD/.carry/vd; NEW=$PWD
train() { cd $1; timeout 110 python3 -m gpt2 train --config=configs/speedrun.toml --fp8=head --data_dir=$D --max_steps=$3 --eval_every=0 --eval_tokens=65536 --save_every=0 --log_every=50 --resume=never --out_dir=/tmp/o_$2 > $OUT/train_$2.txt 2>&1; cp /tmp/o_$2/metrics.jsonl $OUT/m_$2.jsonl; grep attention $OUT/train_$2.txt; tail -1 $OUT/train_$2.txt; python3 - $OUT/m_$2.jsonl <<'P'
import json, sys, statistics
r = [json.loads(l) for l in open(sys.argv[1])]
t = [x["tokens_per_second"] for x in r if "tokens_per_second" in x]
print(sys.argv[1], "median of laps %.0f" % statistics.median(t[1:]), [round(x / 1e3) for x in t])
P
}
train /tmp/old old1 500; train $NEW new1 600; train /tmp/old old2 500; train $NEW new2 600
