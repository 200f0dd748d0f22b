"""Records of 0.1.0 in today's shape, so that a report still reads them.

Version 0.1.0 spread the decision over top-level fields and recorded no choices; these follow from the classes that its
configuration names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerif.checks import check_object

# The choice of a class in 0.1.0, by group, where it differs from the class's file and from its name in small letters.
_CHOICES = {
    "model": {"Embedded": "smollm2"},
    "method": {
        "LoRAMoEModule": "lora_moe",
        "LoRAModule": "lora",
        "EqualLoRAModule": "lora_equal",
        "PruneModule": "prune",
    },
}


def in_todays_shape(content: Any, what: str = "the record") -> Any:
    """Returns the content of a `record.json` or `failure.json` in today's shape, and a record of today unchanged.

    Args:
        content: parsed JSON.
        what: the name of the file in a message.

    Raises:
        ValueError: the record is of 0.1.0, and its allocation is not an object.
    """
    if not isinstance(content, dict) or "version" in content or not isinstance(content.get("config"), Mapping):
        return content
    today = {**content, "choices": content.get("choices") or choices_of_targets(content["config"])}
    if "traceback" in content:  # the shape of a failure never changed
        return today
    old = {key: today.pop(key) for key in _OF_DECISION if key in today}
    today["answers"] = today.pop("questions", {})
    allocation = check_object(old.get("allocation"), what=f"allocation in {what}")
    if allocation:
        layers = old.get("layers", [])
        scores = {"layers": layers, "values": old.get("scores"), "higher_means": old.get("higher_means", "")}
        today["decision"] = {
            "source": old.get("source", ""),
            "scores": scores if old.get("scores") else None,
            "allocation": {
                "kind": allocation.get("kind"),
                "units": allocation.get("layers", layers),
                "values": allocation.get("values"),
                "budget": allocation.get("budget"),
                "sizes": allocation.get("numel"),
            },
            "reliability": old.get("reliability"),
            "fidelity": old.get("fidelity"),
            "samples": old.get("samples", {}),
        }
    return {"version": 1, **today}


def choices_of_targets(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the choices behind a configuration of 0.1.0, by group."""
    found = {}
    for group in ("model", "task", "estimator", "allocator", "method", "pruner"):
        node = config.get(group)
        if not node and group == "method":
            found[group] = "none"
        elif _names_a_class(node):
            found[group] = _choice(group, node)
    estimator, scored = config.get("estimator"), config.get("score_task")
    if isinstance(estimator, Mapping) and _names_a_class(estimator.get("of")):
        found["estimator@estimator.of"] = _choice("estimator", estimator["of"])
    if _names_a_class(scored):
        found["task@score_task"] = _choice("task", scored)
    return found


_OF_DECISION = ("layers", "samples", "scores", "higher_means", "source", "reliability", "fidelity", "allocation")


def _names_a_class(node: Any) -> bool:
    return isinstance(node, Mapping) and isinstance(node.get("_target_"), str)


def _choice(group: str, node: Any) -> str:
    path: list[str] = ["", *node["_target_"].split(".")]
    module, name = path[-2:]
    if group == "task":
        return str(node.get("name", name))
    if group == "estimator":
        return module
    return _CHOICES.get(group, {}).get(name, name.lower())
