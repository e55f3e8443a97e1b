"""python -m lpln_autopatch bench ...: the benchmark."""

from __future__ import annotations

import sys

from lpln_autopatch.bench import suites

if sys.argv[1:2] != ["bench"]:
    sys.exit("usage: python -m lpln_autopatch bench ...")
sys.exit(suites.main(sys.argv[2:]))
