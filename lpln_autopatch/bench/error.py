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
from lpln_autopatch.bench.options import Parser, at_least, usable_device
from lpln_autopatch.bench.recipe import ComposerRecipe

COLUMNS = ("output", "grad x", "grad weight", "grad bias")


def results(
    module: torch.nn.LayerNorm, x: torch.Tensor, upstream: torch.Tensor
) -> list[torch.Tensor]:
    """Output and gradients, in float64, the output rounded to the dtype of `upstream`."""
    x = x.detach().requires_grad_()
    y: torch.Tensor = module(x).to(upstream.dtype)
    gradients = torch.autograd.grad(y, [x, module.weight, module.bias], upstream)
    return [t.detach().double() for t in (y, *gradients)]


def compare(x: torch.Tensor, dtype: torch.dtype, compiled: bool) -> None:
    """Print the errors of the three contenders for one input, in eager mode or `compiled`."""
    upstream = torch.randn_like(x, dtype=dtype)
    stock = torch.nn.LayerNorm(x.shape[-1], device=x.device)
    torch.nn.init.normal_(stock.weight, 1.0, 0.2)
    torch.nn.init.normal_(stock.bias, 0.0, 0.2)
    composer = ComposerRecipe(x.shape[-1], device=x.device)
    exact_module = torch.nn.LayerNorm(x.shape[-1], device=x.device, dtype=torch.float64)
    for module in (composer, exact_module):
        module.load_state_dict(stock.state_dict())
    contenders: dict[str, Any] = {"stock": stock, "Composer's recipe": composer}
    if compiled:
        torch._dynamo.reset()
        contenders = {name: torch.compile(module) for name, module in contenders.items()}
    exact = results(exact_module, x.double(), upstream.double())
    with torch.autocast(x.device.type, dtype=dtype):
        rows = {name: results(module, x, upstream) for name, module in contenders.items()}
        with low_precision_layernorm():
            rows["lowered"] = results(contenders["stock"], x, upstream)
    print(
        f"\n{tuple(x.shape)}, {x.dtype} input of mean {round(x.mean().item())}, autocast to {dtype}"
    )
    print(f"  {'':18}" + "".join(f"{column:>14}" for column in COLUMNS))
    for name, values in rows.items():
        errors = [((v - e).norm() / e.norm()).item() for v, e in zip(values, exact, strict=True)]
        print(f"  {name:18}" + "".join(f"{error:14.2g}" for error in errors))


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
            compare(x, dtype, args.compiled)
    disable()


if __name__ == "__main__":
    main()
