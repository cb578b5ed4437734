import sys, torch
from gpt2.kernels import one_token as m
from gpt2.config.model import SIZES, GPT2Config
from gpt2.model.gpt import GPT
for size in sys.argv[1:] or ["gpt2"]:
  with torch.inference_mode():
    torch.manual_seed(0)
    with torch.device("cuda"): model = GPT(GPT2Config(**SIZES[size])).eval().bfloat16()
    cache = model.new_cache(1, torch.bfloat16, 1024); cache.lengths = torch.tensor([500], device="cuda")
    token = torch.tensor([7], device="cuda")
    one = m.OneToken(model, cache)
    for length in (10, 300, 500, 900):
        out = []
        g = torch.cuda.CUDAGraph()
        one.next_logits(token, choose=True); torch.cuda.synchronize()
        with torch.cuda.graph(g): one.next_logits(token, choose=True)
        for step in (lambda: one.next_logits(token, choose=True), g.replay):
            cache.lengths.fill_(length); torch.cuda.synchronize()
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2)); a.record()
            for _ in range(100): step()
            b.record(); torch.cuda.synchronize(); out.append(a.elapsed_time(b) * 10)
        print(size, "at", length, "launched %.1f us, as a graph %.1f us" % tuple(out), flush=True)
