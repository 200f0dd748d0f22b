"""A mixture of LoRA experts per linear layer, as a PEFT method. Importing this package registers it with PEFT.

from peft import get_peft_model
from layerif.moe import LoraMoeConfig

model = get_peft_model(model, LoraMoeConfig(num_experts={"model.layers.0": 2, "model.layers.1": 4}))
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from layerif.compat import add_peft_type, quieten_peft
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


quieten_peft()
add_peft_type("LORA_MOE")
if PeftType("LORA_MOE") not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="lora_moe", config_cls=LoraMoeConfig, model_cls=LoraMoeModel)
