"""Beginnings of scripts that tests run in their own process, to kill or to measure it."""

# Loads the module whose path is the first argument, as `fake`.
START = """
import importlib.util, itertools, os, random, resource, shutil, signal, sys, time
spec = importlib.util.spec_from_file_location("fake", sys.argv[1])
fake = importlib.util.module_from_spec(spec)
sys.modules["fake"] = fake
spec.loader.exec_module(fake)
import torch
from pathlib import Path
from vfmtok_fast import cache
torch.set_num_threads(1)
"""

# Renames and links are the only moments at which anything becomes visible.
DIE_AT_RENAME = """
def die_at_rename(at, after):
    count = 0
    def dying(rename):
        def replace(source, target):
            nonlocal count
            count += 1
            if count == at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return replace
    os.replace, os.link = dying(os.replace), dying(os.link)
"""
