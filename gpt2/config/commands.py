"""Options of the commands other than `gpt2 train` and `gpt2 finetune`."""

from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import UserError
from .options import at_least, at_most, check_seed, option, resolve
from .train import PLUGIN_HELP, TrainConfig


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """All options of `gpt2 prepare`."""

    source: str = option(
        "fineweb-edu",
        "fineweb-edu (its sample-10BT), fineweb-edu/sample-100BT, fineweb-edu/sample-350BT, "
        "fineweb-edu/default (all of it); hf:OWNER/NAME[@REVISION][/FOLDER], the parquet or .jsonl "
        "files of a dataset on the Hugging Face Hub; stdlib; or a file, folder or glob of "
        ".txt, .jsonl (also .gz, .xz, .zst) and .parquet",
    )
    out_dir: str = option("", "folder for the shards; empty: fineweb, or data/<name of the source>")
    keep_downloads: bool = option(False, "leave downloaded files in <out_dir>/downloads")
    dry_run: bool = option(False, "estimate tokens, bytes and minutes, and do nothing")
    shard_tokens: int = option(100_000_000, "tokens per shard")
    num_workers: int = option(0, "threads that tokenise; 0: one per core, at most 16")
    tokenizer: str = option(
        "auto",
        "GPT-2's, by gigatoken or tiktoken, which make equal shards (auto: gigatoken if "
        "installed); or your own: a tokenizer.json of byte-level BPE, or a folder with one",
    )
    max_shards: int = option(
        0, "stop after this many shards (of this worker), validation included; 0: no limit"
    )
    max_tokens: int = option(
        0, "stop after this many tokens, rounded up to whole shards (two or more); 0: no limit"
    )
    max_document_mb: int = option(
        50, "leave out documents of more than this many MB (a line of .jsonl, decompressed)"
    )
    worker: str = option("1/1", "which of several machines this is: 3/16 is the third of sixteen")

    def __post_init__(self) -> None:
        at_least(100, shard_tokens=self.shard_tokens)
        if self.shard_tokens > 10**9:
            raise UserError(f"shard_tokens={self.shard_tokens}: use 1000000000 or fewer")
        at_least(0, num_workers=self.num_workers, max_shards=self.max_shards)
        at_least(0, max_tokens=self.max_tokens)
        at_least(1, max_document_mb=self.max_document_mb)
        at_most(2000, max_document_mb=self.max_document_mb)
        at_most(1024, num_workers=self.num_workers)
        if self.max_shards == 1:
            raise UserError("max_shards=1 would leave no training text; use 2 or more")

    @property
    def shard_limit(self) -> int:
        """Shards after which to stop, by max_shards and max_tokens; 0: no limit."""
        return min(filter(None, (self.max_shards, self.shards_of_tokens)), default=0)

    @property
    def shards_of_tokens(self) -> int:
        """The whole shards that max_tokens means; 0: no limit."""
        return self.max_tokens and max(2, -(-self.max_tokens // self.shard_tokens))


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """All options of `gpt2 shards show`."""

    doc: int = option(0, "number of the document, from 0; in a folder: among its training shards")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """All options of `gpt2 export`."""

    to: str = option(
        "hf",
        "hf: a folder in Hugging Face's format, which vLLM reads too; gguf: a file for llama.cpp "
        "and Ollama, which a name that ends in .gguf means in any case",
        ("hf", "gguf"),
        alias="format",
    )
    dtype: str = option(
        "float32",
        "of the weights in the file; bfloat16 and float16 take half the room and round",
        ("float32", "bfloat16", "float16"),
    )
    plugin: str = option("", PLUGIN_HELP)


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """All options of `gpt2 average`."""

    last: int = option(8, "number of newest saved states to average; a run keeps --keep_last")
    out: str = option("", "checkpoint to write; empty: mean.pt in the folder of the run")
    plugin: str = option("", PLUGIN_HELP)

    def __post_init__(self) -> None:
        at_least(1, last=self.last)


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """All options of `gpt2 plot`."""

    out: str = option("", "picture to write; empty: loss.png in the folder of the run")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """All options of `gpt2 compare`."""

    out: str = option("compare.png", "picture to write: loss by step, tokens and seconds")


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """All options of `gpt2 push`."""

    private: bool = option(False, "make a private repository, if it is new")
    plugin: str = option("", PLUGIN_HELP)


@dataclass(frozen=True, kw_only=True)
class WritingConfig:
    """Options of `gpt2 sample` and `gpt2 chat`."""

    max_new_tokens: int = option(100, "tokens to write after the prompt")
    temperature: float = option(
        0.8, "0: always the likeliest token; 1: the model's own probabilities"
    )
    top_k: int = option(50, "sample from this many likeliest tokens; 0: all")
    top_p: float = option(1.0, "sample from the likeliest tokens that sum to this probability")
    min_p: float = option(
        0.0, "drop tokens with less than this share of the likeliest token's probability"
    )
    repetition_penalty: float = option(1.0, "above 1: tokens that have occurred become less likely")
    seed: int = option(-1, "equal seeds write equal texts; -1: a new seed every time")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = option(
        "float32",
        "of the weights; bfloat16 is faster on a GPU, and less precise",
        ("float32", "bfloat16"),
    )
    plugin: str = option("", PLUGIN_HELP)

    def __post_init__(self) -> None:
        if self.seed != -1:
            check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class SampleConfig(WritingConfig):
    """All options of `gpt2 sample`."""

    prompt: str = option(
        "", "text to continue; --prompt= begins a new document; left out: ask again and again"
    )
    stop: str = option("", "end before this string; empty: after max_new_tokens")
    num_samples: int = option(1, "number of texts to write")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, num_samples=self.num_samples)


@dataclass(frozen=True, kw_only=True)
class ChatConfig(WritingConfig):
    """All options of `gpt2 chat`."""

    max_new_tokens: int = option(256, "most tokens of an answer, and at most half of the context")
    system: str = option("", "system message")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """All options of `gpt2 serve`."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = option(8000, "port to listen on; 0: any free one")
    slots: int = option(32, "texts generated at a time; others wait for a free slot")
    max_queue: int = option(256, "texts that may wait; further ones are refused (429)")
    max_connections: int = option(1000, "connections at a time, idle ones of browsers included")
    max_new_tokens: int = option(0, "limit of new tokens per text; 0: what fits into the context")
    name: str = option("", "name of the model for clients; empty: name of the file or folder")
    chat: str = option(
        "auto",
        "is the model trained on conversations? auto: as the config.toml beside it says",
        ("auto", "True", "False"),
    )
    api_key: str = option(
        "", "key that clients must send; empty: the environment variable GPT2_API_KEY, or no key"
    )
    allowed_hosts: str = option(
        "", "comma-separated host names for browsers, besides localhost and IP addresses"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = option(
        "auto",
        "of the weights; auto: bfloat16 on a GPU that has it, else float32",
        ("auto", "float32", "bfloat16"),
    )
    plugin: str = option("", PLUGIN_HELP)

    def __post_init__(self) -> None:
        at_least(0, port=self.port, max_queue=self.max_queue, max_new_tokens=self.max_new_tokens)
        at_least(1, slots=self.slots, max_connections=self.max_connections)
        at_most(4096, slots=self.slots)
        at_most(10**6, max_queue=self.max_queue, max_connections=self.max_connections)
        if self.port > 65535:
            raise UserError(f"port={self.port}: use 1 to 65535, or 0 for any free one")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """All options of `gpt2 inspect`."""

    file: str = option(
        "",
        "a file with the text, instead of an argument; UTF-8; one line break at its end is no text",
    )
    out: str = option("inspect.html", "HTML page to write; empty (--out=): only print the table")
    top: int = option(10, "likeliest tokens to show at each position")
    special: bool = option(
        False, "read a literal <|endoftext|> as the token between documents instead of text"
    )
    patch: str = option(
        "", "a second text of as many tokens: shows where the difference moves the prediction"
    )
    patch_token: str = option(
        "", "instead of --patch=, one other token: 4: Rome puts ' Rome' in the place of token 4"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    plugin: str = option("", PLUGIN_HELP)

    def __post_init__(self) -> None:
        at_least(1, top=self.top)
        if self.patch and self.patch_token:
            raise UserError("give --patch= or --patch_token=, not both")
        if self.top > 100:
            raise UserError(f"top={self.top}: use 100 or fewer")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(TrainConfig):
    """All options of `gpt2 profile`: those of `gpt2 train`, and one more."""

    BEGINS_A_RUN: ClassVar[bool] = False
    DAILY: ClassVar[tuple[str, ...]] = (*TrainConfig.DAILY, "trace")
    HELP_END: ClassVar[str] = """A step is one micro-batch, unless --grad_accum_steps= or
--total_batch_tokens= is given.

example:
  gpt2 profile --batch_size=64 --grad_accum_steps=1"""

    trace: str = option("trace.json.gz", "file for the Chrome trace")

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        if not (self.data.grad_accum_steps or self.data.total_batch_tokens):
            # every micro-batch is alike, and 524,288 tokens a step take minutes on a CPU
            resolve(self, data=replace(self.data, grad_accum_steps=1))


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """All options of `gpt2 eval`."""

    data_dir: str = option(
        "",
        "folder of shards for the validation loss, or several: fineweb:0.8,code:0.2; empty, and no "
        "other evaluation asked for: the run's data (config.toml beside the checkpoint)",
        alias="data",
    )
    text: str = option(
        "",
        "report the loss on this .txt, .jsonl (both also .gz, .xz, .zst) or .parquet file",
    )
    eval_tokens: int = option(
        0, "tokens of data_dir and of text to evaluate on; 0: as in the run, or 10,485,760"
    )
    block_size: int = option(
        0,
        "tokens of a window of data_dir and of text; 0: the model's context, which is the most, or "
        "the block_size of the run that trained adapters",
    )
    hellaswag: str = option("", "HellaSwag's items: a .jsonl or .parquet file, or hub")
    lambada: str = option("", "LAMBADA's items: a .jsonl or .parquet file, or hub")
    json: str = option("", "file for the results, as JSON")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = option("auto", "precision of matmuls", ("auto", "float32", "bfloat16", "float16"))
    plugin: str = option("", PLUGIN_HELP)

    def __post_init__(self) -> None:
        at_least(0, eval_tokens=self.eval_tokens, block_size=self.block_size)


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """All options of `gpt2 doctor`."""

    timeout_seconds: float = option(3.0, "how long the Hub may take to answer; 0: do not ask it")

    def __post_init__(self) -> None:
        at_least(0, timeout_seconds=self.timeout_seconds)
        at_most(60, timeout_seconds=self.timeout_seconds)
