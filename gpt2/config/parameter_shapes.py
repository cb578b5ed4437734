"""Names and shapes of a network's parameters in closed form, and whether a file fits them.

A file of a stranger may claim a network of any size in a few bytes. These functions compare the
claim with the file before a network is built and before tensors are read. A test compares the
shapes with the networks in `model/`.
"""

from collections.abc import Mapping

from ..errors import UserError
from ..untrusted.display import shown
from .model import GPT2Config
from .registry import own_shapes

LEAST_BYTES = 2  # of a parameter: float16 or bfloat16
GATE_CHANNELS = 12  # of its layer's input, which the gate of an attention head reads

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(config: GPT2Config) -> Shapes:
    """Shape of each parameter of GPT-2 or of the modern network, by its name in the state dict."""
    s, C, V, layers = config.switches(), config.n_embd, config.vocab_size, config.n_layer
    shapes: Shapes = {"transformer.wte.weight": (V, C)}
    if s["positions"] == "learned":
        shapes["transformer.wpe.weight"] = (config.block_size, C)
    for table in range(s["value_embeddings"]):
        shapes[f"transformer.value_tables.{table}.weight"] = (V, C)
    for layer in range(layers):
        block = f"transformer.h.{layer}"
        from_end = min(layer, layers - 1 - layer)
        projects = from_end < s["value_projection"]
        has_values = projects or from_end < s["value_embeddings"]
        gate = (config.n_head, min(GATE_CHANNELS, C))
        shapes |= _norm(f"{block}.ln_1", config) | _norm(f"{block}.ln_2", config)
        shapes |= _linear(f"{block}.attn.c_attn", 3 * C, C, config)
        shapes |= _linear(f"{block}.attn.c_proj", C, C, config)
        shapes |= {f"{block}.attn.value_mix": (2,)} if has_values else {}
        shapes |= {f"{block}.attn.c_value.weight": (C, C)} if projects else {}
        shapes |= {f"{block}.attn.value_gate": gate} if projects else {}
        shapes |= {f"{block}.attn.output_gate": gate} if s["attention_gate"] else {}
        shapes |= {f"{block}.mix": (2,)} if s["skips"] == "unet+input" else {}
        own = own_shapes("mlp", s["mlp"], config)
        if own is not None:
            shapes |= {f"{block}.mlp.own.{name}": shape for name, shape in own.items()}
            continue
        wide = -(-8 * C // 3 // 64) * 64 if s["mlp"] == "swiglu" else 4 * C
        shapes |= _linear(
            f"{block}.mlp.c_fc", 2 * wide if s["mlp"] == "swiglu" else wide, C, config
        )
        shapes |= _linear(f"{block}.mlp.c_proj", C, wide, config)
    shapes |= _norm("transformer.ln_f", config)
    shapes |= {"head.weight": (V, C)} if s["untied_head"] else {}
    return shapes | ({"skip_weights": (layers // 2,)} if s["skips"] != "none" else {})


def _linear(name: str, out: int, width: int, config: GPT2Config) -> Shapes:
    bias = {f"{name}.bias": (out,)} if config.switches()["bias"] else {}
    return {f"{name}.weight": (out, width), **bias}


def _norm(name: str, config: GPT2Config) -> Shapes:
    own = own_shapes("norm", config.switches()["norm"], config)
    if own is not None:
        return {f"{name}.own.{inner}": shape for inner, shape in own.items()}
    if config.switches()["norm"] == "rmsnorm":
        return {}
    bias = {f"{name}.bias": (config.n_embd,)} if config.switches()["bias"] else {}
    return {f"{name}.weight": (config.n_embd,), **bias}


def check_size(config: GPT2Config, held_bytes: int, source: object) -> None:
    """Raises UserError for a config whose network is larger than the file can hold.

    Args:
        config: as the file claims it.
        held_bytes: size of the file or files.
        source: the file, for the error message.
    """
    least = config.least_parameters
    if least * LEAST_BYTES > held_bytes:
        raise UserError(
            f"{source} does not fit the model: its config describes at least {least:,} parameters, "
            f"and it has {held_bytes:,} bytes; use another file"
        )


def check_fit(own: Mapping[str, tuple], found: Mapping[str, tuple], source: object) -> None:
    """Raises UserError for names or shapes that are missing, unexpected or different.

    Args:
        own: shapes of the network's parameters by name.
        found: shapes of the file's tensors by name.
        source: the file, for the error message.
    """
    problems = [f"missing {n}" for n in own if n not in found]
    problems += [f"unexpected {shown(n)}" for n in found if n not in own]
    problems += [
        f"{n} is {shown(tuple(found[n]))} instead of {tuple(own[n])}"
        for n in own
        if n in found and tuple(own[n]) != tuple(found[n])
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{source} does not fit the model: {', '.join(problems[:3])}{more}")
