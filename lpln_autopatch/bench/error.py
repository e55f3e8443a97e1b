"""The error of a lowered LayerNorm against float64, beside stock's and Composer's recipe.

    python -m lpln_autopatch.bench.error [--device cuda] [--rows 4096] [--compiled]

Relative error (norm of the difference over the norm) of the output and of each gradient. Stock's
output is rounded to the autocast dtype, as the next matrix product would.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from lpln_autopatch import disable, low_precision_layernorm
from lpln_autopatch.bench.call import results
from lpln_autopatch.bench.contenders import relative_error
from lpln_autopatch.bench.recipe import ComposerRecipe
from lpln_autopatch.bench.suites import Parser, at_least, usable_device

COLUMNS = ("", "output", "grad x", "grad weight", "grad bias")


def compare(x: torch.Tensor, dtype: torch.dtype, compiled: bool) -> list[list[Any]]:
    """The errors of the three contenders for one input, in eager mode or `compiled`."""
    upstream = torch.randn_like(x, dtype=dtype)
    stock = torch.nn.LayerNorm(x.shape[-1], device=x.device)
    torch.nn.init.normal_(stock.weight, 1.0, 0.2)
    torch.nn.init.normal_(stock.bias, 0.0, 0.2)
    composer = ComposerRecipe(x.shape[-1], device=x.device)
    exact_module = torch.nn.LayerNorm(x.shape[-1], device=x.device, dtype=torch.float64)
    for module in (composer, exact_module):
        module.load_state_dict(stock.state_dict())
    exact = results(exact_module, exact_module, x.double(), upstream.double())
    called: list[Any] = [stock, composer]
    if compiled:
        torch._dynamo.reset()
        called = [torch.compile(module) for module in called]
    with torch.autocast(x.device.type, dtype=dtype):
        given = {
            "stock": results(called[0], stock, x, upstream),
            "Composer's recipe": results(called[1], composer, x, upstream),
        }
        with low_precision_layernorm():
            given["lowered"] = results(called[0], stock, x, upstream)
    given["stock"]["y"] = given["stock"]["y"].to(dtype)
    return [
        [name, *(f"{relative_error(got[key], exact[key]):.2g}" for key in exact)]
        for name, got in given.items()
    ]


def main() -> None:
    parser = Parser(
        prog="python -m lpln_autopatch.bench.error",
        description="Compare the error of a LayerNorm against float64.",
    )
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, ...")
    parser.add_argument("--rows", type=at_least(1), default=256)
    parser.add_argument("--features", type=at_least(1), default=1024)
    parser.add_argument("--compiled", action="store_true", help="under torch.compile")
    args = parser.parse_args()
    usable_device(args.device)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.device}")
    for dtype in (torch.bfloat16, torch.float16):
        for input_dtype, mean in itertools.product((torch.float32, dtype), (0.0, 4.0)):
            shape = (args.rows, args.features)
            x = (torch.randn(shape, device=args.device) + mean).to(input_dtype)
            print(f"\n{shape}, {input_dtype} input of mean {mean:.0f}, autocast to {dtype}")
            for line in [COLUMNS, *compare(x, dtype, args.compiled)]:
                print(f"  {line[0]:18}" + "".join(f"{cell:>14}" for cell in line[1:]))
    disable()


if __name__ == "__main__":
    main()
