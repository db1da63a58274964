"""ID3AdamW inside axolotl: a plugin, and its options under `id3:` in the YAML file.

    plugins: [id3_optim.integrations.axolotl.ID3Plugin]
    id3: {budget: 0.005, max_grad_norm: 1.0}
    optimizer: adamw_torch  # ID3AdamW takes its place
    max_grad_norm: 0  # ID3AdamW clips by the norm of what it updates

Learning rate, betas, eps and weight decay are axolotl's own. A checkpoint holds the delta of the base.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from peft import PeftModel
from pydantic import BaseModel

from .groups import parameter_groups
from .huggingface import ID3Callback, id3_optimizer, report_first
from .peft import adapter_groups


class ID3Args(BaseModel):
    """What the plugin adds to axolotl's configuration. id3: arguments of ID3AdamW, `budget` among them."""

    id3: dict[str, Any]


class ID3Plugin(BasePlugin):
    """Puts ID3AdamW and ID3Callback into the trainer that axolotl has made.

    With an adapter the budget counts over the adapter's parameters.
    """

    def get_input_args(self) -> str:
        """The name of `ID3Args`, by which axolotl checks the configuration."""
        return f"{ID3Args.__module__}.{ID3Args.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Raises ValueError or TypeError, as `id3_optimizer` does, for options that do not fit.

        axolotl declares `create_optimizer` for plugins too, which nothing in it calls.
        """
        groups = adapter_groups if isinstance(trainer.model, PeftModel) else parameter_groups
        factory, options = id3_optimizer(trainer.args, groups=groups, **cfg.id3)
        build = factory()

        def build_for_axolotl(model: Any, *_: Any, **options: Any) -> Any:
            return build(model, **options)  # axolotl passes its arguments after the model

        trainer.optimizer_cls_and_kwargs = (lambda: build_for_axolotl), options
        trainer.add_callback(ID3Callback())
        report_first(trainer)
