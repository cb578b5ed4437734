import sys, torch, time
from torch.profiler import profile, ProfilerActivity
from gpt2.config.model import SIZES, GPT2Config
from gpt2.model.gpt import GPT
from gpt2.generate.sampling import Sampling
from gpt2.generate.stream import decoder_for
rows = int(sys.argv[1]); dev = sys.argv[2] if len(sys.argv) > 2 else "cuda"
torch.manual_seed(0)
with torch.device(dev): model = GPT(GPT2Config(**SIZES["gpt2"])).eval()
if dev == "cuda": model = model.bfloat16()
prompts = [torch.randint(50257, (128,)).tolist() for _ in range(rows)]
d = decoder_for(model, prompts, 256, Sampling(temperature=0.0))
for name in ("forward", "graph"): print(name, type(getattr(d, name, None)))
for _ in range(2):
    t = time.time(); n = sum(1 for _ in d.write(prompts, 256)); 
    if dev == "cuda": torch.cuda.synchronize()
    print(n, f"{rows*n/(time.time()-t):.0f} tokens/s", flush=True)
if dev == "cuda":
    with torch.inference_mode():
        g = d.graph; torch.cuda.synchronize()
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2)); d.forward.cache.lengths.fill_(256); a.record()
        for _ in range(50): g.replay()
        b.record(); torch.cuda.synchronize(); print("replay", a.elapsed_time(b) / 50, "ms")
        d.forward.cache.lengths.fill_(256); d.forward.cache.length = 256
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            for _ in range(3): d.forward.cache.length = 256; d._recorded_step()
            torch.cuda.synchronize()
    print(p.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=90))
