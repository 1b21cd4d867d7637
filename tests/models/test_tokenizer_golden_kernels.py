"""The tokenizer with its kernels in Triton's interpreter: tests of test_tokenizer_golden.py.

They have their own file, so that another process of the suite can take it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU `enable` takes them there")
def test_enabled_kernels_in_the_interpreter(run_in_interpreter: Callable[..., None]):
    file = Path(__file__).parent / "test_tokenizer_golden.py"
    names = "(regions_and_codes or enabled_gradients) and tokenizer_small"
    run_in_interpreter(str(file), "-k", names)
