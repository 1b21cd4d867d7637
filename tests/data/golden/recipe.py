"""Deterministic weights of the golden cases: a tensor is a function of its key and shape alone.

RandomState is frozen by NumPy's compatibility policy, so the numbers are the same on every version.
"""

import math
import zlib

import numpy as np

POSITION_LIKE = (
    "pos_embed",
    "position_embedding",
    "slot_position_embedding",
    "slots_pos",
    "carrier_tokens",
    "cls_token",
    "register_tokens",
    "mask_embedding",
    "mask_dino",
    "mask_token",
)


def recipe_tensor(key: str, shape: tuple) -> np.ndarray:
    """Return the float32 golden value of the state-dict entry `key` with `shape`."""
    if key.endswith("codebook_used"):
        return np.zeros(shape, np.float32)
    rng = np.random.RandomState(zlib.crc32(key.encode()))
    noise = rng.standard_normal(int(np.prod(shape))).reshape(shape)
    leaf = key.rsplit(".", 1)[-1]
    if key.endswith("sampling_offsets.bias"):
        value = 2.0 * noise
    elif leaf == "bias":
        value = 0.05 * noise
    elif leaf == "gamma":
        value = 0.3 + 0.05 * noise
    elif any(key.endswith(name) for name in POSITION_LIKE):
        value = 0.5 * noise
    elif len(shape) == 1:
        value = 1.0 + 0.1 * noise
    elif "embed" in key and "patch_embed" not in key:
        value = noise
    else:
        value = noise / math.sqrt(np.prod(shape[1:]))
    return value.astype(np.float32)
