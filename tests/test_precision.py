from __future__ import annotations

import enum

import pytest
import torch

from lpln_autopatch import Precision

BOTH = {torch.float16, torch.bfloat16}


class ComposerPrecision(enum.Enum):
    """Composer's enum as far as it concerns us: no str, values in lower case."""

    AMP_BF16 = "amp_bf16"


@pytest.mark.parametrize(
    ("name", "engages_for"),
    [
        ("amp", BOTH),
        ("amp_fp16", {torch.float16}),
        (torch.float16, {torch.float16}),
        ("float16", {torch.float16}),
        ("bfloat16", {torch.bfloat16}),
        (" amp\n", BOTH),
        ("bf16", {torch.bfloat16}),
        ("amp_bf16", {torch.bfloat16}),
        (torch.bfloat16, {torch.bfloat16}),
        ("AMP_BF16", {torch.bfloat16}),
        (ComposerPrecision.AMP_BF16, {torch.bfloat16}),
        (Precision.AMP_BF16, {torch.bfloat16}),
        ("fp32", set()),
        ("fp16", set()),
        ("amp_fp8", set()),
    ],
)
def test_precision_engages_for_its_dtypes(name, engages_for):
    """Each name engages for the autocast dtypes that the table gives, and for no other."""
    precision = Precision.parse(name, "precision")
    assert {d for d in (*BOTH, torch.float32) if precision.engages(d)} == engages_for
    assert precision.ever_engages == bool(engages_for)


@pytest.mark.parametrize("value", ["bf61", "off", "0", "", None, torch.float32, 16])
def test_unknown_precision_is_refused(value):
    """An unknown name is an error that gives it, its source and the valid names."""
    with pytest.raises(ValueError, match=r"MY_SOURCE=.* is not a precision") as error:
        Precision.parse(value, "MY_SOURCE")
    assert f"MY_SOURCE={value!r}" in str(error.value)
    assert ", off" not in str(error.value)
    for name in ("amp", "amp_fp16", "bf16", "fp32", "torch.bfloat16"):
        assert name in str(error.value)


def test_precision_is_its_name():
    """A member equals, and prints as, its name: status() and logs stay readable."""
    assert Precision.AMP == "amp"
    assert f"{Precision.AMP_BF16}" == str(Precision.AMP_BF16) == "amp_bf16"
