"""What options are called elsewhere, in nanoGPT, build-nanogpt and llm.c above all."""

# word -> its names here; the first that a command has is meant.
SYNONYMS = {
    "lr": ("learning_rate",),
    "max_lr": ("learning_rate",),
    "min_lr": ("min_lr_ratio",),
    "learning_rate_decay_frac": ("min_lr_ratio",),
    "decay_lr": ("schedule",),
    "lr_decay_iters": ("max_steps",),
    "warmup_iters": ("warmup_steps",),
    "model": ("size", "init"),
    "model_size": ("size",),
    "checkpoint": ("init",),
    "init_from": ("init",),
    "epochs": ("max_steps",),
    "num_epochs": ("epochs", "max_steps"),
    "context": ("block_size",),
    "context_length": ("block_size",),
    "seq_len": ("block_size",),
    "sequence_length": ("block_size",),
    "max_length": ("block_size", "max_new_tokens", "max_tokens"),
    "steps": ("max_steps",),
    "iters": ("max_steps",),
    "max_iters": ("max_steps",),
    "out_dir": ("out",),
    "num_iterations": ("max_steps",),
    "accum": ("grad_accum_steps",),
    "gradient_accumulation_steps": ("grad_accum_steps",),
    "bs": ("batch_size",),
    "total_batch_size": ("total_batch_tokens",),
    "output": ("out_dir", "out"),
    "output_dir": ("out_dir",),
    "always_save_checkpoint": ("save_every",),
    "dataset": ("data_dir",),
    "input_bin": ("data_dir",),
    "eval_interval": ("eval_every",),
    "eval_iters": ("eval_tokens",),
    "val_loss_every": ("eval_every",),
    "sample_every": ("sample_prompt",),
    "log_interval": ("log_every",),
    "wandb": ("log_to",),
    "wandb_log": ("log_to",),
    "wandb_project": ("log_to",),
    "wandb_run_name": ("run_name",),
    "layers": ("n_layer",),
    "heads": ("n_head",),
    "precision": ("dtype",),
    "compile": ("compile_model",),
    "use_compile": ("compile_model",),
    "start": ("prompt",),
    "temp": ("temperature",),
    "max_tokens": ("max_new_tokens", "eval_tokens"),
    "length": ("max_new_tokens",),
}
NOTES = {  # word of SYNONYMS -> where its value here is another
    "min_lr": "a share of learning_rate, as 0.1",
    "decay_lr": "how it decays; --min_lr_ratio=1 keeps it constant",
    "lr_decay_iters": "the learning rate decays until the last step",
    "init_from": "weights to begin with; a run in --out_dir= goes on by itself",
    "total_batch_size": "tokens of a step",
    "always_save_checkpoint": "the last model and the best are kept in any case",
    "eval_iters": "tokens in place of batches",
    "eval_interval": "in steps",
    "wandb": "--log_to=wandb",
    "wandb_log": "--log_to=wandb",
    "wandb_project": "--log_to=wandb, with the project in the variable WANDB_PROJECT",
    "wandb_run_name": "beside --log_to=wandb",
}
INSTEAD = {  # word without an option of its meaning -> advice
    "eval_only": "write: gpt2 eval CHECKPOINT",
    "backend": "leave it out: GPUs talk by nccl, and CPUs by gloo",
    "compile": "leave it out: only training compiles",
}
# What a checkpoint, which has no dashes here, is called; with out_dir nanoGPT means a folder of it.
CHECKPOINTS = ("--model", "--checkpoint", "--init", "--init_from", "--out_dir")


def meaning(word: str, names: set[str]) -> tuple[str, str] | None:
    """What somebody means who knows an option from elsewhere.

    Args:
        word: the unknown option, without dashes.
        names: the options of the command, without dashes.

    Returns:
        (option that is meant or "", note or advice); None for a word that is no option elsewhere.
    """
    meant = next((ours for ours in SYNONYMS.get(word, ()) if ours in names), "")
    if meant:
        return meant, NOTES.get(word, "")
    known = word in SYNONYMS or word in INSTEAD
    return ("", INSTEAD.get(word, "")) if known else None
