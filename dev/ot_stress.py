# the kernel is deterministic: the same token six hundred times, bit for bit, and as the plain pass has it
import sys, torch
sys.path.insert(0, ".")
from tests.kernels import test_one_token as T
from gpt2.kernels import one_token as m
from gpt2.config.model import SIZES, GPT2Config
from gpt2.model.gpt import GPT
for size in sys.argv[1:] or SIZES:
    for dtype, bound in ((torch.bfloat16, 4e-3), (torch.float16, 6e-4)):
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = GPT(GPT2Config(**SIZES[size])).eval()
        with torch.no_grad():
            for p in model.parameters(): p.add_(0.02 * torch.randn_like(p))
        model = model.to(dtype)
        texts = T.Texts(model)
        one = m.OneToken(model, texts.caches[1])
        with torch.inference_mode():
            for length in (0, 3, 500, 1000):
                texts.begin(length)
                wanted = T.few_token_pass.next_logits(texts.wide, texts.token[:, None], texts.caches[0])
                kept, wrong, worst = None, torch.zeros((), dtype=torch.int64, device="cuda"), torch.zeros((), device="cuda")
                for i in range(400):
                    texts.caches[1].lengths.fill_(length)
                    logits = one.next_logits(texts.token)
                    kept = logits.clone() if kept is None else kept
                    wrong += (logits.view(torch.int16) != kept.view(torch.int16)).any()
                    worst = torch.maximum(worst, (logits.float() - wanted).norm() / wanted.norm())
                print(size, dtype, "length", length, "different", wrong.item(), "of 400, worst error %.5f" % worst.item(), "BAD" if worst.item() > bound or wrong.item() else "", flush=True)
        del model, texts, one
