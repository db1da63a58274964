"""FSDP2 in the Trainer: `torchrun --nproc-per-node 2 examples/trainer_fsdp2.py --output runs/trainer`.

Without an accelerator the Trainer keeps the whole model in each process (DistributedDataParallel).
"""

import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from id3_optim.integrations.huggingface import ID3Callback, id3_optimizer, report_first
from id3_optim.wrappers import unwrapped

options = tiny.arguments(__doc__)
args = TrainingArguments(
    output_dir=options.output,
    max_steps=options.steps,
    per_device_train_batch_size=4,
    learning_rate=3e-2 if options.model is None else 1e-3,
    max_grad_norm=0,  # the Trainer clips by the norm of all gradients; ID3AdamW by those it uses
    logging_steps=1,
    save_steps=options.steps // 2,  # each checkpoint folder also gets a delta.safetensors
    fsdp=True,
    fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    use_cpu=not torch.accelerator.is_available(),
    report_to="none",
)
source = options.model or str(options.output / "base")
with args.main_process_first():
    if options.model is None and args.process_index == 0:
        tiny.decoder(options.output / "base")
tokenizer = AutoTokenizer.from_pretrained(source)
texts = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in tiny.facts()]
trainer = Trainer(
    AutoModelForCausalLM.from_pretrained(source),
    args,
    train_dataset=[{"input_ids": ids, "labels": ids} for ids in texts],
    optimizer_cls_and_kwargs=id3_optimizer(args, budget=0.005, max_grad_norm=1.0),
    callbacks=[ID3Callback()],
)
report_first(trainer)
trainer.train()
trainer.save_model(options.output / "tuned")  # every process gives its part

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
if args.process_index == 0:
    delta = options.output / f"checkpoint-{options.steps}" / "delta.safetensors"
    tiny.report(unwrapped(trainer.optimizer), delta, losses[0], losses[-1])
