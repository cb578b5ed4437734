# tiles of _gradient_fp8, ms
import torch, triton
from gpt2.kernels import triton_training as t
def run(rows, padded, vocab, cap, raises, two):
    logits = torch.randn(rows, padded, device="cuda").bfloat16()
    targets = torch.randint(vocab, (rows,), device="cuda")
    raised = torch.randn(vocab, device="cuda") if raises else None
    later = (targets.roll(1), torch.tensor(0.3, device="cuda")) if two else (None, None)
    for tall, wide, warps in ((32, 128, 4), (64, 128, 8), (128, 128, 8), (64, 64, 4), (64, 128, 4), (128, 64, 8), (64, 256, 8)):
        t.TALL, t.WIDE, t.TILE_WARPS = tall, wide, warps
        if rows % tall or padded % wide: continue
        from torch.profiler import profile, ProfilerActivity
        for _ in range(3): t.cross_entropy_fp8(logits, targets, vocab, cap, raised, *later)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            for _ in range(10): t.cross_entropy_fp8(logits, targets, vocab, cap, raised, *later)
            torch.cuda.synchronize()
        for e in p.key_averages():
            if e.key.startswith(("_gradient", "_cross")): print(rows, padded, (tall, wide, warps), e.key, f"{e.device_time/1e3:.3f} ms", flush=True)
run(16384, 16768, 16768, 15.0, True, True)
run(16384, 50304, 50257, 0.0, False, False)
