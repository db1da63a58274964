"""ID3 over LoRA on a BERT-like model: 24 % of the adapter's entries are trained; saved as a PEFT adapter and
as a delta over the initial adapter."""

import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from id3_optim import load_delta, save_delta
from id3_optim.integrations.huggingface import ID3Callback, id3_optimizer
from id3_optim.integrations.peft import adapter_groups

options = tiny.arguments(__doc__)
source = options.model or tiny.encoder(options.output / "base")
tokenizer = AutoTokenizer.from_pretrained(source)
rows = tiny.reviews(tokenizer)
base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
model = get_peft_model(base, LoraConfig(r=8, target_modules=["query", "key", "value"], task_type="SEQ_CLS"))
model.save_pretrained(options.output / "initial")  # A is random: the delta fits these numbers only

args = TrainingArguments(
    output_dir=options.output,
    max_steps=options.steps,
    per_device_train_batch_size=8,
    learning_rate=3e-2 if options.model is None else 1e-3,
    max_grad_norm=0,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
)
trainer = Trainer(
    model,
    args,
    train_dataset=rows,
    eval_dataset=rows,
    data_collator=DataCollatorWithPadding(tokenizer),
    # The head is in the adapter's modules_to_save: it is trained whole and does not count.
    optimizer_cls_and_kwargs=id3_optimizer(args, groups=adapter_groups, budget=0.24, max_grad_norm=1.0),
    callbacks=[ID3Callback()],
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
optimizer = trainer.optimizer.optimizer  # inside Accelerate's wrapper
model.save_pretrained(options.output / "tuned")  # a PEFT adapter like any other
save_delta(options.output / "delta.safetensors", model, optimizer)

base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
again = PeftModel.from_pretrained(base, options.output / "initial")
load_delta(options.output / "delta.safetensors").apply(again)  # `again` equals `model`
tiny.report(optimizer, options.output / "delta.safetensors", before, after)
