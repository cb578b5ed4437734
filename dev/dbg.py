import sys, torch, copy
sys.path.insert(0, ".")
from tests.kernels import test_one_token as T
from gpt2.kernels import one_token as m
from gpt2.config.model import SIZES
for warps, layers, extra in ((16, 1, ""), (16, 2, ""), (16, 24, ""), (16, 24, "late"), (8, 24, ""), (16, 24, "fence")):
    shape = SIZES["gpt2-medium"] | {"n_layer": layers}
    m.WARPS = warps; m._kernel.cache_clear()
    src = m.SOURCES[1] if not hasattr(m, "kept") else m.kept; m.kept = src
    s = src.read_text()
    if extra == "late": s = s.replace("    if (AHEAD == ALL) t.has_read(pieces());\n", "").replace("    if (AHEAD < ALL) t.has_read(pieces());\n", "    t.has_read(pieces());\n")
    if extra == "fence": s = s.replace("    __syncwarp();\n    if (lane < count) barrier_arrive", "    __threadfence_block();\n    __syncwarp();\n    if (lane < count) barrier_arrive")
    import pathlib; p = pathlib.Path("/tmp/dbg.cu"); p.write_text(s); m.SOURCES[1] = p
    model = T.some_model(0.02, shape, torch.bfloat16).cuda()
    texts = T.Texts(model)
    one = m.OneToken(model, texts.caches[1])
    with torch.inference_mode():
        for length in (0, 0, 3):
            texts.begin(length)
            w = T.few_token_pass.next_logits(texts.wide, texts.token[:, None], texts.caches[0])
            f = one.next_logits(texts.token, choose=False).float()
            k = (texts.caches[1].keys[:, 0, :, length].float() - texts.caches[0].keys[:, 0, :, length])
            r = k.norm(dim=(1, 2)) / texts.caches[0].keys[:, 0, :, length].norm(dim=(1, 2))
            bad = (k.abs() > 0.05).nonzero()[:6].tolist()
            print(warps, layers, extra, "length", length, "logits %.5f" % ((f - w).norm() / w.norm()).item(), "keys", " ".join(f"{x:.4f}" for x in r.tolist()[:24]), bad, flush=True)
