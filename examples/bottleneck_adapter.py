"""ID3 over bottleneck adapters (Pfeiffer's: one after each feed-forward block of a BERT-like model): the base
is frozen, 4 % of the adapters' entries are trained."""

import tiny
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from id3_optim import ID3AdamW, save_delta
from id3_optim.integrations.groups import parameter_groups


class Bottleneck(torch.nn.Module):
    """x + up(relu(down(x))); the identity at first, since `up` starts at zero."""

    def __init__(self, width: int, inner: int = 16):
        super().__init__()
        self.down, self.up = torch.nn.Linear(width, inner), torch.nn.Linear(inner, width)
        torch.nn.init.zeros_(self.up.weight)
        torch.nn.init.zeros_(self.up.bias)

    def forward(self, x):
        return x + self.up(torch.relu(self.down(x)))


def trained(model):
    return {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}


options = tiny.arguments(__doc__)
source = options.model or tiny.encoder(options.output / "base")
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
head = {name for name, _ in model.named_parameters() if name.startswith("classifier.")}
for name, p in model.named_parameters():
    p.requires_grad_(name in head)
for name, layer in list(model.named_modules()):
    if name.endswith(".output.dense") and ".attention." not in name:
        layer.adapter = Bottleneck(layer.out_features)
        layer.register_forward_hook(lambda layer, inputs, output: layer.adapter(output))
save_file(trained(model), options.output / "initial.safetensors")  # the base of the delta

optimizer = ID3AdamW(
    parameter_groups(model, head), lr=1e-2, budget=0.04, total_steps=options.steps, max_grad_norm=1.0
)
batch = DataCollatorWithPadding(tokenizer)(tiny.reviews(tokenizer))
losses = []
model.train()
for _ in range(options.steps):
    losses.append(model(**batch).loss)
    losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad()

save_file(trained(model), options.output / "tuned.safetensors")
save_delta(options.output / "delta.safetensors", model, optimizer)
tiny.report(optimizer, options.output / "delta.safetensors", losses[0].item(), losses[-1].item())
