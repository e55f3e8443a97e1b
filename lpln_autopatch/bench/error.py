"""The error of a lowered LayerNorm against float64, beside stock's and Composer's recipe.

    python -m lpln_autopatch.bench.error [--device cuda] [--rows 4096] [--compiled]

It prints the relative error, norm of the difference over the norm, of the output and of each
gradient. Stock's output is rounded to the autocast dtype first, as the next matrix product would.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from lpln_autopatch import disable
from lpln_autopatch.bench.call import RECIPE, Layer
from lpln_autopatch.bench.contenders import Contender
from lpln_autopatch.bench.suites import Parser, at_least, usable_device

CONTENDERS = (Contender("stock"), RECIPE, Contender("lowered", backend="native"))
COLUMNS = ("output", "grad x", "grad weight", "grad bias")


def main() -> None:
    """Print the errors of all contenders."""
    parser = Parser(
        prog="python -m lpln_autopatch.bench.error",
        description="Compare the error of a LayerNorm against float64.",
    )
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda, ...")
    parser.add_argument("--rows", type=at_least(1), default=256)
    parser.add_argument("--features", type=at_least(1), default=1024)
    parser.add_argument("--compiled", action="store_true", help="under torch.compile")
    args = parser.parse_args()
    device, shape = usable_device(args.device), (args.rows, args.features)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.device}")
    for dtype in (torch.bfloat16, torch.float16):
        for x, mean in itertools.product((torch.float32, dtype), (0.0, 4.0)):
            layer = Layer(shape, x, dtype, device, mean)
            print(f"\n{shape}, {x} input of mean {mean:.0f}, autocast to {dtype}")
            print(f"  {'':18}" + "".join(f"{column:>14}" for column in COLUMNS))
            run: Any = layer.module
            if args.compiled:
                torch.compiler.reset()
                run = torch.compile(run)
            for contender in CONTENDERS:
                errors = layer.errors(contender, run)[1].values()
                print(f"  {contender.name:18}" + "".join(f"{error:14.2g}" for error in errors))
    disable()


if __name__ == "__main__":
    main()
