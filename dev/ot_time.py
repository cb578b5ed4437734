# a token as one kernel, and as the few-kernel pass with its argmax, as CUDA graphs
import sys, torch
from gpt2.kernels import one_token as m
from gpt2.generate import few_token_pass as f
from gpt2.config.model import SIZES, GPT2Config
from gpt2.model.gpt import GPT

for size in sys.argv[1:] or ["gpt2"]:
    with torch.inference_mode():
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = GPT(GPT2Config(**SIZES[size])).eval().bfloat16()
        cache = model.new_cache(1, torch.bfloat16, 1024)
        cache.lengths = torch.tensor([500], device="cuda")
        token = torch.tensor([7], device="cuda")
        one = m.OneToken(model, cache)

        def few():
            cache.length = 1000
            token.copy_(f.next_logits(model, token[:, None], cache).argmax(-1))

        graphs = []
        for step in (lambda: one.next_logits(token, choose=True), few):
            step()
            torch.cuda.synchronize()
            g = torch.cuda.CUDAGraph()
            with torch.cuda.graph(g):
                step()
            graphs.append(g)
        for length in (10, 500, 900):
            out = []
            for g in graphs:
                best = []
                for _ in range(3):
                    cache.lengths.fill_(length)
                    torch.cuda.synchronize()
                    a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    a.record()
                    for _ in range(100):
                        g.replay()
                    b.record()
                    torch.cuda.synchronize()
                    best.append(a.elapsed_time(b) * 10)
                out.append(sorted(best)[1])
            print(
                size,
                "at",
                length,
                "one kernel %.1f us, few kernels %.1f us" % tuple(out),
                flush=True,
            )
