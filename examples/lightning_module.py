"""A LightningModule with ID3AdamW: the callback sets the number of steps and saves a delta beside each
checkpoint."""

import lightning as L
import tiny
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from id3_optim import ID3AdamW, save_delta
from id3_optim.integrations.groups import fresh_parameters, parameter_groups
from id3_optim.integrations.lightning import ID3Callback


class Classifier(L.LightningModule):
    def __init__(self, source: str, lr: float):
        super().__init__()
        self.lr = lr
        self.model, loading_info = AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=2, output_loading_info=True
        )
        self.fresh = fresh_parameters(self.model, loading_info)
        self.model.train()  # from_pretrained leaves dropout off
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        groups = parameter_groups(self.model, self.fresh)
        return ID3AdamW(groups, lr=self.lr, budget=0.005, max_grad_norm=1.0)


options = tiny.arguments(__doc__)
L.seed_everything(0, verbose=False)
source = options.model or tiny.encoder(options.output / "base")
tokenizer = AutoTokenizer.from_pretrained(source)
collate = DataCollatorWithPadding(tokenizer)
loader = DataLoader(tiny.reviews(tokenizer), batch_size=8, shuffle=True, collate_fn=collate)
module = Classifier(source, lr=1e-2 if options.model is None else 1e-3)
trainer = L.Trainer(
    max_steps=options.steps,
    # The delta's names are those of `module.model`, so that it fits the plain model.
    callbacks=[ID3Callback(submodule="model"), ModelCheckpoint(options.output, every_n_train_steps=20)],
    logger=False,
    enable_progress_bar=False,
)
trainer.fit(module, loader)

optimizer = trainer.optimizers[0]
module.model.save_pretrained(options.output / "tuned")
save_delta(options.output / "delta.safetensors", module.model, optimizer)
tiny.report(optimizer, options.output / "delta.safetensors", module.losses[0], module.losses[-1])
