"""Hugging Face's Trainer without DeepSpeed's JSON: the class and the keywords that it makes an optimizer with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ds_shampoo.config import SettingsError, parse
from ds_shampoo.optimizer import Shampoo


class TrainerShampoo(Shampoo):
    """Shampoo by keywords that Trainer passes on: it takes "model" for another name of the parameters.

    Args:
        params: the param groups that Trainer makes.
        named_by: the module that they belong to; Shampoo's `model`.
        settings: Shampoo's own.
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], named_by: nn.Module, **settings: Any
    ) -> None:
        super().__init__(params, model=named_by, **settings)


def for_trainer(model: nn.Module, *, lr: float, **settings: Any) -> tuple[type[Shampoo], dict[str, Any]]:
    """What Hugging Face's Trainer takes as `optimizer_cls_and_kwargs`.

    ```
    trainer = Trainer(model, arguments, ..., optimizer_cls_and_kwargs=ds_shampoo.for_trainer(model, lr=2e-3))
    ```

    Trainer makes the param groups: weights with the `weight_decay` of its TrainingArguments, biases and norms without.
    Of its other arguments for optimizers (`learning_rate`, `adam_beta1`, `optim_args`, ...) it looks at none then.

    Args:
        model: the one that Trainer gets; gives parameters their names and tells embeddings and heads.
        lr: the learning rate at the schedule's peak.
        settings: Shampoo's other settings.

    Raises:
        SettingsError: for a setting that is refused, and for `weight_decay`, which Trainer's groups would overrule.
    """
    if "weight_decay" in settings:
        raise SettingsError(
            f"weight_decay = {settings['weight_decay']!r}: Trainer makes the param groups, with TrainingArguments' "
            "weight_decay: set it there"
        )
    parse({"lr": lr, **settings})
    return TrainerShampoo, {"named_by": model, "lr": lr, **settings}
