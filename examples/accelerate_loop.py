"""A plain training loop with Accelerate: accumulation, checkpoints, and resuming after a crash."""

import tiny
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from id3_optim import ID3AdamW, save_delta
from id3_optim.integrations.groups import fresh_parameters, parameter_groups

options = tiny.arguments(__doc__)
set_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2)
source = options.model or tiny.encoder(options.output / "base")
tokenizer = AutoTokenizer.from_pretrained(source)
model, loading_info = AutoModelForSequenceClassification.from_pretrained(
    source, num_labels=2, output_loading_info=True
)
model.train()  # from_pretrained leaves dropout off
loader = DataLoader(
    tiny.reviews(tokenizer), batch_size=8, shuffle=True, collate_fn=DataCollatorWithPadding(tokenizer)
)
id3 = ID3AdamW(
    parameter_groups(model, fresh_parameters(model, loading_info)),
    lr=1e-2 if options.model is None else 1e-3,
    budget=0.005,
    total_steps=options.steps,  # optimizer steps, not batches
    max_grad_norm=1.0,
)
model, optimizer, loader = accelerator.prepare(model, id3, loader)
state = options.output / "state"
if state.exists():
    accelerator.load_state(state)  # after prepare; restores the optimizer's steps_done too
    print(f"resuming after step {id3.steps_done}")

losses = []
while id3.steps_done < options.steps:
    for batch in loader:
        with accelerator.accumulate(model):
            losses.append(model(**batch).loss)
            accelerator.backward(losses[-1])
            optimizer.step()
            optimizer.zero_grad()
        if id3.steps_done == options.steps:
            break
    accelerator.save_state(state)

if accelerator.is_main_process and losses:
    plain = accelerator.unwrap_model(model)
    plain.save_pretrained(options.output / "tuned")
    save_delta(options.output / "delta.safetensors", plain, id3)
    tiny.report(id3, options.output / "delta.safetensors", losses[0].item(), losses[-1].item())
accelerator.end_training()
