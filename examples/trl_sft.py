"""Supervised fine-tuning with TRL's SFTTrainer: prompts and completions, the loss on completions."""

import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from id3_optim import save_delta
from id3_optim.integrations.huggingface import ID3Callback, id3_optimizer

options = tiny.arguments(__doc__)
source = options.model or tiny.decoder(options.output / "base")
rows = Dataset.from_list(tiny.facts())

args = SFTConfig(
    output_dir=options.output,
    max_steps=options.steps,
    per_device_train_batch_size=8,
    learning_rate=1e-2 if options.model is None else 1e-4,
    max_grad_norm=0,  # TRL clips by the norm of all gradients; ID3AdamW by those it uses
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    use_cpu=not torch.accelerator.is_available(),  # TRL's default bf16 needs it on a CPU
)
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(source),
    args,
    train_dataset=rows,
    eval_dataset=rows,
    processing_class=AutoTokenizer.from_pretrained(source),
    # With `peft_config=` beside it, groups=id3_optim.integrations.peft.adapter_groups.
    optimizer_cls_and_kwargs=id3_optimizer(args, budget=0.01, max_grad_norm=1.0),
    callbacks=[ID3Callback()],
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]

optimizer = trainer.optimizer.optimizer  # inside Accelerate's wrapper
trainer.model.save_pretrained(options.output / "tuned")
save_delta(options.output / "delta.safetensors", trainer.model, optimizer)
tiny.report(optimizer, options.output / "delta.safetensors", before, after)
