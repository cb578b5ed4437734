# the kernel is deterministic: the same token a thousand times, bit for bit
import sys, torch
sys.path.insert(0, ".")
from tests.kernels import test_one_token as T
from gpt2.kernels import one_token as m
from gpt2.config.model import SIZES
for size in sys.argv[1:] or SIZES:
    for dtype in (torch.bfloat16, torch.float16):
        model = T.some_model(0.02, SIZES[size], dtype).cuda()
        texts = T.Texts(model); del texts.wide
        one = m.OneToken(model, texts.caches[1])
        with torch.inference_mode():
            for length in (0, 3, 500):
                texts.begin(length)
                kept, wrong = None, torch.zeros((), dtype=torch.int64, device="cuda")
                for i in range(600):
                    texts.caches[1].lengths.fill_(length)
                    logits = one.next_logits(texts.token)
                    kept = logits.clone() if kept is None else kept
                    wrong += (logits.view(torch.int16) != kept.view(torch.int16)).any()
                print(size, dtype, "length", length, "different", wrong.item(), "of 600", flush=True)
        del model, texts, one
