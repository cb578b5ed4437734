# where the time of a call of 256 tokens goes
import time, torch, collections
from torch.profiler import profile, ProfilerActivity
from gpt2.config.model import SIZES, GPT2Config
from gpt2.model.gpt import GPT
from gpt2.generate.sampling import Sampling
from gpt2.generate.stream import decoder_for, generate
torch.manual_seed(0)
with torch.device("cuda"): model = GPT(GPT2Config(**SIZES["gpt2"])).eval().bfloat16()
prompts = [torch.randint(50257, (128,)).tolist()]
d = decoder_for(model, prompts, 256, Sampling(temperature=0.0))
print(type(d.forward.one_kernel))
for n in (1, 2, 16, 128, 256, 256):
    best = []
    for _ in range(3):
        torch.cuda.synchronize(); t = time.perf_counter(); generate(model, prompts, n, temperature=0, decoder=d); best.append((time.perf_counter() - t) * 1e3)
    print(n, "tokens", " ".join(f"{b:.2f}" for b in best), "ms", flush=True)
g = d.graph
torch.inference_mode().__enter__()
for n in (100,):
    d.forward.cache.lengths.fill_(200); torch.cuda.synchronize(); t = time.perf_counter()
    for _ in range(n): g.replay()
    launched = time.perf_counter() - t; torch.cuda.synchronize(); print("replays alone: CPU %.1f us, all %.1f us" % (launched / n * 1e6, (time.perf_counter() - t) / n * 1e6))
with profile(activities=[ProfilerActivity.CUDA]) as p:
    generate(model, prompts, 40, temperature=0, decoder=d); torch.cuda.synchronize()
ev = sorted([e for e in p.events() if e.device_type.name == "CUDA"], key=lambda e: e.time_range.start)
start = ev[0].time_range.start
for e in ev[-60:]: print(f"{e.time_range.start - start:9.1f} +{e.time_range.end - e.time_range.start:7.1f} {e.name[:60]}")
print(len(ev), "events; before the first token", sum(1 for e in ev if e.name != "one_token"))
