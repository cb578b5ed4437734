#!/usr/bin/env bash
# lightning 2.6.6 with torchdata 0.11.0: a training that is resumed from a checkpoint of an epoch's last step
# leaves out the whole next epoch. `ModelCheckpoint(every_n_train_steps=n)` writes one if n divides the
# epoch, and `save_last` takes it for last.ckpt. The loader is `StatefulDataLoader`, which Lightning saves and
# restores. Its state says that every batch has been read, but not that the epoch is over. Lightning counts
# the epoch as over and begins the next; the loader first ends the old one, which has no batch left. So an
# epoch of zero batches is counted. Nothing warns. Who trains one epoch more from last.ckpt trains nothing,
# and gets exit code 0 and the old weights. A plain `DataLoader` does this right, and so does a checkpoint
# amid an epoch. There it is the plain loader that begins its epoch anew, and Lightning warns of it: it
# advises a loader with a state.
#
# A second gap needs no stateful loader. If `max_steps` ends a run amid an epoch, the default
# `ModelCheckpoint` and `trainer.save_checkpoint` write the epoch down as over. A longer run that resumes leaves
# out its other batches, with no warning at all.
#
# Seen on Python 3.11, torch 2.13.0, GPT-2 of 1 layer, epochs of 6 batches; batches by epoch
#   3 epochs at once: 6, 6, 6
#   2 of 3 epochs, last.ckpt, resumed: StatefulDataLoader 0, DataLoader 6 batches, loss 2.74 and 2.61
#   1 of 3 epochs, step 6, resumed: StatefulDataLoader 0 and 6, DataLoader 6 and 6
#   1 of 3 epochs, default ModelCheckpoint, resumed: StatefulDataLoader 6 and 6
#   4 of 18 steps, default ModelCheckpoint or save_checkpoint, resumed: 0, 6, 6 batches instead of 2, 6, 6
#   4 of 18 steps, every_n_train_steps=2, resumed: 2, 6, 6
# Exit code 0: as described. 1: the behaviour has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy transformers==5.24.0 lightning==2.6.6 torchdata==0.11.0
cat > try.py <<'PY'
import logging
import os
import shutil
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(name).setLevel(logging.ERROR)
import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import GPT2Config, GPT2LMHeadModel

EPOCH, EPOCHS = 6, 3
torch.manual_seed(0)
rows = torch.randint(1, 20, (EPOCH, 16))


class Writer(lightning.LightningModule):
    """A GPT-2 that notes how many batches each epoch has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
        shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 20, "n_positions": 16}
        self.gpt2 = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **shape, **rates))
        self.batches = [0] * EPOCHS

    def training_step(self, batch, _):
        self.batches[self.current_epoch] += 1
        return self.gpt2(batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    @torch.no_grad()
    def loss(self):
        return self.gpt2.eval()(rows, labels=rows).loss.item()


def train(loader, resume=None, saver=None, keep=None, **limit):
    model = Writer()
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=saver is not None,
        callbacks=[saver] if saver else [],
        **limit,
    )
    trainer.fit(model, loader(rows, batch_size=1), ckpt_path=resume)
    if keep:
        trainer.save_checkpoint(keep)
    return model


def saver(**options):
    shutil.rmtree("saved", ignore_errors=True)
    return ModelCheckpoint(dirpath="saved", filename="{step}", **options)


told = []


def resumed(loader, file):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = train(loader, resume=file, max_epochs=EPOCHS)
    told.extend(str(w.message) for w in caught if "resum" in str(w.message).lower())
    return model


warnings.simplefilter("ignore")
good = True
whole = train(StatefulDataLoader, max_epochs=EPOCHS)
print("3 epochs at once:", whole.batches, f"loss {whole.loss():.2f}")
for loader, second, third in ((StatefulDataLoader, 0, 0), (DataLoader, 6, 6)):
    train(loader, saver=saver(every_n_train_steps=3, save_last=True), max_epochs=2)
    last = resumed(loader, "saved/last.ckpt")
    train(loader, saver=saver(every_n_train_steps=3), max_epochs=1)
    step = resumed(loader, "saved/step=6.ckpt")
    train(loader, saver=saver(), max_epochs=1)
    usual = resumed(loader, "saved/step=6.ckpt")
    print(
        f"{loader.__name__}: 2 epochs and last.ckpt {last.batches} loss {last.loss():.2f}, "
        f"1 epoch and step 6 {step.batches}, 1 epoch and default ModelCheckpoint {usual.batches}"
    )
    good &= last.batches == [0, 0, third] and step.batches == [0, second, 6]
    good &= usual.batches == [0, 6, 6]
    good &= (abs(last.loss() - whole.loss()) < 1e-3) == (third == 6)
for loader in (StatefulDataLoader, DataLoader):
    train(loader, saver=saver(), keep="saved/kept.ckpt", max_steps=4)
    usual, kept = (resumed(loader, f"saved/{file}.ckpt").batches for file in ("step=4", "kept"))
    print(f"{loader.__name__}: 4 steps, default ModelCheckpoint {usual}, save_checkpoint {kept}")
    good &= usual == kept == [0, 6, 6]
print("warnings of resuming:", told)
good &= not told
train(StatefulDataLoader, saver=saver(every_n_train_steps=2), max_steps=4)
amid = resumed(StatefulDataLoader, "saved/step=4.ckpt").batches
print("StatefulDataLoader: 4 steps, every_n_train_steps=2", amid)
train(DataLoader, saver=saver(every_n_train_steps=2), max_steps=4)
resumed(DataLoader, "saved/step=4.ckpt")
advice = any("not resumable" in text for text in told)
print("DataLoader: the same, warned:", advice)
raise SystemExit(0 if good and amid == [2, 6, 6] and advice else 1)
PY
venv/bin/python try.py
