"""Tables of a report and a status: as text, in a notebook, and in a note below an error."""

from __future__ import annotations

import pytest
import torch
from reported import ByHandNorm, Raises, lowered_report
from support import autocast

import lpln_autopatch
from lpln_autopatch import exempt, low_precision_layernorm, report


def test_report_prints_as_a_table():
    """A line for each row, what it did about train(), and the count."""
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), ByHandNorm(), exempt(torch.nn.LayerNorm(8)))
    assert str(lowered_report(model.eval())).splitlines() == [
        "name  norm        calls  input     output    lowered  reason",
        "0     layer_norm  1      float32   bfloat16  yes",
        "1     ByHandNorm  1      bfloat16  float32   no       hand-written, and not recognised: "
        "its values or gradients are not those of RMSNorm or LayerNorm",
        "2     layer_norm  1      float32   float32   no       exempt",
        "",
        "The model ran in evaluation mode, and is left in it.",
        "1 of 3 norm calls are lowered",
    ]


def test_model_itself_has_a_name_in_the_table():
    """A bare norm is a row too: its qualified name is empty, and the table says what it is."""
    assert str(lowered_report(torch.nn.LayerNorm(8))).splitlines()[1].startswith("(the model)  lay")


class Fails(torch.nn.Module):
    """A model whose head takes only float32, which a stock norm gives it."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.LayerNorm(8))
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x):
        f = self.blocks(x)
        with autocast(enabled=False):
            return self.head(f)


def test_model_that_raises_is_noted_on_its_own_exception():
    """The note has the norm calls so far, the last norm that returned, and the module to exempt."""
    model = Fails()
    with pytest.raises(RuntimeError) as raised:
        lowered_report(model)
    (note,) = raised.value.__notes__
    assert note.splitlines() == [
        "lpln_autopatch: the norm calls until then:",
        "name      norm        calls  input     output    lowered  reason",
        "blocks.0  layer_norm  1      float32   bfloat16  yes",
        "blocks.1  layer_norm  1      bfloat16  bfloat16  yes",
        "2 of 2 norm calls are lowered. The last norm that returned is blocks.1, in bfloat16. "
        "If the failed code takes only float32, keep that norm stock: "
        "exempt(model.get_submodule('blocks.1')), or LPLN_EXEMPT=blocks.1.",
    ]
    # On the CPU a stock norm gives bfloat16 for bfloat16.
    exempt(model.blocks)
    assert lowered_report(model).calls == 2


def test_note_advises_what_it_knows():
    """The note has no advice where no norm, or a stock norm, has returned."""
    with pytest.raises(ArithmeticError) as raised:
        lowered_report(Raises())
    expected = "lpln_autopatch: no norm had returned when this was raised."
    assert raised.value.__notes__ == [expected]
    with pytest.raises(ArithmeticError) as raised:
        lowered_report(torch.nn.Sequential(exempt(torch.nn.LayerNorm(8)), Raises()))
    assert raised.value.__notes__[0].endswith("The last norm that returned is 0, in float32.")

    class Norm(torch.nn.LayerNorm):
        def forward(self, x):
            raise ArithmeticError(super().forward(x).dtype)

    with pytest.raises(ArithmeticError) as raised:
        lowered_report(Norm(8))
    assert raised.value.__notes__[0].endswith("keep that norm stock: exempt(model).")


def test_notebook_shows_tables():
    """A cell for each value, escaped; what stands below the table too."""
    model = torch.nn.Sequential(exempt(torch.nn.LayerNorm(8)), torch.nn.LayerNorm(8))
    shown = lowered_report(model)._repr_html_()
    assert shown.startswith("<table>\n<tr><th ")
    for cell in ("name", "layer_norm", "bfloat16", "yes", "exempt"):
        assert f">{cell}<" in shown
    assert shown.endswith("<div>1 of 2 norm calls are lowered</div>")
    assert "<div>Nothing was run." in report(model)._repr_html_()
    with low_precision_layernorm():
        shown = lpln_autopatch.status()._repr_html_()
    assert ">precision</td>" in shown
    assert ">amp</td>" in shown
