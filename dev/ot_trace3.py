# stamps of globaltimer (ns) by lane 0 of every warp
import statistics, sys, ctypes, pathlib
from gpt2.kernels import one_token as m
SIZE = sys.argv[1] if len(sys.argv) > 1 else "gpt2"
LENGTH = int(sys.argv[2]) if len(sys.argv) > 2 else 500
s = m.SOURCES[1].read_text()
def put(old, new, times=1):
    global s
    assert s.count(old) == times, (s.count(old), old)
    s = s.replace(old, new)
put("  u32* passes;  // counted\n", "  u32* passes;  // counted\n  long long* trace;\n")
put("  u32 turn;  // parity of the times that the ring was read\n", "  u32 turn;  // parity of the times that the ring was read\n  int stamps;\n")
put("// A thread that computes.\n", "__device__ long long global_ns() { long long t; asm volatile(\"mov.u64 %0, %globaltimer;\" : \"=l\"(t) :: \"memory\"); return t; }\n#define STAMP(t) if (t.lane == 0) t.net.trace[(blockIdx.x * WARPS + t.warp) * 512 + t.stamps++] = global_ns()\n// A thread that computes.\n")
put("passes * (2 * LAYERS + 2), 0, 0};", "passes * (2 * LAYERS + 2), 0, 0, 0};")
put("  if (waits) receive_x(t, x);\n", "  STAMP(t);\n  if (waits) receive_x(t, x);\n  STAMP(t);\n")
put("  weights.template multiply<4>(split, t.s.sums[t.warp]);\n  meet();\n", "  weights.template multiply<4>(split, t.s.sums[t.warp]);\n  STAMP(t);\n  meet();\n  STAMP(t);\n")
put("      norm_and_multiply<true>(t, x, small, net.hidden, l.fc_bias, true);\n", "      norm_and_multiply<true>(t, x, small, net.hidden, l.fc_bias, true);\n      STAMP(t);\n")
put("      norm_and_multiply<false>(t, x, small, net.qkv, l.qkv_bias, half > 0);\n", "      norm_and_multiply<false>(t, x, small, net.qkv, l.qkv_bias, half > 0);\n      STAMP(t);\n")
put("  t.wait(2 * pieces);\n", "  t.wait(2 * pieces);\n  STAMP(t);\n")
put("  meet();\n  int lane = t.lane % LANES;\n", "  meet();\n  STAMP(t);\n  int lane = t.lane % LANES;\n")
put("  mix.join_groups();\n", "  STAMP(t);\n  mix.join_groups();\n")
put("  meet();\n  if (t.index < D / 2) {", "  STAMP(t);\n  meet();\n  STAMP(t);\n  if (t.index < D / 2) {")
put("      if (share.exists()) attend(t, l, share, length);\n", "      if (share.exists()) attend(t, l, share, length);\n      STAMP(t);\n")
put("      float2 v[PAIRS];\n      receive_attention(t, v);\n", "      float2 v[PAIRS];\n      STAMP(t);\n      receive_attention(t, v);\n      STAMP(t);\n")
put("      float2 v[2 * WINDOWS];\n", "      float2 v[2 * WINDOWS];\n      STAMP(t);\n")
put("      for (int i = 0; i < 2 * WINDOWS; i++) split.write(", "      STAMP(t);\n      for (int i = 0; i < 2 * WINDOWS; i++) split.write(")
put("  weights.template multiply<2>(split, t.s.added[t.warp]);\n  meet();\n", "  weights.template multiply<2>(split, t.s.added[t.warp]);\n  STAMP(t);\n  meet();\n  STAMP(t);\n")
put("      multiply_and_add(t, weights, split, small.added);\n", "      multiply_and_add(t, weights, split, small.added);\n      STAMP(t);\n", 2)
p = pathlib.Path("/tmp/traced.cu"); p.write_text(s)
m.SOURCES[1] = p
if SIZE == "write": sys.exit()
import torch
from gpt2.config.model import SIZES, GPT2Config
from gpt2.model.gpt import GPT
m.POINTERS = (*m.POINTERS, "trace")
class Network(ctypes.Structure):
    _fields_ = ([(n, ctypes.c_void_p) for n in m.POINTERS] + [(n, ctypes.c_int) for n in ("vocabulary", "capacity", "chooses")] + [("eps", ctypes.c_float)])
B = torch.cuda.get_device_properties(0).multi_processor_count
W = 12
trace = torch.zeros(B * W * 512, dtype=torch.int64, device="cuda")
m.Network = lambda **k: Network(**k, trace=trace.data_ptr())
torch.manual_seed(0)
with torch.inference_mode():
    with torch.device("cuda"): model = GPT(GPT2Config(**SIZES[SIZE])).eval().bfloat16()
    cache = model.new_cache(1, torch.bfloat16, 1024); cache.lengths = torch.tensor([LENGTH], device="cuda")
    token = torch.tensor([7], device="cuda")
    one = m.OneToken(model, cache)
    for _ in range(20): one.next_logits(token, choose=True)
    torch.cuda.synchronize()
    t = trace.view(B, W, 512).cpu()
attending = "weights x product met qkv pieces q loop join4 met attend weights attn product met proj weights x product met fc weights hidden product met out".split()
others = attending[:5] + ["attend"] + attending[11:]
H = SIZES[SIZE]["n_head"] * 4
for layer in (5, 8):
    zero = t[0, 0, layer * len(attending)].item()
    for block in (5, 17, 46, 60, 131):
        names = attending if block < H else others
        P = len(names)
        print("layer", layer, "block", block)
        for i, name in enumerate(names):
            print(f"  {name:8s}", *(f"{x - zero:6d}" for x in t[block, :, layer * P + i].tolist()))
