"""Compares the seconds and the answers of other libraries with ours, on the same model and samples.

    make bench-peers     (makes an environment for each library, then runs this; two minutes)

The model is a Llama of SmolLM2-135M's widths with random weights, and influence is taken of its attention matrices in
float32. All samples have the same length, so that no library's handling of padding matters. Every contestant runs in a
process of its own, a peer in `.peers/NAME`. Seconds are those of the work alone, without imports and loading.

Agreement is Spearman's rank correlation with our version of the same estimator. Our EK-FAC is compared with exact
influence, because both approximate the same. The correlation is over all pairs of samples, summed over matrices, and
over blocks if the library tells them apart. dattri forms the products of all gradients one by one, and takes minutes
for what the others do in seconds, so it is measured on a smaller task.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor, nn

from experiments.timing import machine, timed
from layerif.data.batches import Encoded, Encodings, batches
from layerif.layers import LayerMap
from layerif.models.blocks import layer_map

BATCH_SIZE, DAMPING = 8, 0.1
LAMBDA = 1e-5  # for libraries that take one λ for all matrices
LIMIT = 300  # seconds that a contestant may take
ROOT = Path(__file__).parents[2]


class Size(NamedTuple):
    train: int
    validation: int
    tokens: int
    blocks: int


USUAL, SMALL = Size(32, 8, 64, 4), Size(8, 4, 16, 1)


class Contestant(NamedTuple):
    """One library with one estimator.

    Attributes:
        needs: the environment that it runs in.
        measure: gives the influence, by matrix or as one sum.
        beside: the contestant that it is compared with.
        size: the size of its task.
    """

    needs: str
    measure: Callable[[nn.Module, LayerMap, Tensor, Tensor], dict[str, Tensor]]
    beside: str | None = None
    size: Size = USUAL


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure[0], Path(given.measure[1]))
        return
    print(machine())
    for size in (USUAL, SMALL):
        print(f"\n{size.blocks} blocks, {size.train} + {size.validation} samples of {size.tokens} tokens")
        print("contestant                   seconds    ratio   Spearman of pairs   of blocks")
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), size)
            for name, contestant in CONTESTANTS.items():
                if contestant.size == size:
                    print(compared(name, Path(folder)), flush=True)


def compared(name: str, folder: Path) -> str:
    """Runs a contestant in its environment, and returns its row of the table."""
    contestant = CONTESTANTS[name]
    python = sys.executable if contestant.needs == "layerif" else ROOT / ".peers" / contestant.needs / "bin" / "python"
    if not Path(python).exists():
        return f"{name:<27} not installed: make .peers/{contestant.needs}/.ready"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    command = [str(python), __file__, "--measure", name, str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return f"{name:<27} stopped after {LIMIT} s"
    if done.returncode:
        return f"{name:<27} failed: {done.stderr.strip().splitlines()[-1]}"
    seconds, found = json.loads((folder / f"{name}.json").read_text()), load_file(folder / f"{name}.safetensors")
    if contestant.beside is None:
        return f"{name:<27}{seconds:>9.2f}{1:>9.1f}"
    ours = json.loads((folder / f"{contestant.beside}.json").read_text())
    expected = load_file(folder / f"{contestant.beside}.safetensors")
    pairs = spearmanr(summed(found).flatten(), summed(expected).flatten())[0]
    agreement = f"{pairs:>20.3f}"
    if len(found) > 1:
        agreement += f"{spearmanr(of_blocks(found), of_blocks(expected))[0]:>12.3f}"
    return f"{name:<27}{seconds:>9.2f}{seconds / ours:>9.1f}{agreement}   beside {contestant.beside}"


def prepare(folder: Path, size: Size) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=size.blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=4096,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    # The words are as uneven as those of a text, because uniform ones would make all gradients alike.
    shares = 1 / torch.arange(1, 4097, dtype=torch.float64)
    ids = torch.multinomial(shares, (size.train + size.validation) * size.tokens, replacement=True).view(
        -1, size.tokens
    )
    save_file({"train": ids[: size.train].clone(), "validation": ids[size.train :].clone()}, folder / "ids.safetensors")


def measure(name: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager").eval()
    ids = load_file(folder / "ids.safetensors")
    found, seconds = timed(lambda: CONTESTANTS[name].measure(model, layer_map(model), ids["train"], ids["validation"]))
    save_file({key: value.detach().contiguous() for key, value in found.items()}, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(seconds))


# Every contestant returns I (validation × train) by matrix or as one sum, below zero where a train sample helps.


def layerif(estimator: str, model: nn.Module, layers: LayerMap, train: Tensor, validation: Tensor) -> dict[str, Tensor]:
    from layerif.estimators.datainf import DataInf
    from layerif.estimators.exact import Exact
    from layerif.estimators.grad_dot import GradDot
    from layerif.probe.grams.measure import measure as probe

    made: Any = {
        "grad_dot": GradDot(),
        "exact": Exact(damping=DAMPING),
        "datainf": DataInf(damping=LAMBDA, damping_rule="absolute"),
    }[estimator]
    both = [list(batches(encodings(ids), BATCH_SIZE, 0)) for ids in (train, validation)]
    return made.influences(probe(model, layers, *both).in_float64.grams)


def ekfac(model: nn.Module, layers: LayerMap, train: Tensor, validation: Tensor) -> dict[str, Tensor]:
    from layerif.estimators.ekfac import Ekfac
    from layerif.probe.curvature.measure import measure_curvature

    both = [list(batches(encodings(ids), BATCH_SIZE, 0)) for ids in (train, validation)]
    return Ekfac(damping=DAMPING).influences(
        measure_curvature(model, layers, *both, spectra=("ekfac",), queries="each")
    )


def dattri_datainf(model: nn.Module, layers: LayerMap, train: Tensor, validation: Tensor) -> dict[str, Tensor]:
    from dattri.algorithm import IFAttributorDataInf  # type: ignore[import-not-found]
    from dattri.task import AttributionTask  # type: ignore[import-not-found]
    from torch.utils.data import DataLoader, TensorDataset

    def loss(params: dict[str, Tensor], data: tuple[Tensor, ...]) -> Tensor:
        logits = torch.func.functional_call(model, params, (data[0],), {"use_cache": False}).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), data[0][:, 1:].flatten())

    task = AttributionTask(loss, model, model.state_dict())
    matrices = [param for params in layers.params for param in params]
    attributor = IFAttributorDataInf(task, layer_name=matrices, regularization=LAMBDA)
    loaders = [DataLoader(TensorDataset(ids), batch_size=BATCH_SIZE) for ids in (train, validation)]
    attributor.cache(loaders[0])
    return {"sum": -attributor.attribute(*loaders).T}


def dattri_llm(
    attributor: str, model: nn.Module, layers: LayerMap, train: Tensor, validation: Tensor
) -> dict[str, Tensor]:
    import dattri_llm  # type: ignore[import-not-found]
    from dattri_llm.attribution import AttributionArguments, EKFACAttributor, TracInAttributor  # type: ignore[import-not-found]

    task = dattri_llm.AttributionTask(lambda model, batch: model(**batch).loss * len(batch["input_ids"]), model)
    options = {"relative_damping": True, "damping": DAMPING} if attributor == "ekfac" else {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = AttributionArguments(
            folder, per_device_train_batch_size=BATCH_SIZE, per_device_eval_batch_size=BATCH_SIZE, use_cpu=True
        )
        made = (EKFACAttributor if attributor == "ekfac" else TracInAttributor)(arguments, task=task)
        modules = {param.removesuffix(".weight"): "linear_io" for params in layers.params for param in params}
        both = [[{"input_ids": row, "labels": row} for row in ids] for ids in (train, validation)]
        score = made.attribute(*both, hook_config=dattri_llm.HookManagerConfig(hook_types=modules), **options)  # type: ignore[arg-type]
        return {"sum": -score.agnostic_matrix()[1].T.float()}


CONTESTANTS = {
    "layerif grad_dot": Contestant("layerif", partial(layerif, "grad_dot")),
    "layerif datainf": Contestant("layerif", partial(layerif, "datainf")),
    "layerif exact": Contestant("layerif", partial(layerif, "exact")),
    "layerif ekfac": Contestant("layerif", ekfac, "layerif exact"),
    "dattri-llm grad_dot": Contestant("dattri-llm", partial(dattri_llm, "grad_dot"), "layerif grad_dot"),
    "dattri-llm ekfac": Contestant("dattri-llm", partial(dattri_llm, "ekfac"), "layerif ekfac"),
    "layerif datainf, small": Contestant("layerif", partial(layerif, "datainf"), size=SMALL),
    "dattri datainf, small": Contestant("dattri", dattri_datainf, "layerif datainf, small", SMALL),
}


def encodings(ids: Tensor) -> Encodings:
    return Encodings(Encoded(tuple(row), 1) for row in ids.tolist())


def summed(found: dict[str, Tensor]) -> Tensor:
    return torch.stack([influence.double() for influence in found.values()]).sum(dim=0)


def of_blocks(found: dict[str, Tensor]) -> list[float]:
    blocks: dict[str, float] = {}
    for name, influence in found.items():
        block = name.partition(".self_attn")[0]
        blocks[block] = blocks.get(block, 0.0) + float(influence.double().sum())
    return [abs(blocks[block]) for block in sorted(blocks)]


if __name__ == "__main__":
    main()
