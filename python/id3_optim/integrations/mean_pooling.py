"""A text classifier over the mean of the last hidden states, for any encoder of transformers.

The file needs torch and transformers alone. `save_pretrained` puts a copy of it beside the weights, so that
`AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)` loads the model where
this package is not installed; where it is, `MeanPoolingClassifier.from_pretrained(folder)` does.
"""

import inspect

import torch
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPoolingConfig(PretrainedConfig):
    """encoder: the encoder's own configuration as a dict."""

    model_type = "mean_pooling"

    def __init__(self, encoder: dict | None = None, **options):
        self.encoder = encoder or {}
        self.pad_token_id = options.pop("pad_token_id", self.encoder.get("pad_token_id"))
        super().__init__(**options)

    @property
    def max_position_embeddings(self) -> int | None:
        """The longest input of the encoder, None where it does not say."""
        return self.encoder.get("max_position_embeddings")

    def of_encoder(self) -> PretrainedConfig:
        """The encoder's configuration."""
        return AutoConfig.for_model(**self.encoder)


class MeanPoolingClassifier(PreTrainedModel):
    """`encoder`, the mean of its last hidden states over the attention mask, dropout, a linear `classifier`.

    With `problem_type` "regression" the loss is the mean square, else the cross entropy.
    """

    config_class = MeanPoolingConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True  # of the encoder's layers

    def __init__(self, config: MeanPoolingConfig):
        super().__init__(config)
        inner = config.of_encoder()
        self.encoder = AutoModel.from_config(inner, **without_pooler(inner))
        self.dropout = nn.Dropout(getattr(inner, "hidden_dropout_prob", 0.0) or 0.0)
        self.classifier = nn.Linear(inner.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def forward(self, input_ids=None, attention_mask=None, labels=None, **inputs) -> SequenceClassifierOutput:
        """logits [rows, labels] of tokens [rows, length]; `loss` where `labels` [rows] are given."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs)[0]
        if attention_mask is None:
            pooled = states.mean(1)
        else:
            kept = attention_mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * kept).sum(1) / kept.sum(1).clamp(min=1)
        logits = self.classifier(self.dropout(pooled.to(self.classifier.weight.dtype)))
        return SequenceClassifierOutput(loss=self._loss(logits, labels), logits=logits)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
        if labels is None:
            return None
        if self.config.problem_type == "regression":
            return nn.functional.mse_loss(logits.squeeze(-1).float(), labels.float())
        return nn.functional.cross_entropy(logits.float(), labels)


def without_pooler(config: PretrainedConfig) -> dict[str, bool]:
    """The option that leaves an encoder's pooler out, which would get no gradient; {} where there is none."""
    model_class = MODEL_MAPPING[type(config)]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    has = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if has else {}


MeanPoolingConfig.register_for_auto_class()
MeanPoolingClassifier.register_for_auto_class("AutoModelForSequenceClassification")
AutoConfig.register("mean_pooling", MeanPoolingConfig, exist_ok=True)
AutoModelForSequenceClassification.register(MeanPoolingConfig, MeanPoolingClassifier, exist_ok=True)
