"""A mixture of LoRA experts per linear layer, as a PEFT method; importing this package registers it with PEFT.

from peft import get_peft_model
from layerif.moe import LoraMoeConfig

model = get_peft_model(model, LoraMoeConfig(num_experts={"model.layers.0": 2, "model.layers.1": 4}))
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from layerif.moe.config import LoraMoeConfig
from layerif.moe.layer import LoraMoeLinear
from layerif.moe.model import LoraMoeModel
from layerif.moe.routing import balance_loss, record_routing
from layerif.moe.usage import ExpertUsage, expert_usage, measure_usage

__all__ = [
    "ExpertUsage",
    "LoraMoeConfig",
    "LoraMoeLinear",
    "LoraMoeModel",
    "balance_loss",
    "expert_usage",
    "measure_usage",
    "record_routing",
]


def _register(name: str) -> None:
    """Make `name` a PEFT type: PEFT registers methods only under members of its own enum."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        type.__setattr__(PeftType, name, member)
        PeftType._member_map_[name] = member
        PeftType._member_names_.append(name)
        PeftType._value2member_map_[name] = member
        if hasattr(PeftType, "_hashable_values_"):  # Python 3.13 looks `value in PeftType` up there
            PeftType._hashable_values_.append(name)  # pyright: ignore[reportAttributeAccessIssue]
    if PeftType(name) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name.lower(), config_cls=LoraMoeConfig, model_cls=LoraMoeModel)


_register("LORA_MOE")
