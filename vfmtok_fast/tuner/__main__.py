"""A compiler process of `compile_in_processes`: ``python -m vfmtok_fast.tuner CHIP``.

A job a line on stdin; what went wrong with it, "" if nothing, a line on stdout that begins with
`ANSWER`, for others may print there too.
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
