"""A table of bad input: how it is given, and what the one sentence that refuses it must name.

`tests/test_bad_input.py` tries every line. A line is a call, of a command or of the function that refuses, because a
command costs half a second; those that only repeat a rule are left to `make soak`.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from layerif.allocate.curves import Knapsack, equal_curves
from layerif.allocate.file import SavedAllocation
from layerif.app import export, store
from layerif.app.methods._sparsity import Refine
from layerif.estimators.bits_curve import BitsCurve
from layerif.estimators.file import SavedScores
from layerif.estimators.loss_curve import LossCurve
from layerif.estimators.measured_loss import MeasuredLoss
from layerif.files import conf_folder
from layerif.formats import formats_called
from layerif.layers import LayerMap
from layerif.models.pretrained import LocalModel
from layerif.probe.store import MeasurementKind, Store
from layerif.pruning.wanda import Wanda
from layerif.report import report
from layerif.scores import LayerScores
from tests.command import Done, layerif_here
from tests.tiny import shipped_task


def changed_within(content: Any, changes: Any) -> Any:
    """Returns the content with the values of `changes` put in their places."""
    if not isinstance(changes, dict) or not isinstance(content, dict):
        return changes
    return content | {key: changed_within(content.get(key), change) for key, change in changes.items()}


def as_bytes(content: Any) -> bytes:
    """Returns bytes and texts as they are, and anything else as JSON."""
    if isinstance(content, bytes):
        return content
    return content.encode() if isinstance(content, str) else json.dumps(content).encode()


@dataclass(frozen=True)
class Place:
    """A place to try one bad input: an empty folder, and a model and a task that must not be changed."""

    folder: Path
    model: Path
    task: Path

    def spoilt(self, source: Path, file: str, content: Any) -> Path:
        """A copy of a folder in which one file has this content: bytes, a text, or JSON; None is a folder."""
        copy = Path(shutil.copytree(source, self.folder / "spoilt", dirs_exist_ok=True))
        (copy / file).unlink(missing_ok=True)
        if content is None:
            (copy / file).mkdir()
        else:
            (copy / file).write_bytes(as_bytes(content))
        return copy


@dataclass(frozen=True)
class Bad:
    """One bad input.

    Attributes:
        name: says what is wrong.
        says: a regular expression that the sentence holds.
        give: gives it: calls a command, or the function that refuses.
    """

    name: str
    says: str
    give: Callable[[Place], object]


# Values that no number can have. A setting may allow -1 and null, and says so by its annotation.
NO_NUMBERS = {"nan": math.nan, "inf": math.inf, "text": "much", "list": [[]], "huge": 10**400, "-huge": -(10**400)}
HUGE, ENDLESS, DEEP = "1" + "0" * 400, "1" * 5000, "[" * 100_000 + "]" * 100_000
LONG_NAME, LONG_PATH = "/" + "x" * 300, "/x" * 3000
OURS = "# @package _global_\n"


# Commands


def command(says: str, *arguments: str, yaml: str | bytes | None = None, dry_run: bool = True) -> Bad:
    """A command on a tiny model that only the last arguments spoil, or a YAML of the user's as its experiment."""

    def give(place: Place) -> Done:
        options = [each for each in arguments if each == "-m"]
        if yaml is not None:
            own = place.folder / "own" / "experiment"
            own.mkdir(parents=True)
            (own / "mine.yaml").write_bytes(as_bytes(yaml))
            options.append(f"--config-dir={own.parent}")
        settings = [
            "model=local",
            f"model.path={place.model}",
            "task=jsonl",
            f"task.path={place.task}",
            f"outputs={place.folder / 'outputs'}",
            "trainer.accelerator=cpu",
            *(["experiment=mine"] if yaml is not None else []),
            *(each.replace("{folder}", str(place.folder)) for each in arguments if each not in options),
            f"dry_run={dry_run}",
        ]
        (place.folder / "empty").touch()
        (place.folder / "nothing").mkdir()
        return layerif_here([*options, *settings], place.folder)

    given = yaml.decode(errors="replace") if isinstance(yaml, bytes) else yaml
    return Bad(" ".join(filter(None, [*arguments, given])), says, give)


def program(main: Callable[[Sequence[str]], None], says: str, *arguments: str, **files: Any) -> Bad:
    """Another program of ours in a folder with these files, by their names without `_`."""

    def give(place: Place) -> Done:
        for name, content in files.items():
            file = place.folder / name.replace("__", "/").replace("_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(as_bytes(content))
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.chdir(place.folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main(arguments)
            except SystemExit as left:
                code = left.code if isinstance(left.code, int) else int(left.code is not None)
        return Done(code, out.getvalue(), err.getvalue())

    return Bad(f"{main.__module__} {' '.join(arguments)} {files}", says, give)


COMMANDS = [
    Bad(
        "settings on both sides of -m",
        r"^settings stand on both sides of -m; options come first: layerif -m task=jsonl seed=0,1$",
        lambda place: layerif_here(["task=jsonl", "-m", "seed=0,1"], place.folder),
    ),
    command(r"^seed is given a whole number of too many digits", f"seed={ENDLESS}"),
    command(
        r"^trainer\.max_steps=10+… is not allowed; allowed: a whole number that 64 bits", f"trainer.max_steps={HUGE}"
    ),
    command(r"^score_task=5 stands where a whole task belongs", "score_task=5"),
    command(r"^'recipe\.a' is not a key of the configuration; allowed in 'recipe'", "recipe={a:1}"),
    command(
        r"'/nowhere' holds neither",
        "estimator=tracin",
        "estimator.checkpoints=[/nowhere]",
        "estimator.learning_rates=[1]",
    ),
    command(
        r"^trainer\.accumulate_grad_batches=-1 is not allowed; allowed: at least 1",
        "trainer.accumulate_grad_batches=-1",
    ),
    command(r"mine\.yaml holds a whole number of too many digits", yaml=f"{OURS}seed: {ENDLESS}"),
    command(r"mine\.yaml sets hydra to null", yaml=f"{OURS}hydra: null"),
    command(r"^hydra\.run\.dir='a\\x00b' is not allowed", yaml=OURS + r'hydra: {run: {dir: "a\0b"}}'),
    command(r"^hydra\.launcher=None is not allowed; allowed: launcher=NAME", "-m", "hydra.launcher=null"),
]
LAYERS_TO_TRAIN = [
    command(r"^allocator\.keep=0 is not allowed; allowed: a finite number above 0", "method=full", "allocator.keep=0"),
    command(r"^allocator\.keep=0\.1 of 3 layers keeps none; use a whole", "method=full", "allocator.keep=0.1"),
    command(r"^allocator\.keep=4 is more than the 3 layers that there are", "method=full", "allocator.keep=4"),
    command(
        r"^the allocator gives rank, and method=full spends layers; use allocator=layers, or method=adalora, ",
        "method=full",
        "allocator=rank",
    ),
    command(
        r"^the allocator gives layers, and method=prune spends sparsity; use .*method=full, method=lora, method=lora",
        "method=prune",
        "allocator=layers",
    ),
    command(r"^method\.equal_parameters=true is for allocator=layers", "method=lora", "method.equal_parameters=true"),
    command(r"^method\.r=4 is for allocator=layers", "method=lora", "method.r=4"),
    command(r"^method\.num_experts=4 is for allocator=layers", "method.num_experts=4"),
    command(r"^method=adalora takes ranks away until late .* fit\.keep=best", "method=adalora", "fit.keep=best"),
    command(r"^method=adalora finds ranks by itself and looks at no scores", "method=adalora", "estimator=datainf"),
    command(r"^method\.rho=0\.5 is not allowed", "method=lora", "method.init=eva", "method.rho=0.5"),
    command(r"with method\.init=lora_ga, which takes two", "method=lora", "method.init=lora_ga", "allocator.budget=60"),
    command(r"^method=full trains the weights themselves, and model\.dtype=bf", "method=full", "model.dtype=bfloat16"),
]
MORE_COMMANDS = [
    command(r"^budget=2 cannot give 3 layers 1 expert each; use allocator\.budget>=3", "allocator.budget=2"),
    command(r"^task\.path=/nowhere is not a folder", "task.path=/nowhere"),
    command(r"no column 'nothing'", "task.columns.question=nothing"),
    command(r"^probe\.parameters=lora needs a LoRA adapter", "probe.parameters=lora"),
    command(r"the same rows would be learned or scored from and evaluated on", "task.splits.validation=test"),
    command(r"smoothing with window=7 needs at least 7 layers, got 3", "allocator=sparsity", "method=none"),
    command(r"^task\.pattern='\[' is not a regular expression", "task.pattern='['"),
    command(r"^evaluation\.window=1 is not allowed", "evaluation.window=1"),
    command(r"^probe\.num_train=0 is not allowed; allowed: a whole number of at least 1", "probe.num_train=0"),
    command(r"method=fusion needs a second model; add one with \+model@method\.other=local", "method=fusion"),
    command(r"^method\.training_tokens=0\.0 is not allowed", "method=plan", "method.training_tokens=0.0"),
    command(r"^estimator\.sets=0 is not allowed", "estimator=cca", "estimator.sets=0"),
    command(r"^trainer\.max_steps='abc' is not allowed", "trainer.max_steps=abc"),
    command(r"^trainer\.precision='float' is not allowed", "trainer.precision=float"),
    command(r"^trainer: ", "trainer.accelerator=tpu"),
    command(
        r"method=prune spends sparsity; use allocator=sparsity, or method=lora_equal, method=lora_moe,",
        "method=prune",
        "allocator=experts",
    ),
    command(
        r"method=lora spends rank or layers; use allocator=rank or allocator=layers with an estimator",
        "method=lora",
        "estimator=loss_curve",
    ),
    command(
        r"^estimator=datainf gives scores, and this allocator spends curves; with method=prune use allocator=sparsity, "
        r"or estimator=loss_curve$",
        "method=prune",
        "allocator=knapsack",
    ),
    command(
        r"^estimator=loss_curve prices sparsity, and method=drop spends blocks; use an estimator of scores",
        "method=drop",
        "estimator=loss_curve",
    ),
    command(
        r"^allocator\.keep=3 keeps all of 3 blocks; use a whole number from 1 to 2",
        "method=drop",
        "allocator.keep=3",
    ),
    command(r"^allocator\.keep=0 is not allowed; allowed: a finite number above 0", "method=drop", "allocator.keep=0"),
    command(
        r"^allocator\.unit=sublayer cannot be spent: estimator=datainf scores blocks",
        "method=drop",
        "allocator.keep=2",
        "allocator.unit=sublayer",
    ),
    command(
        r"^method\.search=greedy takes allocator\.keep and allocator\.unit.*; use allocator=blocks",
        "method=drop",
        "method.search=greedy",
        "allocator=position",
        "allocator.kind=blocks",
        "allocator.keep=2",
    ),
    command(
        r"'dwn_proj', .* \(did you mean 'down_proj'\?\)",
        "method=prune",
        "estimator=loss_curve",
        "pruner.skip=[dwn_proj]",
    ),
    command(r"/nowhere\.json", "estimator=file", "estimator.path=/nowhere.json"),
    command(r"the adapter '/nowhere' holds no adapter_config\.json", "model.adapter=/nowhere"),
    command(
        r"'q_porj', which is not a layer of this model \(did you mean 'q_proj'\?\)", "method.target_modules=[q_porj]"
    ),
    command(
        r"^method\.warmup_steps=-5 is not allowed; allowed: a whole number of at least 0", "method.warmup_steps=-5"
    ),
    command(
        r"the allocator gives rank, and method=lora_moe spends experts or layers; use allocator=experts or allocator=l",
        "allocator=rank",
    ),
    command(r"^trainer\.gradient_clip_val=-1 is not allowed; allowed: at least 0", "trainer.gradient_clip_val=-1"),
    command(r"^data\.seed=-1 is not allowed", "data.seed=-1"),
    command(r"^probe\.projection_seed=4294967296 is not allowed", "probe.projection_seed=4294967296"),
    command(r"^data\.batch_size=10+ is not allowed", f"data.batch_size=1{'0' * 30}"),
    command(r"^estimator\.num_steps=10+ is not allowed", "estimator=lissa", f"estimator.num_steps=1{'0' * 30}"),
    command(r"^name=null is not allowed: ", "name=null"),
    command(r"^hydra\.mode=x is not allowed: Invalid value 'x'", "hydra.mode=x"),
    command(r"^hydra\.verbose=5 is not allowed; allowed: true, false", "hydra.verbose=5"),
    command(r"^hydra\.sweeper=None is not allowed; allowed: sweeper=NAME", "-m", "hydra.sweeper=null"),
    command(r"^model\.path: model=None has no settings", "model=[]"),
    command(r"the sweep has no job, because a value such as glob", "-m", "seed=glob(*)", dry_run=False),
]

YAMLS = [
    command(says, yaml=OURS + text)
    for says, text in [
        (r"^task\.name='a\\x00b' is not allowed; allowed: a text without the character NUL", r'task: {name: "a\0b"}'),
        (r"^task\.1 is not known to layerif\.data\.task\.Task", "task: {1: 2}"),
        (r"^estimator\._partial_=True is not allowed", "estimator: {_partial_: true}"),
        (r"^data has no 'splits'", "data: {_partial_: false}"),
        (r"no viable alternative at input '\$\{unclosed'", "task: {name: '${unclosed'}"),
        (r"Incompatible key type 'NoneType'", "null: 2"),
        (r"'1' is not a key of the configuration", "1: 2"),
        (r"estimator\._args_ is not allowed", "estimator: {_args_: [1]}"),
        (r"estimator\._recursive_ is not allowed", "estimator: {_recursive_: false}"),
        (r"_target_", "estimator: {_target_: 5}"),
        (r"_target_", "estimator: {_target_: ''}"),
        (r"_target_", "estimator: {_target_: null}"),
        (r"experiment/mine", "probe: [1]"),
        (r"probe=None is not allowed", "probe: null"),
        (r"probe", "probe: 5"),
        (r"seed", "seed: .nan"),
        (r"seed", "seed: 2020-01-01"),
        (r"nosuch", "name: ${nosuch}"),
        (r"NOSUCH", "task: {name: '${oc.env:NOSUCH}'}"),
        (r"nosuch", "task: {name: '${nosuch:1}'}"),
        (r"(?i)recurs|interpolation", "name: ${name}"),
        (r"(?i)default", "defaults: nosuch"),
        (r"(?i)default", "defaults: [5]"),
        (r"hydra\.run", "hydra: {run: null}"),
        (r"(?i)hydra\.job|name", "hydra: {job: null}"),
        (r"(?i)launcher|subclass", "hydra: {launcher: 5}"),
        (r"python/object|tag", "a: !!python/object/apply:os.system [x]"),
        (r"Cannot merge DictConfig with ListConfig", "- 1\n- 2"),
        (r"_target_", "_target_: os.system"),
        (r"mode", "hydra: {mode: 5}"),
    ]
]


def groups() -> Iterator[Bad]:
    """Every group of `conf/` as null, as a number and with a letter too many."""
    for folder in sorted(each for each in conf_folder().iterdir() if each.is_dir() and each.name != "hydra"):
        choices = sorted(file.stem for file in folder.glob("*.yaml"))
        for value in ("null", "5", f"{choices[0]}x"):
            yield command(
                rf"^{folder.name}={value} is not a choice of the group '{folder.name}'", f"{folder.name}={value}"
            )


def paths() -> Iterator[Bad]:
    """Every setting that is a path, where there is nothing, an empty file, an empty folder or no path at all."""
    prune = ("method=prune", "allocator=sparsity", "allocator.smoothing=false")
    settings = {
        "model.path": (),
        "model.adapter": (),
        "task.path": (),
        "estimator.path": ("estimator=file",),
        "allocator.path": ("allocator=file",),
        "estimator.checkpoints": ("estimator=tracin", "estimator.learning_rates=[1]"),
        "evaluation.text": ("evaluation.metrics=[perplexity]", "evaluation.window=16"),
        "method.calibration.text": prune,
        "outputs": (),
        "hydra.run.dir": (),
    }
    values = {
        "/nowhere": "nowhere",
        "{folder}/empty": "empty|window",
        "{folder}/nothing": "nothing",
        LONG_NAME: "too long",
        LONG_PATH: "too long",
        "'a\0b'": "NUL",
        "''": r"'\.?'|is empty",
        "[[]]": r"\[\[?\]",
    }
    for setting, others in settings.items():
        for value, says in values.items():
            can_be_made = setting in ("outputs", "hydra.run.dir")
            if can_be_made and value not in ("{folder}/empty", LONG_NAME, LONG_PATH, "'a\0b'"):
                continue
            given = f"[{value}]" if setting == "estimator.checkpoints" else value
            yield command(f"(?i){says}", *others, f"{setting}={given}")


# The record of a run of full fine-tuning, and its folder without a configuration.
RAN = {"version": 2, "name": "a", "seed": 0, "choices": {"method": "full"}, "config": {}, "overrides": []}
LEFT = {"a__record_json": RAN, "a__model__config_json": "{}"}

PROGRAMS = [
    program(report.main, "'nowhere' is not a folder", "nowhere"),
    program(report.main, "'a\\.txt' is a file: give the folder", "a.txt", a_txt=""),
    program(report.main, "'a' holds no record", "a", a__b_txt=""),
    program(report.main, "none of the 1 records", "a", a__record_json="5"),
    program(report.main, "expected.json cannot be read", ".", "--expected=expected.json"),
    program(report.main, "expected.json cannot be read.* nested", ".", "--expected=expected.json", expected_json=DEEP),
    program(store.main, "'nowhere' is not a folder", "--store=nowhere"),
    program(store.main, "'a.txt' is not a folder", "--store=a.txt", a_txt=""),
    program(store.main, "say what to clear, one way", "--store=.", "clear"),
    program(store.main, "'ab' is the start of 0 keys", "--store=.", "clear", "ab"),
    program(store.main, "holds no measurements", "--store=a", a__b_txt="x"),
    program(export.main, "'nowhere' is not a folder; give that of", "nowhere", "--to=merged"),
    program(export.main, "'a\\.txt' is not a folder", "a.txt", "--to=merged", a_txt=""),
    program(export.main, r"it has no record\.json \(did you mean 'a/b'\?\)", "a", "--to=merged", a__b__record_json="5"),
    program(export.main, "its run failed", "a", "--to=merged", a__failure_json="{}"),
    program(export.main, "not a readable record", "a", "--to=merged", a__record_json="5"),
    program(export.main, r"--to='merge'.*did you mean 'merged'", "a", "--to=merge", a__record_json=RAN),
    program(export.main, "'b' is there already", "a", "--to=merged", "--into=b", a__record_json=RAN, b__c_txt=""),
    program(export.main, "method=full, which left nothing to hand over", "a", "--to=merged", a__record_json=RAN),
    program(export.main, r"config\.yaml is missing", "a", "--to=merged", **LEFT),
]


# Curves


def made(says: str, kind: Callable[..., object], /, **settings: Any) -> Bad:
    """An object of a choice with these settings."""
    return Bad(f"{kind.__name__} {settings}", says, lambda place: kind(**settings))


def spent(*, kind: Literal["sparsity", "bits"] = "sparsity", **settings: Any) -> None:
    """Curves of a model with one matrix, spent by a knapsack with these settings."""
    layers = LayerMap(("a.0",), (("a.0.up.weight",),), (64,), (64,))
    levels = (0.0, 0.5, 0.9) if kind == "sparsity" else tuple(each.bits for each in formats_called("gguf"))
    Knapsack(**settings)(equal_curves(layers, "matrix", levels, kind == "bits", kind))


CURVES_AND_PRUNERS = [
    made(
        r"^the weights of estimator\.loss_text add up to 1\.1; give", LossCurve, loss_text={"windows": 0.5, "task": 0.6}
    ),
    made(r"^estimator\.loss_text='tsk' is not allowed; .*'task'", LossCurve, loss_text="tsk"),
    made(r"^estimator\.loss_text\.task=0 is not allowed", LossCurve, loss_text={"windows": 1.0, "task": 0}),
    made(r"^estimator\.masks='wonda' is not allowed; .*\(did you mean 'wanda'\?\)$", LossCurve, masks="wonda"),
    made(r"^estimator\.form='fast' is not allowed; allowed: exact, diagonal", LossCurve, form="fast"),
    made(r"^estimator\.tokens=0 is not allowed", LossCurve, tokens=0),
    made(r"^estimator\.levels=\[0\.5, 0\.3, 0\.7\] must be .* ascending; or null$", LossCurve, levels=[0.5, 0.3, 0.7]),
    made(r"^estimator\.levels=\[0\.5, 0\.7\] must be three or more", MeasuredLoss, levels=[0.5, 0.7]),
    made(r"has no meaning with pruner\.m=4", MeasuredLoss, levels=[0.3, 0.5, 0.7], pruner=Wanda(m=4)),
    made(r"^allocator\.target=0\.95 is outside the feasible range 0\.2 to 0\.9; change it", spent, target=0.95),
    made(r"^allocator\.target=0\.5 is outside the feasible range 0\.6 to 0\.9", spent, target=0.5, floor=0.6),
    made(r"^allocator\.target=5\.0 is not allowed; allowed: a finite number below 1", spent, target=5.0),
    made(r"^allocator\.target=9\.0 is outside the feasible range 4\.25 to 8\.5 bits", spent, kind="bits", target=9.0),
    made(r"^allocator\.target=0\.5 is outside the feasible range 4\.25 to 8\.5 bits", spent, kind="bits"),
    made(r"^estimator\.formats='Q4_00' is not allowed; .*\(did you mean 'Q4_0'\?\)$", BitsCurve, formats=["Q4_00"]),
    made(
        r"^estimator\.formats names INT4_ASYM and Q4_0, which both take 4\.5 bits",
        BitsCurve,
        formats=["INT4_ASYM", "Q4_0"],
    ),
    made(r"^estimator\.formats=\[\] names none; give gguf, all, or some of", BitsCurve, formats=[]),
    made(r"^allocator\.unit='matrx' is not allowed; .*'matrix'", Knapsack, unit="matrx"),
    made(r"^method\.swaps\.forwards=0 is not allowed; allowed: a whole number of at least 1", Refine, forwards=0),
    made(r"^pruner\.n=2 needs pruner\.m", Wanda, n=2),
]


# Stores


def kept(says: str, path: str) -> Bad:
    """A store at this path, which is refused before anything is measured for it."""

    def give(place: Place) -> object:
        (place.folder / "empty").touch()
        here = Store(path.replace("{folder}", str(place.folder)))
        return here.kept(MeasurementKind("grams", "passes"), {}, lambda key: pytest.fail("it was measured"))

    return Bad(f"store={path[:60]}", says, give)


STORES = [kept("Not a directory", "{folder}/empty"), kept("is too long", LONG_NAME), kept("is too long", LONG_PATH)]


# Rows


def row(says: str, content: Any, file: str = "test.jsonl", **fields: Any) -> Bad:
    """A file of the task with this content, read with these settings of the task."""

    def give(place: Place) -> object:
        folder = place.spoilt(place.task, file, content)
        return replace(shipped_task("jsonl"), path=str(folder), **fields).load()

    return Bad(f"{str(content)[:60]} {fields}", says, give)


def line(says: str, text: str | bytes, **changes: Any) -> Bad:
    """A file of which only the second line is wrong."""
    return row(rf"test\.jsonl:2.*{says}", json.dumps(_ROW).encode() + b"\n" + as_bytes(text) + b"\n", **changes)


def column(says: str, **values: Any) -> Bad:
    """A row of which some columns are wrong."""
    return line(says, json.dumps({**_ROW, "question": "And?", **values}))


def template(says: str, field: str, value: str) -> Bad:
    """A template that fails in the first row."""
    return Bad(
        f"{field}={value}",
        rf"(\.jsonl:1: )?task\.{field}.*{says}",
        lambda place: replace(shipped_task("jsonl"), path=str(place.task), **{field: value}).load(),
    )


_ROW = {"question": "Which?", "options": ["a", "b"], "answer": 0}
ROWS = [
    row(r"test\.jsonl is empty; it must hold a JSON object per line", "\n\n \n\t\n"),
    row(r"test\.jsonl is a folder; it must be a file", None),
    row(r"test\.jsonl is not UTF-8", "\ufeff{}".encode("utf-16")),
    row(r"test\.jsonl is not UTF-8", b"\x1f\x8b\x08\x00"),
    line(r"nested too deeply; at most 100 levels", DEEP),
    line(r"nested too deeply; at most 100 levels", '{"question": ' + "[" * 200 + "]" * 200 + "}"),
    line(r"a whole number of too many digits", f'{{"question": "Which?", "answer": {ENDLESS}}}'),
    line(r"half a character \(a lone surrogate\)", r'{"question": "\ud800"}'),
    line(r"half a character", r'{"\udfff": 1}'),
    line(r"is not a JSON object", "null"),
    line(r"is not a JSON object", "5"),
    line(r"is not valid JSON", "{'question': 'Which?'}"),
    line(r"is not valid JSON", '{"question": "Wh\0ich?"}'),
    line(r"has no column 'question' \(columns: none\)", "{}"),
    column(r"the answer 0\.5 is none of the labels", answer=0.5),
    column(r"the answer nan is none of the labels", answer=math.nan),
    column(r"the answer \{\} is none of the labels", answer={}),
    column(r"the answer 10+ is none of the labels", answer=10**400),
    column(r"the options .* are not usable", options=7),
    column(r"the options .* are not usable", options={"text": ["a"]}),
    column(r"the options .* are not usable", options=[{"text": "a"}, 5]),
    column(r"the options .* are not usable", options=[str(number) for number in range(27)]),
    template(r"ZeroDivisionError: division by zero", "instruction", "{{ 1 / 0 }}"),
    template(r"RecursionError", "instruction", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    template(r"TypeError", "output", "{{ label + 1 }}"),
    template(r"OverflowError: Range too big", "instruction", "{{ range(10 ** 9) | list }}"),
    template(r"UnicodeEncodeError", "instruction", r"{{ '\ud800' }}{{ question }}"),
    template(r"'options\[9\]' uses an unknown name", "answer", "options[9]"),
    template(r"ZeroDivisionError", "keep", "1 / 0"),
    template(r"gave 5; give a list of texts", "labels", "5"),
    template(r"is not Jinja: RecursionError", "labels", "(" * 5000 + ")" * 5000),
]


# Files of scores and of allocations


_LAYERS = LayerMap(("a", "b", "c"), (("q",),) * 3, (10,) * 3)
_EQUAL = LayerScores(_LAYERS.names, (1.0, 1.0, 1.0), "undertrained", "equal", "none")


def saved(says: str, content: Any, *, scores: bool | None = None) -> list[Bad]:
    """A file of scores, of an allocation, or (None) of both with the same fault."""

    def of(what: str) -> Callable[[Place], object]:
        def give(place: Place) -> object:
            file = place.folder / "saved.json"
            file.write_bytes(as_bytes(content))
            if what == "scores":
                return SavedScores(path=str(file)).score(_LAYERS)
            return SavedAllocation(path=str(file))(_EQUAL, _LAYERS)

        return give

    kinds = ["scores", "allocation"] if scores is None else ["scores" if scores else "allocation"]
    return [Bad(f"{kind} {str(content)[:60]}", rf"(?=.*saved\.json).*{says}", of(kind)) for kind in kinds]


def _given(values: Any, layers: Any = ("a", "b", "c"), **others: Any) -> dict[str, Any]:
    return {"layers": layers, "values": values, "higher_means": "undertrained", **others}


SAVED = [
    *saved(r"10{20}", _given([1, 10**400, 1])),
    *saved(r"nan", _given([1, math.nan, 1])),
    *saved(r"inf", _given([1, math.inf, 1])),
    *saved(r"got -1", _given([1, -1, 1])),
    *saved(r"got True", _given([1, True, 1])),
    *saved(r"got None", _given([1, None, 1])),
    *saved(r"got \[\]", _given([1, [], 1])),
    *saved(r"must not name the layer 'a' twice", _given([1, 1, 1], ["a", "a", "b"])),
    *saved(r"must name each layer by a text; got 5", _given([1, 1, 1], ["a", 5, "b"])),
    *saved(r"got 2 for 3 layers", _given([1, 1])),
    *saved(r"lists for", _given({"a": 1})),
    *saved(r"'d'", _given([1, 1, 1], ["a", "b", "d"])),
    *saved(r"lacks 1 of the model's 3 layers", _given([1, 1], ["a", "b"])),
    *saved(r"nested too deeply", DEEP),
    *saved(r"too many digits", f"[{ENDLESS}]"),
    *saved(r"half a character", r'{"a": "\ud800"}'),
    *saved(r"not valid JSON", b"\xff\xfe"),
    *saved(r"lacks layers|must hold a value per layer", "null"),
    *saved(r"lacks layers|must hold a value per layer", 5),
    *saved(r"decision in .* must be an object; got 5", {"version": 2, "decision": 5}),
    *saved(r"must be an object; got 5", {"version": 2, "decision": {"scores": 5, "allocation": 5}}),
    *saved(r"higher_means .* is not allowed", _given([1, 1, 1], higher_means="sideways"), scores=True),
    *saved(r"finite numbers", [1, 10**400, 1], scores=False),
    *saved(
        r"'allocation' in|is not allowed|kind",
        {"allocation": {"kind": 5, "values": [1], "units": ["a"]}},
        scores=False,
    ),
]


# Folders of models


def model(says: str, file: str, content: Any) -> Bad:
    """A folder of a model of which one file has this content; a dictionary changes config.json."""

    def give(place: Place) -> object:
        spoilt = content
        if isinstance(content, dict) and file == "config.json":
            spoilt = {**json.loads((place.model / file).read_text()), **content}
        found = LocalModel(path=str(place.spoilt(place.model, file, spoilt)))
        found.check()
        return found.load()

    return Bad(f"{file} {str(content)[:60]}", says, give)


MODELS = [
    model(r"config\.json", "config.json", ""),
    model(r"config\.json", "config.json", "5"),
    model(r"config\.json", "config.json", b"\xff"),
    model(r"config\.json.* nested too deeply", "config.json", DEEP),
    model(r"holds no config\.json", "config.json", None),
    model(r"hidden_size", "config.json", {"hidden_size": -32}),
    model(r"hidden_size", "config.json", {"hidden_size": 0}),
    model(r"vocab_size=0", "config.json", {"vocab_size": 0}),
    model(r"vocab_size", "config.json", {"vocab_size": -1}),
    model(r"num_hidden_layers", "config.json", {"num_hidden_layers": "three"}),
    model(r"model type `nosuch`", "config.json", {"model_type": "nosuch"}),
    model(r"model type `5`", "config.json", {"model_type": 5}),
    model(r"head_dim", "config.json", {"head_dim": 7}),
    model(r"KeyError: 'nosuch'", "config.json", {"rope_scaling": {"rope_type": "nosuch", "factor": 2.0}}),
    model(
        r"has no head that predicts the next token",
        "config.json",
        {"architectures": ["LlamaForSequenceClassification"]},
    ),
    model(r"^cannot load the tokenizer in ", "tokenizer.json", ""),
    model(r"^cannot load the tokenizer in ", "tokenizer.json", "[]"),
    model(r"^cannot load the tokenizer in ", "tokenizer_config.json", "[]"),
    model(r"^cannot load the tokenizer in ", "tokenizer_config.json", "{"),
    model(r"header too small", "model.safetensors", ""),
    model(r"header too large", "model.safetensors", b"\xff" * 100),
    model(r"30 of 30 are missing", "model.safetensors", b"\x02\0\0\0\0\0\0\0{}"),
    model(r"no file named model\.safetensors", "model.safetensors", None),
    model(r"model\.safetensors\.index\.json", "model.safetensors.index.json", "5"),
    model(r"model\.safetensors\.index\.json", "model.safetensors.index.json", {"weight_map": {"a": 5}}),
    model(r"lies outside the folder", "model.safetensors.index.json", {"weight_map": {"a": "../b"}}),
]


# Records


# What a record must not hold, and what is said of it.
RECORDS: list[tuple[Any, str]] = [
    ({"hello": 1}, "unknown key 'hello'; is it another program's file?"),
    ({"decision": {"scores": {"values": "none"}}}, "decision.scores.values='none': input should be a valid array"),
    ({"decision": {"scores": {"values": [1.0]}}}, "decision.scores.values has 1 numbers for 4 names"),
    ({"decision": {"allocation": {"values": [1]}}}, "decision.allocation.values has 1 numbers for 4 names"),
    ({"decision": {"allocation": None}}, "decision.allocation='None'"),
    ({"seed": "zero"}, "seed='zero': input should be a valid integer"),
    ({"answers": {"accuracy": [1, 2]}}, "answers.accuracy='[1, 2]'"),
    ({"routing": {"block.0": {"entropy": 1.0}}}, "it lacks routing.block.0.load"),
    ({"measurements": [{"kind": "grams"}]}, "it lacks measurements.0.reused"),
    ({"notes": None}, "notes='None'"),
    ({"metrics": {"accuracy": "high"}}, "metrics.accuracy='high': input should be a number"),
    ({"metrics": {"accuracy": None}}, "metrics.accuracy='None': input should be a number"),
    ({"metrics": {"accuracy": True}}, "metrics.accuracy='True': input should be a number"),
    ({"metrics": {"accuracy": 2.0}}, "metrics.accuracy=2.0: input should be a fraction from 0 to 1"),
    ({"metrics": {"before/accuracy_low": -0.1}}, "metrics.before/accuracy_low=-0.1: input should be a fraction"),
    ({"metrics": {"accuracy": math.nan}}, "metrics.accuracy=nan: input should be a finite number"),
    ({"metrics": {"perplexity": 0.0}}, "metrics.perplexity=0.0: input should be above 0"),
    ({"metrics": {"lm_eval/boolq/acc": "x"}}, "metrics.lm_eval/boolq/acc='x': input should be a number"),
    ({"seconds": {"fit": math.inf}}, "seconds.fit=inf: input should be a finite number"),
    ({"parameters": {"total": 10**400}}, "parameters.total=1000"),
    ({"config": {"estimator": {"damping": math.nan}}}, "config.estimator.damping=nan: input should be a finite"),
    ({"config": {"model": 5}}, "it lacks config.model"),
    ({"config": {"task": {"name": None}}}, "it lacks config.task.name"),
    ({"choices": {"estimator": 5}}, "choices.estimator='5': input should be a valid string"),
    (DEEP, "it is nested too deeply"),
    (r'{"name": "\ud800"}', "it holds '\\ud800', which is half a character"),
    (f'{{"seed": {ENDLESS}}}', "it holds a whole number of too many digits"),
    (b"\xff\xfe", "'utf-8' codec can't decode"),
    ("", "Expecting value"),
    ("[]", "it holds a list, not an object"),
]
