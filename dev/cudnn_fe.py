# attention within a window of 128 by cuDNN's frontend: correctness and ms, forward and backward
import torch, cudnn, time
B, H, T, D, W = 32, 6, 2048, 128, 128
print(cudnn.__version__, cudnn.backend_version(), flush=True)
torch.manual_seed(0)
qkv = torch.randn(B, T, 3, H, D, device="cuda").bfloat16()
q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
handle = cudnn.create_handle(); cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
def timed(f, n=20):
    for _ in range(3): f()
    a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2)); torch.cuda.synchronize(); a.record()
    for _ in range(n): f()
    b.record(); torch.cuda.synchronize(); return a.elapsed_time(b) / n
def graphs(left, deterministic=False):
    o = torch.empty(B, T, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    stats = torch.empty(B, H, T, 1, device="cuda", dtype=torch.float32)
    do = torch.randn(B, T, H, D, device="cuda").bfloat16().transpose(1, 2)
    dqkv = torch.empty_like(qkv); dq, dk, dv = (t.transpose(1, 2) for t in dqkv.unbind(2))
    new = lambda: cudnn.pygraph(io_data_type=cudnn.data_type.BFLOAT16, intermediate_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT, handle=handle)
    band = dict(diagonal_alignment=cudnn.diagonal_alignment.TOP_LEFT, diagonal_band_right_bound=0) | ({"diagonal_band_left_bound": left} if left else {})
    g = new(); tq, tk, tv = (g.tensor_like(t) for t in (q, k, v))
    to, ts = g.sdpa(name="f", q=tq, k=tk, v=tv, generate_stats=True, attn_scale=D ** -0.5, **band)
    to.set_output(True).set_dim(list(o.shape)).set_stride(list(o.stride()))
    ts.set_output(True).set_data_type(cudnn.data_type.FLOAT)
    g.build([cudnn.heur_mode.A])
    ws = torch.empty(g.get_workspace_size(), device="cuda", dtype=torch.uint8)
    fwd = lambda: g.execute({tq: q, tk: k, tv: v, to: o, ts: stats}, ws, handle=handle)
    b = new(); bq, bk, bv, bo, bdo, bs = (b.tensor_like(t) for t in (q, k, v, o, do, stats))
    xq, xk, xv = b.sdpa_backward(name="b", q=bq, k=bk, v=bv, o=bo, dO=bdo, stats=bs, attn_scale=D ** -0.5, use_deterministic_algorithm=deterministic, **band)
    for x, t in ((xq, dq), (xk, dk), (xv, dv)): x.set_output(True).set_dim(list(t.shape)).set_stride(list(t.stride()))
    b.build([cudnn.heur_mode.A])
    wb = torch.empty(b.get_workspace_size(), device="cuda", dtype=torch.uint8)
    bwd = lambda: b.execute({bq: q, bk: k, bv: v, bo: o, bdo: do, bs: stats, xq: dq, xk: dk, xv: dv}, wb, handle=handle)
    return fwd, bwd, o, do, (dq, dk, dv), wb.numel() / 2 ** 20
i = torch.arange(T, device="cuda")
for left in (W, None):
    for det in (False, True):
        try:
            t = time.perf_counter(); fwd, bwd, o, do, grads, mib = graphs(left, det); built = time.perf_counter() - t
            fwd(); bwd(); torch.cuda.synchronize()
            error = []
            if left:
                mask = (i[:, None] >= i) & (i[:, None] - i < left)
                leaves = [t[:2].detach().clone().requires_grad_() for t in (q, k, v)]
                y = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=mask); y.backward(do[:2])
                error = [((a[:2].float() - b.float()).norm() / b.float().norm()).item() for a, b in zip((o, *grads), (y, *(l.grad for l in leaves)))]
            print("left", left, "deterministic", det, "forward %.3f ms backward %.3f ms workspace %.0f MiB built in %.1f s" % (timed(fwd), timed(bwd), mib, built), "errors", ["%.4f" % e for e in error], flush=True)
        except Exception as e: print(left, det, type(e), str(e)[:300], flush=True)
