"""Options of the commands that do not train, as `config.py` has those of training."""

from dataclasses import dataclass

from ..errors import UserError
from .options import at_least, check_seed, option
from .train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Everything that `gpt2 prepare` can be told."""

    source: str = option(
        "fineweb-edu",
        "fineweb-edu (its sample-10BT), fineweb-edu/sample-100BT, fineweb-edu/sample-350BT, "
        "fineweb-edu/default (all of it); hf:OWNER/NAME[@REVISION][/FOLDER], the parquet or .jsonl "
        "files of a dataset on the Hugging Face Hub; stdlib; or a file, folder or glob of "
        ".txt, .jsonl (also .gz, .xz, .zst) and .parquet",
    )
    out_dir: str = option("", "folder for the shards; empty: fineweb, or data/<name of the source>")
    keep_downloads: bool = option(False, "leave downloaded files in <out_dir>/downloads")
    dry_run: bool = option(
        False, "say what would be done, in tokens, bytes and minutes; do nothing"
    )
    shard_tokens: int = option(100_000_000, "tokens per shard")
    num_workers: int = option(0, "threads that tokenise; 0: one per core, at most 16")
    tokenizer: str = option(
        "auto", "auto: gigatoken if installed; both make the same shards",
        ("auto", "gigatoken", "tiktoken"),
    )  # fmt: skip
    max_shards: int = option(
        0, "stop after this many shards (of this worker), validation included; 0: no limit"
    )
    max_tokens: int = option(
        0, "stop after this many tokens, rounded up to whole shards (two or more); 0: no limit"
    )
    worker: str = option("1/1", "share of one of several machines: 3/16 is the third of sixteen")

    def __post_init__(self):
        at_least(1, shard_tokens=self.shard_tokens)
        if self.shard_tokens > 10**9:
            raise UserError(f"shard_tokens={self.shard_tokens}: use 1000000000 or fewer")
        at_least(0, num_workers=self.num_workers, max_shards=self.max_shards)
        at_least(0, max_tokens=self.max_tokens)
        if self.max_shards == 1:
            raise UserError("max_shards=1 would leave no training text; use 2 or more")

    @property
    def shard_limit(self) -> int:
        """Shards after which to stop, by max_shards and max_tokens; 0: no limit."""
        by_tokens = self.max_tokens and max(2, -(-self.max_tokens // self.shard_tokens))
        return min(filter(None, (self.max_shards, by_tokens)), default=0)


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Which document `gpt2 shards show` prints."""

    doc: int = option(0, "number of the document, from 0; in a folder: among its training shards")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What `gpt2 export` writes."""

    to: str = option("hf", "layout: hf is Hugging Face's, which others read as well", ("hf",))


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """How `gpt2 push` uploads."""

    private: bool = option(False, "make a new repository that only you can see")


@dataclass(frozen=True, kw_only=True)
class WritingConfig:
    """How text is written."""

    max_new_tokens: int = option(100, "tokens to write after the prompt")
    temperature: float = option(0.8, "0: always the likeliest token; 1: as the model says")
    top_k: int = option(50, "choose among this many likeliest tokens; 0: all")
    top_p: float = option(1.0, "choose among the likeliest tokens that sum to this probability")
    min_p: float = option(0.0, "choose among tokens at least this times as likely as the likeliest")
    repetition_penalty: float = option(1.0, "above 1: tokens that have occurred are less likely")
    seed: int = option(-1, "the same seed writes the same text; -1: another every time")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = option(
        "float32", "of the weights; bfloat16 is faster on a GPU and rounds", ("float32", "bfloat16")
    )

    def __post_init__(self):
        check_seed(max(0, self.seed))


@dataclass(frozen=True, kw_only=True)
class SampleConfig(WritingConfig):
    """Everything that `gpt2 sample` can be told."""

    prompt: str = option("", "text to continue; empty: ask for one again and again")
    stop: str = option("", "end before this string; empty: write max_new_tokens")
    num_samples: int = option(1, "texts to write for the prompt")

    def __post_init__(self):
        super().__post_init__()
        at_least(1, num_samples=self.num_samples)


@dataclass(frozen=True, kw_only=True)
class ChatConfig(WritingConfig):
    """Everything that `gpt2 chat` can be told."""

    max_new_tokens: int = option(256, "tokens of an answer, but no more than half the context")
    system: str = option("", "what the model is told first")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Everything that `gpt2 serve` can be told."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in")
    port: int = option(8000, "port to listen on; 0: any free one")
    slots: int = option(32, "texts written at a time; others wait for their turn")
    max_queue: int = option(256, "texts that may wait; more are refused (429)")
    max_new_tokens: int = option(0, "most new tokens of a text; 0: what the context holds")
    name: str = option("", "of the model, for clients; empty: that of the file or folder")
    chat: str = option(
        "auto", "is the model trained on conversations? auto: as the config.toml beside it says",
        ("auto", "True", "False"),
    )  # fmt: skip
    api_key: str = option(
        "", "what clients must send as their key; empty: the variable GPT2_API_KEY, or no key"
    )
    allowed_hosts: str = option(
        "", "names by which browsers may reach the server, by commas, beside localhost and numbers"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = option(
        "auto", "of the weights; auto: bfloat16 on a GPU that has it, else float32",
        ("auto", "float32", "bfloat16"),
    )  # fmt: skip

    def __post_init__(self):
        at_least(0, port=self.port, max_queue=self.max_queue, max_new_tokens=self.max_new_tokens)
        at_least(1, slots=self.slots)
        if self.port > 65535:
            raise UserError(f"port={self.port}: use 1 to 65535, or 0 for any free one")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Everything that `gpt2 inspect` can be told."""

    file: str = option("", "a file with the text, instead of an argument; UTF-8")
    out: str = option("inspect.html", "page to write; empty (--out=): only the table")
    top: int = option(10, "likeliest tokens to show in each place")
    special: bool = option(
        False, "read a literal <|endoftext|> as the token between documents, not as text"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")

    def __post_init__(self):
        at_least(1, top=self.top)
        if self.top > 100:
            raise UserError(f"top={self.top}: use 100 or fewer")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(TrainConfig):
    """Everything that `gpt2 profile` can be told: the options of `gpt2 train`, and one more."""

    trace: str = option("trace.json.gz", "Chrome trace to write")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Everything that `gpt2 eval` can be told."""

    data_dir: str = option(
        "",
        "folder of shards for the validation loss, or several: fineweb:0.8,code:0.2; empty: if "
        "nothing else is asked for, that of the run (config.toml beside the checkpoint)",
        alias="data",
    )
    text: str = option(
        "",
        "a file of text, .jsonl (both also .gz, .xz, .zst) or .parquet for the loss on it",
    )
    eval_tokens: int = option(0, "tokens of data_dir and of text; 0: as in the run, or 10,485,760")
    hellaswag: str = option("", "HellaSwag's items: a .jsonl or .parquet file, or hub")
    lambada: str = option("", "LAMBADA's items: a .jsonl or .parquet file, or hub")
    json: str = option("", "file for the results")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = option(
        "auto", "precision of the matrix products", ("auto", "float32", "bfloat16", "float16")
    )

    def __post_init__(self):
        at_least(0, eval_tokens=self.eval_tokens)
