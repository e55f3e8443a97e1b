"""`python -m lpln_autopatch bench`: what it prints, writes and refuses; no time is tested."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support import autocast, output_dtype, run_python

from lpln_autopatch.bench import kernel, rivals, suites, timing
from lpln_autopatch.bench.layer import Case, Layer
from lpln_autopatch.bench.model import Training
from lpln_autopatch.bench.options import Options
from lpln_autopatch.bench.recipe import ComposerRecipe
from lpln_autopatch.bench.results import Row, table
from lpln_autopatch.bench.rivals import Contender, Stock
from lpln_autopatch.bench.timing import Entry, Quartiles, WrongResult
from lpln_autopatch.torch_compat import CAN_COUNT, CPU_TAKES_MIXED_DTYPES, TORCH_VERSION

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
OURS = ["lowered (native)", "lowered (fused)", "lowered (apex)"]
recipe_runs = pytest.mark.skipif(
    TORCH_VERSION < (2, 2), reason="the recipe's CPU kernels are in torch >= 2.2; CI runs it there"
)
needs_extra = pytest.mark.skipif(
    TORCH_VERSION < (2, 5), reason="transformers wants a newer torch; CI runs this there"
)


def bench(folder: Path, *arguments: str) -> tuple[str, dict[str, list[dict]]]:
    """What a quick run prints, and the suites of the JSON that it writes."""
    file = folder / "figures.json"
    command = ["-m", "lpln_autopatch", "bench", *arguments, "--device", "cpu", "--quick"]
    printed = run_python(*command, "--json", str(file), timeout=600).stdout
    content = json.loads(file.read_text())
    assert content["command"].startswith("python -m lpln_autopatch bench ")
    assert torch.__version__ in content["versions"]
    assert content["device"].startswith("cpu")
    for rows in content["suites"].values():
        check_rows(rows, printed)
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

    And the function by itself, stock and inert.
    """
    printed, written = bench(tmp_path, "call")
    assert list(written) == ["call"]
    assert "pass forward and backward, M 4096, N 1024, input float32" in printed
    assert len(contenders(written["call"])) == (8 if CPU_TAKES_MIXED_DTYPES else 4)
    for names in contenders(written["call"]):
        functions = ["stock F.layer_norm", "inert F.layer_norm"]
        assert sorted(names) == sorted(["stock", "inert", *OURS, "Composer's recipe", *functions])
    for row in written["call"]:
        if row["contender"] == "inert F.layer_norm":
            assert row["figures"]["/ stock F.layer_norm"]["median"] < 100
        if row["contender"] in ("inert", "lowered (native)"):
            assert row["figures"]["/ stock"]["median"] < 100
    native = [row["figures"] for row in written["call"] if row["contender"] == OURS[0]]
    assert {figures["gives"] for figures in native} == {"bfloat16"}


def test_kernel_measures_what_is_here(tmp_path):
    """Every contender is a row in both passes; a rival that is not here says why, and has none."""
    printed, written = bench(tmp_path, "kernel")
    everybody = ["stock", *OURS, "Composer's recipe", "stock, compiled", "lowered, compiled"]
    everybody += ["apex", "Liger", "timm fast_layer_norm", "QuACK", "copy"]
    for names in contenders(written["kernel"]):
        assert sorted(names) == sorted(everybody)
    for names in contenders(written["kernel"], measured=True):
        assert {"stock", OURS[0], "copy"} <= {*names}
        if TORCH_VERSION >= (2, 5):
            assert {"stock, compiled", "lowered, compiled"} <= {*names}
        assert not {"Liger", "QuACK", "lowered (fused)"} & {*names}
    assert "Liger                 runs on cuda, not on cpu" in printed
    rows = {
        row["contender"]: row["figures"]
        for row in written["kernel"]
        if row["case"]["pass"] == "forward and backward"
    }
    assert rows["stock"]["gives"] == "float32"
    assert rows[OURS[0]]["gives"] == "bfloat16"
    assert rows[OURS[0]]["error y"] <= 1.001 * rows["stock"]["error y"]
    # On CPU ratios alone: no time that another machine could be compared with.
    assert {"us", "GB/s"}.isdisjoint(rows["stock"])


def test_uncapturable_contender_has_a_reason(monkeypatch):
    """A contender that passes its check and fails while it is prepared does not end the run."""
    monkeypatch.setattr(timing, "graphed", lambda call: call)
    options = Options(CPU, quick=True, graph=True, rounds=2)
    entry = Layer.entry

    def entry_or_error(self, contender, backward, graph=False):
        if contender is rivals.LOWERED[0]:
            raise RuntimeError("cannot be captured")
        return entry(self, contender, backward, graph)

    monkeypatch.setattr(Layer, "entry", entry_or_error)
    progress = Counter()
    rows = kernel.run(options, progress)
    assert progress.count == progress.total == 4
    reasons = {row.contender: row.reason for row in rows}
    assert reasons[OURS[0]] == "RuntimeError: cannot be captured"
    assert reasons["stock"] is None


@needs_extra
def test_model_trains_each_of_the_three(tmp_path):
    """BERT, GPT-2 and ViT, stock, by Composer's surgery and lowered, checked and with a plot."""
    plot = tmp_path / "figures.png"
    _, written = bench(tmp_path, "model", "--modes", "eager", "--plot", str(plot))
    assert [row["case"]["model"] for row in written["model"][::5]] == ["bert", "gpt2", "vit"]
    for names in contenders(written["model"], measured=True):
        assert names == ["stock", OURS[0], "Composer's recipe"]
    gives = [row["figures"]["gives"] for row in written["model"] if row["reason"] is None]
    # On CPU autocast leaves a low-precision input alone, as in the head of BERT.
    assert gives[::3] == ["bfloat16, float32", "float32", "float32"]
    assert gives[1::3] == gives[2::3] == ["bfloat16"] * 3
    assert all(row["figures"]["saved MiB"] > 0 for row in written["model"] if not row["reason"])
    assert png(plot)


@needs_extra
def test_model_compiles(tmp_path):
    """Under torch.compile the three contenders are one model in three variants."""
    _, written = bench(tmp_path, "model", "--modes", "compiled", "--models", "vit")
    assert contenders(written["model"]) == [["stock", OURS[0], "Composer's recipe"]]
    assert not [row["reason"] for row in written["model"] if row["reason"]]
    gives = [row["figures"]["gives"] for row in written["model"] if row["reason"] is None]
    assert gives == ["float32", "bfloat16", "bfloat16"]


@needs_extra
def test_compiled_model_that_runs_stock_is_not_timed():
    """The check looks at what compiled LayerNorms give: values alone would let stock pass."""
    training = Training("vit", "compiled", torch.bfloat16, Options(CPU, quick=True))
    stock = Contender("lowered, but stock", lambda: Stock, backend="native", compiled=True)
    with pytest.raises(WrongResult, match="it should give bfloat16 and gives float32"):
        training.check(training.exact(), stock)


@needs_extra
def test_loss_is_compared_over_seeds(tmp_path):
    """Both learn, from each seed; the curves are written and drawn."""
    plot = tmp_path / "figures.png"
    arguments = ["--dtype", "bfloat16", "float16", "--steps", "30", "--seeds", "3"]
    _, written = bench(tmp_path, "loss", *arguments, "--plot", str(plot))
    assert contenders(written["loss"], measured=True) == [["stock", "lowered"]] * 2
    dtypes = [row["figures"]["gives"] for row in written["loss"]]
    assert dtypes == ["float32", "bfloat16", "float32", "float16"]
    for row in written["loss"]:
        assert [len(curve) for curve in row["curves"]] == [30] * 3
        last = [sum(curve[-3:]) / 3 for curve in row["curves"]]
        assert row["figures"]["final loss"] == pytest.approx(sum(last) / 3)
        assert row["figures"]["final loss"] < 5.0  # 5.55 = ln 256 untrained
        assert row["figures"]["spread of seeds"] > 0
    assert png(plot)


@pytest.mark.skipif(not CAN_COUNT, reason="CUDA's lists are in torch 2.13; CI runs this there")
def test_loss_under_cudas_policy_compares_every_arithmetic(tmp_path):
    """float32, stock and ours train on text and digits; stock leaks float32 as it does on CUDA."""
    _, written = bench(tmp_path, "loss", "--policy", "cuda")
    ours = ["lowered (native)", "lowered (rounded once)", "lowered (lean)"]
    assert contenders(written["loss"], measured=True) == [["float32", "stock", *ours]] * 3
    for row in written["loss"]:
        low = row["case"]["autocast"] if row["contender"] in ours else "float32"
        assert row["figures"]["gives"] == low
        assert row["figures"]["gradient norm"] > 0
        assert row["figures"]["95 % +-"] >= 0
        # The example's matrices round stock's output all the same: one training, bit by bit.
        same = row["case"]["task"] == "text" and row["contender"] == "lowered (rounded once)"
        if row["contender"] == "stock" or same:
            assert row["figures"]["minus stock"] == 0


def run_contender(contender: Contender) -> tuple[dict, dict]:
    """What one contender gives on a small case: checked figures, and reasons."""
    passed, reasons = Layer(Case(8, 64, FP32, BF16), CPU).check([contender])
    return {c.name: figures for c, figures in passed.items()}, list(reasons.values())


@pytest.mark.parametrize("factor", [1.1, math.nan])
def test_wrong_contender_is_not_timed(factor):
    """A contender whose values are wrong has a reason in place of figures."""

    class Wrong(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) * factor

    passed, (reason,) = run_contender(Contender("wrong", lambda: Wrong))
    assert not passed
    assert reason.startswith("WrongResult: error of y ")


def test_wrong_gradient_is_not_timed():
    """Nor is one whose output is right and whose gradient is not."""

    class Wrong(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.detach() + (x - x.detach()) * 1.1)

    passed, (reason,) = run_contender(Contender("wrong", lambda: Wrong))
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

    right = (rivals.STOCK, rivals.LOWERED[0], rivals.composer(CPU))
    layer = Layer(Case(rows, 64, input_dtype, BF16), CPU)
    passed, reasons = layer.check([Contender("wrong", lambda: Wrong), *right])
    assert list(passed) == list(right)
    (reason,) = reasons.values()
    assert reason.startswith("WrongResult: error of dweight 0.1")


def test_lowered_that_runs_stock_is_not_timed():
    """One of ours that gives float32 is no figure of ours."""
    passed, (reason,) = run_contender(Contender("x", lambda: rivals.Stock, backend="native"))
    assert not passed
    assert reason == "WrongResult: it should give bfloat16 and gives float32"


def test_contender_that_fails_says_how():
    """Whatever a rival raises is its reason, and the others go on."""

    class Fails(torch.nn.LayerNorm):
        def forward(self, x):
            raise OSError("no such kernel\nand more")

    assert run_contender(Contender("fails", lambda: Fails)) == ({}, ["OSError: no such kernel"])
    assert run_contender(rivals.STOCK)[0].keys() == {"stock"}


def test_unknown_backend_is_a_reason():
    """A backend that this version does not have is a row that says so."""
    _, (reason,) = run_contender(Contender("x", backend="toaster"))
    assert "'toaster' is not a backend" in reason


def test_contender_leaves_the_module_as_it_was():
    """Inside, the LayerNorms have the contender's class; afterwards their own, errors or not."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    contender = Contender("recipe", lambda: ComposerRecipe)
    with contextlib.suppress(KeyError), contender.applied(model):
        assert type(model[1]) is ComposerRecipe
        raise KeyError
    assert type(model[1]) is torch.nn.LayerNorm


def test_quack_is_differentiated_by_its_own_kernels(monkeypatch):
    """Its forward and its backward kernel become one function; here torch stands in for both."""

    def forward(x, weight, bias, eps, return_rstd, return_mean):
        y, mean, rstd = torch.native_layer_norm(x, (x.shape[-1],), weight, bias, eps)
        return y, rstd.flatten(), mean.flatten()

    def backward(x, weight, upstream, rstd, mean, has_bias):
        assert has_bias
        row = (x.shape[0], 1)
        return torch.ops.aten.native_layer_norm_backward(
            upstream, x, (x.shape[-1],), mean.view(row), rstd.view(row), weight, weight, [True] * 3
        )

    module = types.SimpleNamespace(layernorm_fwd=forward, layernorm_bwd=backward)
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.rmsnorm", module)
    passed, reasons = run_contender(Contender("QuACK", rivals._quack.__wrapped__))
    assert not reasons
    assert passed["QuACK"]["error dx"] < 1e-6
    assert passed["QuACK"]["error dweight"] < 1e-6


class Counter:
    """A progress bar that counts."""

    def __init__(self) -> None:
        self.count = 0

    def reset(self, total: float) -> None:
        self.total = total

    def set_description_str(self, desc: str) -> None:
        pass

    def update(self, n: float = 1) -> None:
        self.count += n


def test_contenders_take_turns():
    """In every round each once, after one call that is not timed, and not always after the same.

    The order is the same in every run.
    """

    def turns() -> str:
        calls: list[str] = []
        entries = [
            Entry(name, contextlib.nullcontext, lambda name=name: calls.append(name))
            for name in "abcd"
        ]

        def clock(run, device) -> float:
            calls.append(">")
            run()
            return 1.0

        progress = Counter()
        timing.interleave(entries, clock, CPU, 12, progress)
        assert progress.count == 12
        assert [entry.seconds for entry in entries] == [[1.0] * 12] * 4
        return "".join(calls[-12 * 4 * 3 :])

    taken = turns()
    assert taken == turns()
    order = taken[::3]
    assert taken == "".join(f"{name}>{name}" for name in order)
    rounds = [order[start : start + 4] for start in range(0, len(order), 4)]
    assert {"".join(sorted(each)) for each in rounds} == {"abcd"}
    for name in "abcd":
        before = {pair[0] for pair in map("".join, itertools.pairwise(order)) if pair[1] == name}
        assert before >= set("abcd") - {name}


def test_copy_writes_beside_the_cache():
    """Each input is copied to a place of its own, as large as the inputs together."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Targets(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.copy_.default:
                places.add(args[0].data_ptr())
            return function(*args, **(kwargs or {}))

    places: set[int] = set()
    layer = Layer(Case(8, 64, FP32, BF16), CPU, cache=8192)
    with Targets():
        kernel.copying(layer)()
    assert len(places) == len(layer.xs) == 9


def test_ratio_is_of_the_same_round():
    """A round that was slow for all does not show in a ratio."""
    ours, stock = (Entry(name, contextlib.nullcontext, int) for name in ("ours", "stock"))
    ours.seconds.extend([1.0, 10.0, 2.0])
    stock.seconds.extend([2.0, 20.0, 4.0])
    assert ours.over(stock) == Quartiles(0.5, 0.5, 0.5)


def test_grid_is_that_of_memory_bound_sizes():
    """On an accelerator the full grid has 128 MiB of output at every point, and no less."""
    cases = list(kernel.grid(Options(torch.device("cuda"))))
    assert len({*cases}) == len(cases) == 8 * 2 * 2 * 2
    assert all(case.rows * case.features * 2 >= 128 << 20 for case in cases)


def test_inputs_are_larger_than_the_cache():
    """The inputs of a case together are twice the cache, and differ."""
    layer = Layer(Case(64, 64, FP32, BF16), CPU, cache=64 << 10)
    assert sum(x.numel() * x.element_size() for x in layer.xs) > 128 << 10
    assert not torch.equal(layer.xs[0], layer.xs[1])


def test_table_lists_the_absent_once():
    """Who is in no case is listed below with the reason; who is in one says it in the others."""
    first, second = {"N": 1}, {"N": 2}
    rows = [
        *(Row(case, "absent", reason="not installed") for case in (first, second)),
        Row(first, "half", {"/ stock": Quartiles(0.5, 1.0, 2.0)}),
        Row(second, "half", reason="N is too large"),
        Row(second, "stock", {"GB/s": 1234.5}),
    ]
    printed = table(rows).splitlines()
    cells = [line.split(maxsplit=1) for line in printed]
    assert ["half", "1.00 (0.50 to 2.00)"] in cells
    assert ["half", "not measured: N is too large"] in cells
    assert ["stock", "1,234"] in cells
    assert cells[-2:] == [["not", "measured"], ["absent", "not installed"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["toast"], "'toast' is not a suite; valid: count, kernel, call, model, loss"),
        (["--quik"], "unrecognized arguments: --quik"),
        (["call", "--rounds", "1"], "--rounds: 1 is not a number from 2 on"),
        (["kernel", "--features", "none"], "--features: none is not a number from 1 on"),
        (["call", "--dtype", "float64"], "invalid choice: 'float64'"),
        (["call", "--json", "no/such/folder/x.json"], "there is no such folder"),
        (["call", "--json", "x.png", "--plot", "x.png"], "need a file each"),
        (["call", "--plot", "x.txt"], "ends in .png"),
        (["call", "--policy", "cuda"], "--policy is for loss alone"),
        (["call", "--qui"], "unrecognized arguments: --qui"),
        (["call", "--steps", "20"], "--steps is for loss, not for call"),
        (["kernel", "call", "--modes", "eager"], "--modes is for model and count, not for kernel"),
        (["call", "--json", "."], "it cannot be written"),
        (["model", "--models", "toast"], "--models: other models than bert, gpt2 and vit"),
        (["kernel", "--graph", "--device", "cpu"], "only a CUDA device has graphs"),
    ],
)
def test_wrong_argument_is_one_line(arguments, message, capsys):
    """A wrong suite, option or value: one line that says what is valid, status 2."""
    with pytest.raises(SystemExit) as exited:
        suites.main(arguments)
    assert exited.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_interrupted_run_keeps_what_it_has_measured(tmp_path, monkeypatch, capsys):
    """Each suite is printed and written when it ends."""

    def interrupted(options, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        importlib.import_module("lpln_autopatch.bench.kernel"), "run", lambda *_: []
    )
    monkeypatch.setattr(importlib.import_module("lpln_autopatch.bench.call"), "run", interrupted)
    file = tmp_path / "figures.json"
    with pytest.raises(KeyboardInterrupt):
        suites.main(["kernel", "call", "--device", "cpu", "--json", str(file)])
    assert list(json.loads(file.read_text())["suites"]) == ["kernel"]
    assert "kernel: LayerNorm alone" in capsys.readouterr().out


def test_older_torch_cannot_count(monkeypatch, capsys):
    """Before torch 2.13 `count` is refused in one line, status 2; the other suites run."""
    monkeypatch.setattr(suites, "CAN_COUNT", False)
    with pytest.raises(SystemExit) as exited:
        suites.main(["count"])
    assert exited.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"count needs torch 2.13 or later, this is {torch.__version__}" in line
    assert suites.parse(["--device", "cpu"])[1] == ["kernel", "call", "model", "loss"]


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
    printed = run_python("-m", "lpln_autopatch.bench.error", "--rows", "64").stdout
    rows = [line.split() for line in printed.splitlines()]
    lowered = [list(map(float, row[1:])) for row in rows if row[:1] == ["lowered"]]
    composer = [list(map(float, row[2:])) for row in rows if row[:1] == ["Composer's"]]
    assert len(lowered) == len(composer) == 8
    for ours, theirs in zip(lowered, composer, strict=True):
        assert all(o <= t for o, t in zip(ours, theirs, strict=True))
