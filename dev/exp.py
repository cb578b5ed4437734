# variants of one_token.cu by replaced text, us per token
import sys, pathlib
from gpt2.kernels import one_token as m
CHECK = sys.argv[1:] == ["check"]
src = m.SOURCES[1].read_text()
COPY = "    copy_begin(s.ring + stage * STAGE, weight + (long long)(rows.first + row) * width, 2 * width * count, &s.arrived[stage]);\n"
no_stream = (COPY, "    barrier_arrive(&s.arrived[stage]);\n")
no_wait = ("  } while (!ready);\n  for (int i = 0; i < N; i++) v[i]", "  } while (false);\n  for (int i = 0; i < N; i++) v[i]")
no_wait2 = ("    } while (!ready);\n    float top", "    } while (false);\n    float top")
no_load = ("    for (int i = 0; i < N; i++) got[i] = load_two_words(at(i));\n", "    for (int i = 0; i < N; i++) got[i] = make_ulonglong2(threadIdx.x, i);\n")
no_load2 = ("got[share] = load_packet(t.net.mixed + share * (C / 2) + t.pair(i));", "got[share] = make_uint4(threadIdx.x, share, share, i);")
shares = lambda n: ("constexpr int SHARES = 4;", f"constexpr int SHARES = {n};")
rolled = [("#pragma unroll\n    for (int i = 0; i < WARPS; i++) y +=", "    for (int i = 0; i < WARPS; i++) y +="), ("#pragma unroll\n    for (int i = 0; i < WARPS; i++) total", "    for (int i = 0; i < WARPS; i++) total")]
variants = {
 "base": [], "rolled": rolled, "6 warps": [], "4 warps": [], "3 shares": [shares(3)], "2 shares": [shares(2)],
 "no stream": [no_stream], "no load, no stream": [no_wait, no_wait2, no_load, no_load2, no_stream], "base again": [],
}
def set_warps(name):
    n = int(name.split()[0]) if name.endswith("warps") else 0
    text = constants_source.replace("warps = max", f"warps = {n} if {n} else max")
    exec(text, m.__dict__)
import inspect
constants_source = inspect.getsource(m.constants)
def text(changes):
    s = src
    for old, new in changes:
        assert s.count(old) == 1 or not old, (s.count(old), old)
        if old: s = s.replace(old, new)
    return s
p = pathlib.Path("/tmp/variant.cu")
constants = m.constants
if CHECK:
    from gpt2.kernels import nvrtc
    import ctypes
    lib = ctypes.CDLL("libnvrtc.so.13")
    for n, a in nvrtc.NVRTC_TYPES.items(): getattr(lib, n).argtypes = a
    nvrtc._libraries = lambda: (lib, None)
    from gpt2.config.model import SIZES, GPT2Config
    for name, changes in variants.items():
        p.write_text(text(changes)); m.SOURCES[1] = p
        set_warps(name)
        print(name, m.constants(GPT2Config(**SIZES["gpt2"]), 132)["THREADS"], len(nvrtc.compiled(m.SOURCES, m.constants(GPT2Config(**SIZES["gpt2"]), 132), "sm_90a")))
    sys.exit()
import torch
from gpt2.config.model import SIZES, GPT2Config
from gpt2.model.gpt import GPT
torch.manual_seed(0)
with torch.inference_mode():
    with torch.device("cuda"): model = GPT(GPT2Config(**SIZES["gpt2"])).eval().bfloat16()
    cache = model.new_cache(1, torch.bfloat16, 1024); cache.lengths = torch.tensor([500], device="cuda")
    token = torch.tensor([7], device="cuda")
    for name, changes in variants.items():
        p.write_text(text(changes)); m.SOURCES[1] = p; m._kernel.cache_clear()
        m.SHARES = int(name[0]) if name.endswith("shares") else 4
        set_warps(name)
        one = m.OneToken(model, cache)
        one.next_logits(token, choose=True); torch.cuda.synchronize()
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g): one.next_logits(token, choose=True)
        out = []
        for length in (10, 500, 900):
            best = []
            for _ in range(5):
                token.fill_(7); cache.lengths.fill_(length); torch.cuda.synchronize()
                a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2)); a.record()
                for _ in range(60): g.replay()
                b.record(); torch.cuda.synchronize(); best.append(a.elapsed_time(b) * 1000 / 60)
            out.append(sorted(best)[2])
        print(f"{name:25s}", *(f"{x:7.1f}" for x in out), flush=True)
