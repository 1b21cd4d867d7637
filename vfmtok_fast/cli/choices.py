"""The values that options may take. They are repeated here because the modules that define them
import torch, which takes seconds; a test compares the two.
"""

OFFICIAL_REPO = "yexiguafu/VFMTok"
OFFICIAL_FILES = ("tokenizer", "GPT-B", "GPT-L", "GPT-XL", "GPT-XXL", "GPT-2B", "GPT-3B")
# What `convert` reads; RAR's files are at no address that it knows.
CONVERTED = (*OFFICIAL_FILES, "RAR")
PRESETS = (*OFFICIAL_FILES[1:], "GPT-1B", "GPT-XXXL", "GPT-7B")
PRECISIONS = ("float32", "tf32", "float16", "bfloat16", "mixed")
UNTRAINED = ("full", "small")
VIEWS = ("center", "center-flip", "ten-crop", "ten-crop-N", "random-K", "random-K-flip")
INPUTS = ("folder", "tar", "webdataset", "parquet", "lmdb")
FORMATS = ("llamagen", "rar", "parquet")
RECONSTRUCTION = (
    "reconstruction-vfmtok",
    "reconstruction-vfmtok-torch",
    "reconstruction-crops",
)
GENERATION = ("generation-adm", "generation-float64")
PROBES = ("probe-sgd", "probe-mae")
PROBED = ("semantic-class", "regions", "codes")
LABELS = ("balanced", "random")
