"""Preference tuning with TRL's DPOTrainer, which takes an optimizer object."""

import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from id3_optim import ID3AdamW, ReferenceModel, save_delta
from id3_optim.integrations.huggingface import ID3Callback, parameter_groups

options = tiny.arguments(__doc__)
source = options.model or tiny.decoder(options.output / "base")
model = AutoModelForCausalLM.from_pretrained(source)
optimizer = ID3AdamW(
    parameter_groups(model), lr=5e-3 if options.model is None else 1e-4, budget=0.01, max_grad_norm=1.0
)
rows = Dataset.from_list(tiny.preferences())

trainer = DPOTrainer(
    model,
    ref_model=ReferenceModel(model, optimizer),  # left out, TRL loads a second model
    args=DPOConfig(
        output_dir=options.output,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        max_grad_norm=0,  # TRL clips by the norm of all gradients; ID3AdamW by those it uses
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),  # TRL's default bf16 needs it on a CPU
    ),
    train_dataset=rows,
    eval_dataset=rows,
    processing_class=AutoTokenizer.from_pretrained(source),
    optimizers=(optimizer, None),
    callbacks=[ID3Callback()],
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]

model.save_pretrained(options.output / "tuned")
save_delta(options.output / "delta.safetensors", model, optimizer)
tiny.report(optimizer, options.output / "delta.safetensors", before, after)
