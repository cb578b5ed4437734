# stamps of globaltimer (ns) at each phase of each block; which block is last, and how long each phase takes
import statistics, sys, torch, ctypes
from gpt2.kernels import one_token as m, nvrtc
from gpt2.config.model import SIZES, GPT2Config
from gpt2.model.gpt import GPT
s = m.SOURCES[1].read_text()
def put(old, new, count=1):
    global s
    assert s.count(old) >= 1, old
    s = s.replace(old, new)
put("  u32* passes;  // counted\n", "  u32* passes;  // counted\n  long long* trace;\n")
put("// A thread that computes.\n", "__device__ long long global_ns() { long long t; asm volatile(\"mov.u64 %0, %globaltimer;\" : \"=l\"(t)); return t; }\n#define STAMP(t) if (t.index == 0) t.net.trace[blockIdx.x * 256 + stamps++] = global_ns()\n// A thread that computes.\n")
put("  Rows rows = rows_of(C);\n  Share share(length);", "  int stamps = 0;\n  Rows rows = rows_of(C);\n  Share share(length);")
put("    if (share.exists()) load_past(t, l, share, past);", "    STAMP(t);\n    if (share.exists()) load_past(t, l, share, past);")
put("      products<false>(t, bias, net.qkv);\n", "      STAMP(t);\n      products<false>(t, bias, net.qkv);\n      STAMP(t);\n")
put("    if (share.exists()) attend(t, l, share, length, past);\n", "    if (share.exists()) attend(t, l, share, length, past);\n    STAMP(t);\n")
put("      join_shares(t, v);\n", "      join_shares(t, v);\n      STAMP(t);\n")
put("      add_products<C>(t, v, bias);\n", "      add_products<C>(t, v, bias);\n      STAMP(t);\n")
put("      products<true>(t, bias, net.hidden);\n", "      STAMP(t);\n      products<true>(t, bias, net.hidden);\n      STAMP(t);\n")
put("      add_products<4 * C>(t, v, bias);\n", "      STAMP(t);\n      add_products<4 * C>(t, v, bias);\n      STAMP(t);\n")
put("  head(t);\n", "  STAMP(t);\n  head(t);\n  STAMP(t);\n")
import pathlib
p = pathlib.Path("/tmp/traced.cu"); p.write_text(s)
m.SOURCES[1] = p
m.POINTERS = (*m.POINTERS, "trace")
class Network(ctypes.Structure):
    _fields_ = ([(n, ctypes.c_void_p) for n in m.POINTERS] + [(n, ctypes.c_int) for n in ("vocabulary", "capacity", "chooses")] + [("eps", ctypes.c_float)])
trace = torch.zeros(132 * 256, dtype=torch.int64, device="cuda")
m.Network = lambda **k: Network(**k, trace=trace.data_ptr())
torch.manual_seed(0)
with torch.inference_mode():
    with torch.device("cuda"): model = GPT(GPT2Config(**SIZES["gpt2"])).eval().bfloat16()
    cache = model.new_cache(1, torch.bfloat16, 1024); cache.lengths = torch.tensor([500], device="cuda")
    token = torch.tensor([7], device="cuda")
    one = m.OneToken(model, cache)
    for _ in range(20): one.next_logits(token, choose=True)
    torch.cuda.synchronize()
    t = trace.view(132, 256).cpu()
names = "x+norm qkv attend join proj x+norm fc hidden out".split()
P = 10
n = 12 * P
for block in (0, 1, 5, 47, 60, 131):
    r = t[block].tolist()
    print("block", block, *(f"{name} {statistics.median(r[l*P+i+1]-r[l*P+i] for l in range(1, 11)):.0f}" for i, name in enumerate(names)), "head", r[n+1]-r[n])
for layer in (3, 7):
    for i, name in enumerate(["start", *names]):
        c = t[:132, layer * P + i]; first = t[:132, layer * P].min()
        order = c.argsort().tolist()
        print("layer", layer, f"{name:8s} first {c.min()-first} median {c.median()-first} last {c.max()-first} ns, last blocks {order[-5:]}")
print("token", (t[:, n + 1].max() - t[:, 0].min()).item(), "ns, layers", (t[:, n].max() - t[:, 0].min()).item())
