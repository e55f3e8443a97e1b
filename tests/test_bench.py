"""`python -m lpln_autopatch bench`: what it prints, writes and refuses; no time is tested."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import itertools
import json
import math
import sys
import time
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support import (
    SMALL_MODELS,
    autocast,
    needs_dynamo,
    needs_library,
    output_dtype,
    run_forked,
    run_python,
)

from lpln_autopatch._torch_compat import CAN_COUNT, CPU_TAKES_MIXED_DTYPES, TORCH_VERSION
from lpln_autopatch.bench import call, suites, timing, zoo
from lpln_autopatch.bench.call import Layer
from lpln_autopatch.bench.contenders import Contender
from lpln_autopatch.bench.recipe import ComposerRecipe
from lpln_autopatch.bench.results import Quartiles, Row, plot, table
from lpln_autopatch.bench.timing import Entry

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
HAS_KERNELS = TORCH_VERSION >= (2, 6) and importlib.util.find_spec("triton") is not None
recipe_runs = pytest.mark.skipif(
    TORCH_VERSION < (2, 2), reason="the recipe's CPU kernels are in torch >= 2.2; CI runs it there"
)
needs_extra = pytest.mark.skipif(
    TORCH_VERSION < (2, 5),
    reason="GradScaler and scikit-learn want a newer torch; CI runs it there",
)


def bench(folder: Path, *arguments: str) -> tuple[str, dict[str, list[dict]]]:
    """What a quick run prints, and the suites of the JSON that it writes."""
    file = folder / "figures.json"
    command = ["-m", "lpln_autopatch", "bench", *arguments, "--device", "cpu", "--quick"]
    result = run_forked(*command, "--json", str(file), timeout=600, cwd=folder)
    printed = result.stdout
    content = json.loads(file.read_text())
    assert content["command"].startswith("python -m lpln_autopatch bench ")
    assert torch.__version__ in content["versions"]
    assert content["device"].startswith("cpu")
    for suite, rows in content["suites"].items():
        check_rows(rows, printed)
        check_progress(suite, result.stderr)
        for name in {name for row in rows for name in row["figures"]}:
            explained = name.split()[0] if name.startswith(("/", "error")) else name
            assert explained in importlib.import_module(f"lpln_autopatch.bench.{suite}").LEGEND
    return printed, content["suites"]


def check_rows(rows: list[dict], printed: str) -> None:
    """Every row has figures that are numbers in order, or a reason, and is in what was printed."""
    for row in rows:
        assert row.keys() == {"case", "contender", "figures", "reason", "curves"}
        assert (row["reason"] is None) or not row["figures"]
        assert row["contender"] in printed
        assert (row["reason"] or "") in printed
        for name, figure in row["figures"].items():
            if isinstance(figure, dict):
                assert 0 < figure["low"] <= figure["median"] <= figure["high"], name
            elif not isinstance(figure, str):
                assert math.isfinite(figure), name


def check_progress(suite: str, stderr: str) -> None:
    """Where stderr is no terminal, a line says when each case begins, and how many there are."""
    lines = [line for line in stderr.splitlines() if line.startswith(f"{suite}, ")]
    assert lines
    for place, line in enumerate(lines, 1):
        assert line.endswith(f" ({place} of {len(lines)})")


def contenders(rows: list[dict], measured: bool | None = None) -> list[list[str]]:
    """The contenders of each case; all of them, or those with or without figures."""
    cases: dict[str, list[str]] = {}
    for row in rows:
        names = cases.setdefault(str(row["case"]), [])
        if measured is None or measured == (row["reason"] is None):
            names.append(row["contender"])
    return list(cases.values())


def png(file: Path) -> bool:
    """Whether a file is a PNG."""
    return file.read_bytes().startswith(b"\x89PNG\r\n")


@recipe_runs
def test_recipe_is_composers(layer_norm):
    """The rival casts x, weight and bias, and gives the autocast dtype; stock outside it."""
    recipe = ComposerRecipe(8)
    recipe.load_state_dict(layer_norm.state_dict())
    x = torch.randn(4, 8)
    assert torch.equal(recipe(x), layer_norm(x))
    assert output_dtype(recipe) is BF16
    with autocast():
        y = recipe(x)
    cast = [t.to(BF16) for t in (x, recipe.weight, recipe.bias)]
    assert torch.equal(y, torch.nn.functional.layer_norm(cast[0], (8,), *cast[1:]))


def test_call_gives_every_ratio(tmp_path):
    """Stock, inert, lowered and the recipe, in every case, each with its ratio to stock.

    And a block, with its ratio to torch.autocast; and the host's time of each backend.
    """
    printed, written = bench(tmp_path, "call")
    assert list(written) == ["call"]
    assert "pass forward and backward, M 4096, N 1024, input float32" in printed
    number = 8 if CPU_TAKES_MIXED_DTYPES else 4
    cases = contenders(written["call"])
    calls, block, of_the_host = cases[:number], cases[number], cases[number + 1 :]
    assert block == ["a block"]
    (row,) = (row for row in written["call"] if row["contender"] == "a block")
    assert row["figures"]["/ torch.autocast"]["median"] > 1
    ours = ["lowered (native)", "lowered (fused)", "lowered (lean)"]
    if HAS_KERNELS:
        assert of_the_host == [["stock", "native on a GPU", *ours]] * 4
        assert "kernels stubbed out, M 8, N 64, input bfloat16" in printed
    else:
        assert of_the_host == [ours]
    for names in calls:
        assert sorted(names) == sorted(["stock", "inert", "lowered (native)", "Composer's recipe"])
    for row in written["call"]:
        if row["contender"] in ("inert", "lowered (native)") and row["reason"] is None:
            assert row["figures"]["/ stock"]["median"] < 100
    native = [row["figures"] for row in written["call"] if row["contender"] == "lowered (native)"]
    assert {figures["gives"] for figures in native if "gives" in figures} == {"bfloat16"}


@needs_dynamo
def test_step_is_compared_to_stocks(tmp_path):
    """Every backend and the recipe, eager and compiled: lowered, of the same loss, and timed."""
    (tmp_path / "small.py").write_text(SMALL_MODELS)
    models = ("--models", "small:make", "--modes", "eager", "compiled")
    printed, written = bench(tmp_path, "step", *models)
    eager, compiled = contenders(written["step"], measured=True)
    assert {"stock", "native", "recipe"} <= set(eager)
    assert compiled == ["stock", "native", "recipe"]
    assert "model small:make, mode eager, batch 1, autocast bfloat16" in printed
    for row in (row for row in written["step"] if row["reason"] is None):
        figures, name = row["figures"], row["contender"]
        ours = name not in ("stock", "recipe") and row["case"]["mode"] == "eager"
        assert figures.get("lowered", "") == "1 of 1" * ours
        assert ("/ stock" in figures) == (name != "stock")
        assert "ms" not in figures  # a CPU's says nothing about another machine
        assert figures["error"] < 4 * torch.finfo(BF16).eps


@pytest.mark.parametrize("suite", ["count", "step"])
def test_batches_are_so_many_of_the_models(suite, tmp_path, monkeypatch):
    """--batches: of every model, whichever suite runs it."""
    monkeypatch.setattr(suites, "CAN_COUNT", True)
    monkeypatch.setattr(zoo.Entry, "build", lambda entry: None)
    options = suites.parse([suite, "--device", "cpu", "--batches", "4", "--models", "bert-base"])
    ((case, entry, _),) = zoo.cases(options, [])
    assert case["batch"] == entry.batch == 4 * zoo.MODELS["bert-base"].batch


@needs_dynamo
def test_step_refuses_a_model_that_lowers_nothing(tmp_path):
    """A model without norms, and one that cannot be run: lines that say so, without figures."""
    (tmp_path / "small.py").write_text(SMALL_MODELS)
    printed, written = bench(tmp_path, "step", "--models", "small:bare", "small:fails")
    assert contenders(written["step"], measured=True)[0] == ["stock", "recipe"]
    assert "it lowers none of 0 norm calls" in printed
    assert contenders(written["step"], measured=True)[1] == []


@needs_extra
def test_loss_is_compared_over_seeds(tmp_path):
    """Both learn, from each seed; the curves are written and drawn."""
    plot = tmp_path / "figures.png"
    _, written = bench(tmp_path, "loss", "--plot", str(plot))
    assert contenders(written["loss"], measured=True) == [["stock", "lowered"]]
    assert [row["figures"]["gives"] for row in written["loss"]] == ["float32", "bfloat16"]
    for row in written["loss"]:
        assert [len(curve) for curve in row["curves"]] == [20] * 2
        last = [sum(curve[-2:]) / 2 for curve in row["curves"]]
        assert row["figures"]["final loss"] == pytest.approx(sum(last) / 2)
        assert row["figures"]["final loss"] < 5.2  # 5.55 = ln 256 untrained
        assert row["figures"]["spread of seeds"] > 0
    assert png(plot)


@pytest.mark.skipif(not CAN_COUNT, reason="CUDA's lists are in torch 2.13; CI runs this there")
def test_loss_under_cudas_policy_compares_every_arithmetic(tmp_path):
    """float32, stock and ours train on text and digits; stock leaks float32 as it does on CUDA."""
    _, written = bench(tmp_path, "loss", "--policy", "cuda", "--tasks", "text", "digits")
    ours = ["lowered (native)", "lowered (fused)", "lowered (lean)"]
    assert contenders(written["loss"], measured=True) == [["float32", "stock", *ours]] * 3
    for row in written["loss"]:
        low = row["case"]["autocast"] if row["contender"] in ours else "float32"
        assert row["figures"]["gives"] == low
        assert row["figures"]["gradient norm"] > 0
        assert row["figures"]["95 % +-"] >= 0
        assert abs(row["figures"]["largest minus stock"]) < 0.05


@pytest.mark.skipif(not CAN_COUNT, reason="CUDA's lists are in torch 2.13; CI runs this there")
@needs_library("transformers")
def test_loss_trains_models_that_write_their_norms_out(tmp_path):
    """Llama and OLMo 2: stock leaks float32, lowered none."""
    _, written = bench(tmp_path, "loss", "--policy", "cuda", "--tasks", "llama", "olmo2")
    assert (
        contenders(written["loss"], measured=True) == [["float32", "stock", "lowered (native)"]] * 2
    )
    for row in written["loss"]:
        lowered = row["contender"] == "lowered (native)"
        assert ("float32" in row["figures"]["gives"]) != lowered
        assert abs(row["figures"]["largest minus stock"]) < 0.05


@pytest.mark.skipif(not CAN_COUNT, reason="CUDA's lists are in torch 2.13; CI runs this there")
def test_loss_leaves_a_norm_stock_that_is_named(tmp_path):
    """--exempt: of a model of five norms the last gives float32, whatever the contender."""
    arguments = ("--policy", "cuda", "--exempt", "final_norm", "norm", "--dtype", "bfloat16")
    arguments += ("--lr", "0.01", "--tasks", "text", "digits")
    _, written = bench(tmp_path, "loss", *arguments)
    assert contenders(written["loss"], measured=False) == [[]] * 2
    for row in written["loss"]:
        lowered = "lowered" in row["contender"]
        assert row["figures"]["gives"] == ("bfloat16, float32" if lowered else "float32")


def run_contender(contender: Contender) -> tuple[dict, dict]:
    """What one contender gives on a small case: checked figures, and reasons."""
    passed, reasons = Layer((8, 64), FP32, BF16, CPU).check([contender])
    return {c.name: figures for c, figures in passed.items()}, list(reasons.values())


@pytest.mark.parametrize("factor", [1.1, math.nan])
def test_wrong_contender_is_not_timed(factor):
    """A contender whose values are wrong has a reason in place of figures."""

    class Wrong(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * factor

    passed, (reason,) = run_contender(Contender("wrong", Wrong))
    assert not passed
    assert reason.startswith("WrongResult: error of y ")


def test_wrong_gradient_is_not_timed():
    """Nor is one whose output is right and whose gradient is not."""

    class Wrong(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.detach() + (x - x.detach()) * 1.1)

    passed, (reason,) = run_contender(Contender("wrong", Wrong))
    assert not passed
    assert reason.startswith("WrongResult: error of dx 0.1")


@recipe_runs
@pytest.mark.parametrize("rows", [8, 4096])
@pytest.mark.parametrize("input_dtype", [FP32, BF16])
def test_wrong_gradient_of_weight_is_not_timed(rows, input_dtype):
    """Of weight alone, 15 % off; stock, the recipe and lowered pass, at 4096 rows too."""

    class Wrong(torch.nn.LayerNorm):
        def forward(self, x):
            weight = self.weight.detach() + (self.weight - self.weight.detach()) * 1.15
            return F.layer_norm(x, self.normalized_shape, weight, self.bias, self.eps)

    torch.manual_seed(0)
    right = [call.STOCK, Contender("lowered", backend="native"), call.RECIPE]
    layer = Layer((rows, 64), input_dtype, BF16, CPU)
    passed, reasons = layer.check([Contender("wrong", Wrong), *right])
    assert list(passed) == right
    (reason,) = reasons.values()
    assert reason.startswith("WrongResult: error of dweight 0.")


def test_lowered_that_runs_stock_is_not_timed():
    """One of ours that gives float32 is no figure of ours."""

    class Operator(torch.nn.LayerNorm):
        def forward(self, x):
            return torch.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    passed, (reason,) = run_contender(Contender("x", Operator, backend="native"))
    assert not passed
    assert reason == "WrongResult: it should give bfloat16 and gives float32"


def test_contender_that_fails_says_how():
    """Whatever a rival raises is its reason, and the others go on."""

    class Fails(torch.nn.LayerNorm):
        def forward(self, x):
            raise OSError("no such kernel\nand more")

    assert run_contender(Contender("fails", Fails)) == ({}, ["OSError: no such kernel"])
    assert run_contender(call.STOCK)[0].keys() == {"stock"}


def test_unknown_backend_is_a_reason():
    """A backend that this version does not have is a row that says so."""
    _, (reason,) = run_contender(Contender("x", backend="toaster"))
    assert "'toaster' is not a backend" in reason


def test_contender_leaves_the_module_as_it_was():
    """Inside, the LayerNorms have the contender's class; afterwards their own, errors or not."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    contender = Contender("recipe", ComposerRecipe)
    with contextlib.suppress(KeyError), contender.applied(model):
        assert type(model[1]) is ComposerRecipe
        raise KeyError
    assert type(model[1]) is torch.nn.LayerNorm


def test_contenders_take_turns():
    """In every round each once, after one call that is not timed, and not always after the same.

    The clock stops behind what was launched; the order is the same in every run.
    """

    def turns() -> str:
        calls: list[str] = []
        entries = [
            Entry(name, contextlib.nullcontext, lambda name=name: calls.append(name))
            for name in "abcd"
        ]

        progress = mock.Mock()
        clock = mock.Mock(side_effect=lambda: calls.append(">") or len(calls))
        with mock.patch.multiple(timing.time, perf_counter=clock, thread_time=clock):
            timing.interleave(entries, CPU, 12, progress)
        assert progress.update.call_count == 12
        # A call between two looks at the clock.
        assert [entry.seconds for entry in entries] == [[2.0] * 12] * 4
        return "".join(calls[-12 * 4 * 4 :])

    taken = turns()
    assert taken == turns()
    order = taken[::4]
    assert taken == "".join(f"{name}>{name}>" for name in order)
    rounds = [order[start : start + 4] for start in range(0, len(order), 4)]
    assert {"".join(sorted(each)) for each in rounds} == {"abcd"}
    for name in "abcd":
        before = {pair[0] for pair in map("".join, itertools.pairwise(order)) if pair[1] == name}
        assert before >= set("abcd") - {name}


def test_ratio_is_of_the_same_round():
    """A round that was slow for all does not show in a ratio."""
    ours, stock = (Entry(name, contextlib.nullcontext, int) for name in ("ours", "stock"))
    ours.seconds.extend([1.0, 10.0, 2.0])
    stock.seconds.extend([2.0, 20.0, 4.0])
    assert ours.over(stock) == Quartiles(0.5, 0.5, 0.5)


def test_table_lists_the_absent_once():
    """Who is in no case is listed below with the reason once; who is in one, for the others."""
    first, second = {"N": 1}, {"N": 2}
    rows = [
        *(Row(case, "absent", reason="not installed") for case in (first, second)),
        Row(first, "half", {"/ stock": Quartiles(0.5, 1.0, 2.0)}),
        Row(second, "half", reason="N is too large"),
        Row(second, "stock", {"loss": 1.23456}),
    ]
    printed = table(rows).splitlines()
    cells = [line.split(maxsplit=1) for line in printed]
    assert ["half", "1.00 (0.50 to 2.00)"] in cells
    assert ["stock", "1.235"] in cells
    absent = ["not measured: absent: not installed", "not measured: half, N 2: N is too large"]
    assert printed[-2:] == absent


@needs_extra
def test_plot_has_one_colour_for_a_contender(tmp_path, monkeypatch):
    """In every panel the same; ratios are on a logarithmic axis, curves are not."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    case, half = {"N": 1}, Quartiles(0.4, 0.5, 0.6)
    calls = [Row(case, name, {"/ stock": half}) for name in ("inert", "lowered")]
    curves = [Row(case, name, curves=[[3.0, 2.0]]) for name in ("stock", "lowered")]
    counts = [Row(case, "lowered", {"kept / stock": 0.7, "moved / stock": 0.8})]
    file = tmp_path / "figures.png"
    plot(file, "heading", {"count": counts, "call": calls, "loss": curves})
    assert png(file)
    panels = drawn[0].axes
    assert [panel.get_xscale() for panel in panels] == ["log", "log", "log", "linear"]
    (legend,) = drawn[0].legends
    colors = {text.get_text(): line.get_color() for line, text in
              zip(legend.get_lines(), legend.get_texts(), strict=True)}  # fmt: skip
    assert list(colors) == ["lowered", "inert", "stock"]
    assert len({*colors.values()}) == 3
    kept, _, times, losses = ([line.get_color() for line in panel.lines] for panel in panels)
    assert kept[0] == times[1] == losses[-1] == colors["lowered"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toast"], "'toast' is not a suite; valid: count, step, call, loss"),
        (["--quik"], "unrecognized arguments: --quik"),
        (["call", "--rounds", "1"], "--rounds: 1 is not a number from 2 on"),
        (["kernel"], "'kernel' is not a suite; valid: count, step, call, loss"),
        (["call", "--features", "8"], "unrecognized arguments: --features 8"),
        (["call", "--dtype", "float64"], "invalid choice: 'float64'"),
        (["call", "--json", "no/such/folder/x.json"], "there is no such folder"),
        (["call", "--json", "x.png", "--plot", "x.png"], "need a file each"),
        (["call", "--plot", "x.txt"], "ends in .png"),
        (["call", "--policy", "cuda"], "--policy is for loss alone"),
        (["call", "--qui"], "unrecognized arguments: --qui"),
        (["call", "--steps", "20"], "--steps is for loss, not for call"),
        (
            ["call", "loss", "--modes", "eager"],
            "--modes is for count and step, not for call and loss",
        ),
        (["call", "--json", "."], "it cannot be written"),
        (["loss", "--models", "gpt2"], "--models is for count and step, not for loss"),
    ],
)
def test_wrong_argument_is_one_line(arguments, message, capsys):
    """A wrong suite, option or value: one line that says what is valid, status 2."""
    with pytest.raises(SystemExit) as exited:
        suites.main(arguments)
    assert exited.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.skipif(not CAN_COUNT, reason="CUDA's lists are in torch 2.13; CI runs this there")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loss", "--exempt", "nrom"], "--exempt nrom: no model here has a module of that name"),
        (["count", "--norms", "bogus"], "'bogus' is not a norm. Valid: layer_norm"),
    ],
)
def test_wrong_name_is_one_line(arguments, message, capsys):
    """Of a module or a norm, before anything is measured: status 2."""
    with pytest.raises(SystemExit) as exited:
        suites.main([*arguments, "--device", "cpu", "--quick"])
    assert exited.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_recipe_replaces_the_norms_that_are_named():
    """With --norms group_norm GroupNorm alone, with all of them both."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.GroupNorm(2, 8))
    for norms, replaced in (("group_norm", [1]), ("layer_norm", [0]), ("all", [0, 1])):
        with Contender("recipe", ComposerRecipe, norms=norms).applied(model):
            named = [i for i, norm in enumerate(model) if "Composer" in type(norm).__name__]
        assert named == replaced


def test_interrupted_run_keeps_what_it_has_measured(tmp_path, monkeypatch, capsys):
    """Each suite is printed and written when it ends."""
    loss = importlib.import_module("lpln_autopatch.bench.loss")
    monkeypatch.setattr(call, "run", lambda options, progress: [])
    monkeypatch.setattr(loss, "run", mock.Mock(side_effect=KeyboardInterrupt))
    file = tmp_path / "figures.json"
    with pytest.raises(KeyboardInterrupt):
        suites.main(["loss", "call", "--device", "cpu", "--json", str(file)])
    assert list(json.loads(file.read_text())["suites"]) == ["call"]
    assert "call: one call" in capsys.readouterr().out


def test_older_torch_cannot_count(monkeypatch, capsys):
    """Before torch 2.13 `count` is refused in one line, status 2; the other suites run."""
    monkeypatch.setattr(suites, "CAN_COUNT", False)
    with pytest.raises(SystemExit) as exited:
        suites.main(["count"])
    assert exited.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"count needs torch 2.13 or later, this is {torch.__version__}" in line
    assert suites.parse(["--device", "cpu"]).suites == ["call", "loss"]


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "meta"])
def test_unusable_device_is_one_line(device):
    """A device that this torch does not know, or have, or cannot compute on: one line, status 1."""
    with pytest.raises(SystemExit, match=f"--device {device} cannot be used here: ") as exited:
        suites.main(["call", "--device", device])
    assert "\n" not in exited.value.code


@pytest.mark.parametrize(
    ("arguments", "package"), [(["--plot", "x.png"], "matplotlib"), ([], "tqdm")]
)
def test_missing_extra_is_one_line(arguments, package, monkeypatch):
    """A package of the extra that the run needs and that is not here: the command to install it."""
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"not installed: {package}\. pip install 'lpln_autopatch\[bench\]'"
    with pytest.raises(SystemExit, match=message):
        suites.main(["call", "--device", "cpu", *arguments])


@pytest.mark.skipif(not CAN_COUNT, reason="count is for torch 2.13 or later; CI runs it there")
def test_missing_extra_of_count_is_status_2(monkeypatch, capsys):
    """As a model or a library that count lacks."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit) as exited:
        suites.main(["count", "--device", "cpu"])
    assert exited.value.code == 2
    assert capsys.readouterr().err.startswith("not installed: tqdm. pip install")


@pytest.mark.skipif(TORCH_VERSION < (2, 5), reason="torch >= 2.5 loads entry points; CI runs it")
@pytest.mark.parametrize("module", [["lpln_autopatch", "bench"], ["lpln_autopatch.bench.error"]])
def test_patched_process_is_refused(module):
    """With LPLN_PRECISION set there is no stock to compare with: one line, status 1."""
    arguments = ["-m", *module, "--device", "cpu"]
    result = run_python(*arguments, check=False, LPLN_PRECISION="amp")
    assert result.returncode == 1
    assert "unset it" in result.stderr
    assert "Traceback" not in result.stderr


def test_backend_of_the_environment_is_refused(monkeypatch):
    """With LPLN_BACKEND set "auto" is not what it is for others: one line, status 1."""
    monkeypatch.setenv("LPLN_BACKEND", "native")
    with pytest.raises(SystemExit, match="LPLN_BACKEND is set: unset it"):
        suites.main(["call", "--device", "cpu"])


@recipe_runs
def test_error_prints_every_contender():
    """The error table runs as documented, and lowered is not above Composer's recipe in it."""
    printed = run_forked("-m", "lpln_autopatch.bench.error", "--rows", "64").stdout
    rows = [line.split() for line in printed.splitlines()]
    lowered = [list(map(float, row[1:])) for row in rows if row[:1] == ["lowered"]]
    composer = [list(map(float, row[2:])) for row in rows if row[:1] == ["Composer's"]]
    assert len(lowered) == len(composer) == 8
    for ours, theirs in zip(lowered, composer, strict=True):
        assert all(o <= t for o, t in zip(ours, theirs, strict=True))


@needs_extra
def test_plot_is_sorted_and_its_labels_are_short(tmp_path, monkeypatch):
    """The least of the first contender is on top, and labels have what tells cases apart."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    rows = [
        Row({"model": model, "mode": "eager", "batch": batch}, name, {"kept / stock": ratio})
        for model, batch, ratio in (("a", 8, 0.9), ("b", 8, 0.7), ("c", 64, 0.8))
        for name in ("stock", "native")
    ]
    plot(tmp_path / "x.png", "heading", {"count": rows})
    (panel,) = drawn[0].axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["b", "c", "a"]
    assert [line.get_xdata()[0] for line in panel.lines[:3]] == [0.9, 0.7, 0.8]
    assert [line.get_ydata()[0] for line in panel.lines[:3]] == [2, 0, 1]
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["native"]


@pytest.mark.parametrize(("seconds", "is_busy"), [(0.0, True), (9.0, False)])
def test_busy_machine_is_said(seconds, is_busy, monkeypatch, capsys):
    """A thread that had little of ten seconds waited for a core; on a GPU it waits for that."""
    for device in (CPU, torch.device("cuda")):
        clocks = {"perf_counter": iter([0.0, 10.0]), "thread_time": iter([0.0, seconds])}
        for name, values in clocks.items():
            monkeypatch.setattr(timing.time, name, functools.partial(next, values))
        with timing.warns_where_it_is_busy("call", device):
            pass
        said = capsys.readouterr().err
        assert ("call: the machine is busy" in said) == (is_busy and device == CPU)


def test_one_thread_of_a_cpu_is_timed_by_its_own_time(monkeypatch):
    """What other processes take of the core is not counted: sleeping costs nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    entry = Entry("sleeps", contextlib.nullcontext, lambda: time.sleep(0.02))
    timing.interleave([entry], CPU, 2, types.SimpleNamespace(update=lambda: None))
    torch.set_num_threads(threads)
    assert max(entry.seconds) < 0.01


def test_help_lists_the_models(capsys):
    """Each name that --models takes, and what a model of one's own needs."""
    with pytest.raises(SystemExit, match="0"):
        suites.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name in (
        "bert-base",
        "llama-1b",
        "roberta-base",
        "mvitv2_tiny",
        "make_batch(self, items, ",
    ):
        assert name in shown
