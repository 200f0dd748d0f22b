"""Influence under EK-FAC, by way of kronfluence: the same loss, samples and matrices as the probe's.

For one matrix with inputs a and output gradients δ, whose per-sample gradients are g = Σ_t δ_t a_tᵀ:

    U_A, U_S: eigenvectors of E_t[a aᵀ] and E_t[δ δᵀ];    g' = U_Sᵀ g U_A;    Λ = E[g'²] elementwise over train samples
    I_ji = −Σ v'_j ∘ g'_i / (Λ + λ),    λ = damping · mean of Λ = damping · the mean squared gradient entry

(George et al., 2018; Grosse et al., 2023), with the empirical Fisher: the data's own labels. It takes three passes over
the train samples; kronfluence keeps its factors meanwhile, four square matrices per matrix, in the folder for temporary
files.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor, nn

from layerif.checks import listed
from layerif.compat import reset_kronfluence
from layerif.data.batches import Encodings, collate
from layerif.evidence import LayerInfluences
from layerif.layers import LayerMap
from layerif.models.blocks import bare
from layerif.models.contexts import frozen
from layerif.models.loss import per_sample_loss
from layerif.models.memory import free_bytes
from layerif.probe.measurements import Load, Measurements
from layerif.probe.request import Part, Request
from layerif.probe.store import MeasurementKind, layers_in
from layerif.versions import VERSIONS

log = logging.getLogger(__name__)

_SUPPORTED = "1.0.1"  # the one release whose factors were compared with the dense definition


@dataclass(frozen=True)
class Curvature(Request):
    """A request for the influences of the samples under EK-FAC with this damping, measured by one process alone."""

    parts: ClassVar[tuple[Part, ...]] = ("train", "validation")

    damping: float
    damping_rule: str

    def check(self, measurements: Measurements) -> None:
        measurements.check_adapter_of_lora()
        check_installed()
        if measurements.probe.projection is not None:
            raise ValueError(
                f"estimator=ekfac has no use for probe.projection={measurements.probe.projection}: it works on whole "
                "gradients; leave it null, or take an estimator on Grams"
            )

    def take(self, measurements: Measurements, load: Load) -> tuple[LayerInfluences, bool]:
        train, validation = measurements.samples()
        description = measurements.description(ekfac=VERSIONS["ekfac"], damping=[self.damping, self.damping_rule])

        def compute(key: str) -> LayerInfluences:
            model = load()
            layers = measurements.measured_layers(model)
            log.info("EK-FAC of %d + %d samples in %d layers", len(train), len(validation), len(layers.names))
            return measure_ekfac(
                model,
                layers,
                train,
                validation,
                pad_id=measurements.pad_id,
                batch_size=measurements.probe.batch_size,
                damping=self.damping,
                relative=self.damping_rule == "relative",
                memory_gb=measurements.probe.memory_gb,
                fingerprint=key,
            )

        found, reused = measurements.store.kept(INFLUENCES, description, compute, about=measurements.about())
        if reused:
            log.info("scores from the store: %s… was measured before", found.fingerprint[:12])
        return found, reused


def _pack(measured: LayerInfluences) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {param: influence.contiguous() for param, influence in measured.influences.items()}
    return tensors, {"layers": json.dumps(asdict(measured.layers))}


def _unpack(tensors: Mapping[str, Tensor], header: Mapping[str, str], key: str) -> LayerInfluences:
    layers = layers_in(header)
    return LayerInfluences(layers, {param: tensors[param] for param in layers.matrices}, key)


INFLUENCES = MeasurementKind("influences", "EK-FAC influences", _pack, _unpack)


def check_installed() -> None:
    """Raises ValueError with the commands that install kronfluence where it is missing or another release."""
    try:
        found = version("kronfluence")
    except PackageNotFoundError:
        found = "not installed"
    if found != _SUPPORTED:
        raise ValueError(
            f"estimator=ekfac needs kronfluence {_SUPPORTED}, which is {found}; run `pip install --no-deps "
            f"kronfluence=={_SUPPORTED}` and `pip install accelerate einops einconv opt-einsum` "
            "(it asks for torchvision and never uses it), or use estimator=exact"
        )


def measure_ekfac(
    model: nn.Module,
    layers: LayerMap,
    train: Encodings,
    validation: Encodings,
    *,
    pad_id: int,
    batch_size: int,
    damping: float,
    relative: bool = True,
    memory_gb: float | None = None,
    fingerprint: str = "",
) -> LayerInfluences:
    """Measures I (M×N) of every matrix in `layers`; the model is left as it was.

    A matrix whose train gradients are all zero has no influence; a RuntimeWarning names it.

    Args:
        model: a causal language model.
        layers: the blocks and matrices to measure.
        train: the train samples.
        validation: the validation samples.
        pad_id: the token that fills shorter samples.
        batch_size: the samples that the model sees at once.
        damping: see `relative`.
        relative: λ = damping · mean Λ; otherwise λ = damping.
        memory_gb: for the preconditioned validation gradients; beyond it the train samples are passed over once for
            each part of them. None: half of what is free.
        fingerprint: of the measurement.
    """
    check_installed()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise ValueError("estimator=ekfac measures on one process; use trainer.devices=1, or estimator=exact")
    from kronfluence import analyzer as kronfluence  # type: ignore[import-not-found]
    from kronfluence.arguments import FactorArguments, ScoreArguments  # type: ignore[import-not-found]
    from kronfluence.utils.dataset import DataLoaderKwargs  # type: ignore[import-not-found]

    logging.getLogger("kronfluence").setLevel(logging.WARNING)
    names = [param.removesuffix(".weight") for param in layers.matrices]
    weight = bare(model).get_parameter(f"{names[0]}.weight")
    precise: Any = torch.promote_types(weight.dtype, torch.float32)
    of_samples = {"per_sample_gradient_dtype": precise}
    factors = FactorArguments(
        use_empirical_fisher=True,
        activation_covariance_dtype=precise,
        gradient_covariance_dtype=precise,
        lambda_dtype=precise,
        **of_samples,
    )
    memory = free_bytes(weight.device) / 2 if memory_gb is None else memory_gb * 1e9
    scores = ScoreArguments(
        damping_factor=None if relative else damping,
        compute_per_module_scores=True,
        query_gradient_accumulation_steps=max(1, int(memory / (batch_size * sum(layers.numel) * precise.itemsize))),
        precondition_dtype=precise,
        score_dtype=precise,
        **of_samples,
    )
    reset_kronfluence()  # or the device of an earlier measurement would stay
    lent = bare(model)
    with frozen(lent), _lent(lent, names), tempfile.TemporaryDirectory(prefix="layerif-ekfac-") as folder, _quiet():
        task = _task(names)
        analyzer = kronfluence.Analyzer(
            "ekfac",
            kronfluence.prepare_model(lent, task),
            task,
            cpu=weight.device.type == "cpu",
            disable_tqdm=not sys.stderr.isatty(),
            output_dir=folder,
        )
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=partial(collate, pad_id=pad_id)))
        analyzer.fit_all_factors("factors", train, per_device_batch_size=batch_size, factor_args=factors)  # type: ignore[arg-type]
        # Where no damping is given, the library takes its constant times the mean of Λ.
        with patch("kronfluence.factor.config.HEURISTIC_DAMPING_SCALE", damping):
            analyzer.compute_pairwise_scores(
                "scores",
                "factors",
                validation,  # type: ignore[arg-type]
                train,  # type: ignore[arg-type]
                per_device_query_batch_size=batch_size,
                per_device_train_batch_size=batch_size,
                score_args=scores,
            )
        found = analyzer.load_pairwise_scores("scores")
        spectra = analyzer.load_lambda_matrices("factors")["lambda_matrix"]
    zero = [name for name in names if not spectra[name].any()]
    _warn_of_zero_gradients(zero, len(names))
    influences = {
        f"{name}.weight": torch.zeros_like(found[name]).double() if name in zero else -found[name].double()
        for name in names
    }
    _check_finite(influences)
    return LayerInfluences(layers, influences, fingerprint)


def _task(names: Sequence[str]) -> Any:
    """Tells kronfluence the loss of a model, its modules, and the places of padding."""
    from kronfluence.task import Task  # type: ignore[import-not-found]

    class Summed(Task):
        def compute_train_loss(self, batch: Mapping[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
            assert not sample, "the empirical Fisher draws no labels"
            return self.compute_measurement(batch, model)

        def compute_measurement(self, batch: Mapping[str, Tensor], model: nn.Module) -> Tensor:
            loss_B = per_sample_loss(model, batch)
            if not bool(loss_B.isfinite().all()):
                raise ValueError("the loss of a sample is not finite; look at the weights, or use model.dtype=float32")
            return loss_B.sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return list(names)

        def get_attention_mask(self, batch: Mapping[str, Tensor]) -> Tensor:
            return batch["attention_mask"]

    return Summed()


@contextmanager
def _lent(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Lends the model to wrap linear layers in, and puts it back; their biases are added outside the matrices.

    kronfluence counts a bias as one more column of its matrix, and so would measure another thing than the probe.
    """
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    biases = {name: linear.bias for name, linear in linears.items() if linear.bias is not None}
    handles = []
    for name, bias in biases.items():
        linears[name].bias = None
        handles.append(linears[name].register_forward_hook(lambda module, inputs, output, bias=bias: output + bias))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, linear in linears.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
        for name, bias in biases.items():
            linears[name].bias = bias


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"kronfluence\.")
        yield


def _warn_of_zero_gradients(zero: Sequence[str], num_matrices: int) -> None:
    if zero:
        warnings.warn(
            f"all train gradients are zero, so the influence counts as zero, in {listed(zero, 4)} ({len(zero)} of "
            f"{num_matrices} matrices); for LoRA's A this is so while B is zero",
            RuntimeWarning,
            stacklevel=3,
        )


def _check_finite(influences: Mapping[str, Tensor]) -> None:
    for name, influence_MN in influences.items():
        if not bool(influence_MN.isfinite().all()):
            raise ValueError(
                f"the EK-FAC influence of {name} is not finite, so its gradients overflowed or are NaN; "
                "load the model in float32 (model.dtype=float32)"
            )
