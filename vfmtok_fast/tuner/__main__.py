"""One compiler process of `compile_in_processes`: ``python -m vfmtok_fast.tuner CHIP``.

It reads one job per line from stdin. For each job it writes a line to stdout that begins with
`ANSWER` and holds the problem, or "" if there was none. The prefix is needed because other code may
print to stdout too.
"""

from __future__ import annotations

import json
import sys

from .calls import Call
from .compile import ANSWER, compile_call

for line in sys.stdin:
    call, name, values = json.loads(line)
    call["backward"] = tuple(call["backward"])
    problem = compile_call(Call(**call), name, values, int(sys.argv[1]))
    print(ANSWER + json.dumps(problem), flush=True)
