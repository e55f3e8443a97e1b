"""The end of `make demo`: what it makes of the files that the steps before have written."""

from __future__ import annotations

import json

import pytest

from lpln_autopatch.bench import demo

STOCK = """LayerNorm output dtypes\ttorch.float32
final loss (mean of the last tenth)\t4.0000
tokens per second\t1,000
saved for backward, MiB\t{saved}
"""


@pytest.fixture
def folder(tmp_path):
    """Return a folder with the files that the trainings and the count have written."""
    (tmp_path / "stock.tsv").write_text(STOCK.format(saved="30.0"))
    lowered = STOCK.format(saved="30.0").replace("float32", "bfloat16").replace("4.0000", "4.0200")
    (tmp_path / "lowered.tsv").write_text(lowered)
    rows = [
        {"case": {"model": model}, "contender": name, "figures": figures}
        for model in ("bert-base", "vit-b16")
        for name, figures in {
            "stock": {"kept": 8 * 2**30, "moved": 4 * 2**30, "peak": 2**30},
            "native": {"kept": 6 * 2**30, "moved": 3.6 * 2**30, "peak": 2**29},
            "fused": {},
        }.items()
    ]
    (tmp_path / "count.json").write_text(json.dumps({"suites": {"count": rows}}))
    return tmp_path


def test_demo_ends_with_a_conclusion_from_its_own_figures(folder, capsys):
    """The last line has the shares that the table has, and the difference of the losses."""
    demo.main(folder)
    *_, last = capsys.readouterr().out.split("\n\n")
    assert " ".join(last.split()) == (
        "Lowered, a training step on a GPU needs fewer bytes: bert-base keeps 25% less and moves "
        "10% less; vit-b16 keeps 25% less and moves 10% less than stock. The small model's losses, "
        "4.0000 stock and 4.0200 lowered, differ by 0.50%."
    )


def test_demo_fits_a_terminal(folder, capsys):
    """Both tables have 100 columns at most, and stock's figures beside the lowered ones."""
    demo.main(folder)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line.split() for line in lines]
    assert ["LayerNorm", "output", "dtypes", "torch.float32", "torch.bfloat16"] in rows
    assert ["bert-base:", "kept", "for", "backward,", "GiB", "8.00", "0.750"] in rows
    assert not any("per second" in line for line in lines)


@pytest.mark.parametrize(("saved", "is_said"), [("30.0", True), ("20.0", False)])
def test_equal_memory_is_explained(folder, capsys, saved, is_said):
    """A sentence says that a CPU keeps float32 both times; where less is kept there is none."""
    lowered = folder / "lowered.tsv"
    lowered.write_text(lowered.read_text().replace("30.0", saved))
    demo.main(folder)
    said = "On a CPU lowering keeps the float32 input" in capsys.readouterr().out
    assert said == is_said
