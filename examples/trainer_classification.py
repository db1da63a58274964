"""A classifier with transformers.Trainer; the new head is trained whole, outside the budget."""

import tiny
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from id3_optim import save_delta
from id3_optim.integrations.huggingface import ID3Callback, fresh_parameters, id3_optimizer, report_first

options = tiny.arguments(__doc__)
source = options.model or tiny.encoder(options.output / "base")
tokenizer = AutoTokenizer.from_pretrained(source)
model, loading_info = AutoModelForSequenceClassification.from_pretrained(
    source, num_labels=2, output_loading_info=True
)
rows = tiny.reviews(tokenizer)

args = TrainingArguments(
    output_dir=options.output,
    max_steps=options.steps,
    per_device_train_batch_size=8,
    learning_rate=3e-2 if options.model is None else 1e-3,
    max_grad_norm=0,  # the Trainer clips by the norm of all gradients; ID3AdamW by those it uses
    logging_steps=10,
    save_steps=20,  # each checkpoint folder also gets a delta.safetensors
    report_to="none",
)
trainer = Trainer(
    model,
    args,
    train_dataset=rows,
    eval_dataset=rows,
    data_collator=DataCollatorWithPadding(tokenizer),
    optimizer_cls_and_kwargs=id3_optimizer(
        args, fresh_parameters(model, loading_info), budget=0.005, max_grad_norm=1.0
    ),
    callbacks=[ID3Callback()],
)
report_first(trainer)  # the reporters of `report_to` get ID3's numbers
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]

optimizer = trainer.optimizer.optimizer  # inside Accelerate's wrapper
model.save_pretrained(options.output / "tuned")  # the whole model
save_delta(options.output / "delta.safetensors", model, optimizer)  # what changed
tiny.report(optimizer, options.output / "delta.safetensors", before, after)
