"""What a run on a GPU says about its kernels."""

from ..config.train import BatchPlan, OptimOptions
from ..distributed.runtime import Runtime
from ..kernels.attention import describe_kernel
from ..kernels.linear import describe_path, obstacle_of
from ..kernels.packed_attention import describe_packing
from ..kernels.window_attention import describe_windows
from ..model.gpt import GPT, LanguageModel


def kernel_notes(
    model: LanguageModel, plan: BatchPlan, optim: OptimOptions, rt: Runtime
) -> list[str]:
    """By which kernels a GPU computes the linear layers and attention, a sentence each.

    Args:
        model: to be trained.
        plan: of its batches.
        optim: whether windows grow.
        rt: this process.
    """
    shape, on, tokens = model.config, (rt.device, rt.dtype), plan.batch_size * plan.block_size
    notes = [describe_path(model, *on, tokens, shape.dropout), describe_kernel(shape, *on)]
    if isinstance(model, GPT) and not shape.dropout and not obstacle_of(model, *on, tokens):
        notes[-1] += describe_packing(rt.device, shape.n_embd // shape.n_head)
    if getattr(shape, "window_pattern", ""):
        alone = not (optim.window_warmup or getattr(shape, "document_mask", False))
        notes.append(describe_windows(rt.device, shape.n_embd // shape.n_head, rt.dtype, alone))
    return notes
