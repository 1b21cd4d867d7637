"""What our models share: strict folders and hub repos, and constants that are never lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import first_line
from .temporary import sweep, temporary_name

Model = TypeVar("Model", bound=nn.Module)
_building = threading.Lock()
# What draws random values in place, in `Tensor` and `torch.nn.init`. erfinv_ turns uniform values
# into normal ones, which takes as long.
DRAWS = frozenset(
    ["normal_", "uniform_", "erfinv_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"]
    + ["xavier_normal_"]
)
# Fields that transformers writes into config.json beside a model's own.
TRANSFORMERS_FIELDS = frozenset(
    ["architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "model_type"]
)
# Models that come with the package: one folder per name, with one subfolder per kind of model.
PRETRAINED = Path(__file__).with_name("pretrained")


class HubModel(nn.Module, PyTorchModelHubMixin):
    """`save_pretrained`, `from_pretrained` and `push_to_hub`, strict where the mixin is lenient.

    The mixin writes no config.json for a model with the default configuration, loads a folder
    without config.json, and leaves weights random if the file does not hold them.

    Constants are the buffers that no state dict holds. They keep their values through `to_empty`
    and on the meta device, where they stay on the CPU, and they move to the device of the weights
    that are loaded. This applies to all of them, including those of timm's models.
    """

    # Subfolder of a name in `PRETRAINED` that holds a model of this class.
    shipped_as = ""

    def __init__(self):
        super().__init__()
        # Constants as they were before half precision, by name.
        self._full: dict[str, Tensor] = {}
        self.register_load_state_dict_post_hook(_bring_constants)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Every method that moves, converts or empties a module calls this.
        with self._constants_kept():
            return super()._apply(fn, recurse)

    @contextmanager
    def _constants_kept(self) -> Iterator[None]:
        """Give constants that are moved, converted or emptied inside their values again."""
        before = {name: module._buffers[own] for name, module, own in _constants(self)}
        yield
        for name, module, own in _constants(self):
            # A module may replace its own constants and add new ones.
            old, new = before.get(name), module._buffers[own]
            if old is None or new is old:
                continue
            if new.is_meta:
                module._buffers[own] = old
            elif own in _exact(module) and new.dtype != old.dtype:
                module._buffers[own] = _with_values(self, name, old).to(new.device)
            else:
                new.copy_(self._in_full(name, _with_values(self, name, old), new))

    def _in_full(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        """A constant's values for ``new``: the earlier ones if half precision dropped digits."""
        if new.dtype.itemsize < old.dtype.itemsize:
            self._full[name] = old.detach().cpu()
        elif new.dtype.itemsize > old.dtype.itemsize and name in self._full:
            # If the value has changed since then, the change is intended.
            full = self._full[name]
            return full if torch.equal(full.to(old), old) else old
        return old

    def save_pretrained(self, save_directory: str | Path, *, config=None, **options) -> str | None:
        """Write config.json and model.safetensors; see `PyTorchModelHubMixin.save_pretrained`.

        A new folder appears complete or not at all. In an existing folder, config.json is written
        last, the old content stays if something goes wrong before that, and a README.md is kept.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(os.path.expanduser(save_directory))
        folder.parent.mkdir(parents=True, exist_ok=True)
        there = folder.exists()
        target = folder / "model" if there else folder
        sweep(target.parent, of=target.name)
        finished = temporary_name(target)
        # For push_to_hub=True, which would otherwise use the name of the temporary folder.
        options["repo_id"] = options.get("repo_id") or folder.name
        try:
            pushed = super().save_pretrained(finished, config=config or self.config, **options)
            # safetensors makes files that only their owner can read.
            mode = stat.S_IMODE((finished / constants.CONFIG_NAME).stat().st_mode)
            for path in finished.iterdir():
                path.chmod(mode)
            # A model card that someone wrote; the mixin keeps it too.
            if (folder / "README.md").exists():
                (finished / "README.md").unlink(missing_ok=True)
            if there:
                # Do not replace the folder: it may be a mount or someone's working directory.
                for path in sorted(finished.iterdir(), key=lambda path: path.name == "config.json"):
                    path.replace(folder / path.name)
            else:
                finished.rename(folder)
        except SafetensorError as error:
            raise OSError(f"{folder}: cannot be written ({first_line(error)})") from error
        finally:
            shutil.rmtree(finished, ignore_errors=True)
        return pushed

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: object = None,
        map_location: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Load a model that `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: a folder, else the name of a model that comes with the
                package ("emoji"), else the name of a hub repo.
            config: used in place of config.json.
            map_location: device of the model.
            revision, token, cache_dir, force_download, local_files_only: as for `hf_hub_download`.

        Returns:
            The model in eval mode, in float32 whatever the dtype in the file.

        Raises:
            FileNotFoundError: there is neither a folder with both files nor a repo that can be
                reached.
            ValueError: the config has unknown parts, or weights are missing, extra, misshapen or
                NaN (all are named).
        """
        source = _shipped(cls, str(pretrained_model_name_or_path))
        download = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        if config is None:
            config = cls.read_config(source, **download)
        path = weights_in(Path(os.path.expanduser(source)))
        path = path or _find(cls, source, constants.SAFETENSORS_SINGLE_FILE, download)
        with torch.device("cpu"):  # whatever torch's default is; `map_location` says where it ends
            model = unfilled(cls, config)
        tensors = unwrapped(read_safetensors(path, cls.__name__), f"{cls.__name__}: {path}")
        load_checked(model, tensors, f"{cls.__name__}: {path}")
        return model.to(map_location).eval()

    @classmethod
    def read_config(cls, source: str | Path, **download: Any) -> dict:
        """Return the fields in a model's config.json; arguments and errors as `from_pretrained`."""
        path = _find(cls, _shipped(cls, str(source)), constants.CONFIG_NAME, download)
        return _read_config(path, cls)


def unfilled(make: Callable[..., Model], *args: object) -> Model:
    """Build a model whose weights a file will fill: in float32 whatever torch's default dtype is.

    Its weights hold arbitrary values: random ones would take longer to draw than to read the file.
    """
    with _building:  # The default belongs to the process, and not to a thread.
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            # On the meta device there would be nothing to fill.
            meta = torch.get_default_device().type == "meta"
            with torch.device("cpu") if meta else nullcontext(), _Undrawn():
                return make(*args)
        finally:
            torch.set_default_dtype(before)


class _Undrawn(TorchFunctionMode):
    """Skip what draws random values in place, and allocate instead of drawing a new tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.normal_:
            # torch's truncated normal calls it again until all values are within its limits.
            mean = args[1] if len(args) > 1 else (kwargs or {}).get("mean", 0.0)
            return args[0].fill_(mean)
        if getattr(func, "__name__", None) in DRAWS:
            return args[0] if args else kwargs["tensor"]
        if func is torch.randn:
            return torch.empty(
                *args, **{k: v for k, v in (kwargs or {}).items() if k != "generator"}
            )
        return func(*args, **(kwargs or {}))


def register_constant(module: nn.Module, name: str, value: Tensor, exact: bool = False) -> None:
    """Register a buffer that no state dict holds, on the device where the module is being built.

    Args:
        module: a part of a `HubModel`, which keeps the buffer's values.
        name: name of the buffer.
        value: made with ``device="cpu"``, since on the meta device it would have no values.
        exact: keep its dtype, whatever the weights are cast to.
    """
    device = torch.get_default_device()
    value = value if device.type == "meta" else value.to(device)
    module.register_buffer(name, value, persistent=False)
    if exact:
        module._exact_constants = _exact(module) | {name}


def _exact(module: nn.Module) -> frozenset[str]:
    return getattr(module, "_exact_constants", frozenset())


def _constants(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield full name, module and name in the module of each buffer that no state dict holds."""
    for prefix, module in model.named_modules():
        for own in sorted(module._non_persistent_buffers_set):
            if module._buffers.get(own) is not None:
                yield f"{prefix}.{own}".lstrip("."), module, own


def _with_values(model: nn.Module, name: str, constant: Tensor) -> Tensor:
    if constant.is_meta:
        raise ValueError(
            f"{type(model).__name__}: {name} is in no file and was built on the meta device, "
            "without values; build this model on another device"
        )
    return constant


def _bring_constants(model: HubModel, keys: object) -> None:
    """After a state dict is loaded, give constants the device and dtype of the loaded weights."""
    if any(weight.is_meta for weight in model.parameters()):
        return  # More weights are still to be loaded.
    with model._constants_kept():
        for name, module, own in list(_constants(model)):
            constant = _with_values(model, name, module._buffers[own])
            weight = _nearest_weight(model, name)
            if weight is None:  # All weights are quantised, to no dtype that constants could have.
                continue
            # With assign=True the weights may have come with another dtype.
            if next(module.parameters(), None) is None:
                # timm's rotary positions: their module knows which of them a cast rounds.
                module.to(weight.device, weight.dtype)
            else:
                dtype = weight.dtype if constant.is_floating_point() else constant.dtype
                module._buffers[own] = constant.to(weight.device, dtype)


def _nearest_weight(model: nn.Module, constant: str) -> Tensor | None:
    """Return a floating-point weight of the smallest part that holds one and the constant."""
    path = constant.split(".")
    parts = (model.get_submodule(".".join(path[:end])) for end in reversed(range(len(path))))
    weights = (weight for part in parts for weight in part.parameters())
    return next((weight for weight in weights if weight.is_floating_point()), None)


def read_safetensors(path: Path, what: str) -> dict[str, Tensor]:
    """Read a ``.safetensors`` file, or the parts that an index names; ``what`` names it in errors.

    A file holds only one of several tied weights. The names of the others are in its metadata or
    the index's.
    """
    if path.name.endswith(".index.json"):
        index = _read_json(path, what)
        tensors, tied = _read_parts(path, index.get("weight_map"), what), index.get("metadata")
    else:
        try:
            tensors = load_file(path)
            with safe_open(path, framework="pt") as file:
                tied = file.metadata()
        except (SafetensorError, OSError) as error:
            reason = first_line(error)
            raise ValueError(f"{what}: {path} is not a safetensors file ({reason})") from error
    # Sizes and formats are there too.
    tied = tied.items() if isinstance(tied, dict) else ()
    tied = {name: kept for name, kept in tied if isinstance(kept, str) and kept in tensors}
    return {name: tensors[kept] for name, kept in tied.items()} | tensors


def _read_parts(index: Path, files: object, what: str) -> dict[str, Tensor]:
    """Read the tensors of all files that an index names; each must be in the index's folder."""
    if not (files and isinstance(files, dict) and all(isinstance(f, str) for f in files.values())):
        raise ValueError(
            f"{what}: {index} must hold weight_map, an object of weights and their files"
        )
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise FileNotFoundError(f"{what}: {index} names {name}, which is not in its folder")
        part = read_safetensors(index.parent / name, what)
        if twice := sorted(part.keys() & tensors.keys()):
            names = ", ".join(twice)
            raise ValueError(f"{what}: {index}: more than one of its files holds {names}")
        tensors |= part
    return tensors


def unwrapped(tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Undo what DistributedDataParallel, torch.compile and AveragedModel do to a state dict.

    Args:
        tensors: tensors by names, which may contain ``module.`` and ``_orig_mod.``; ``n_averaged``
            is dropped.
        what: how errors name the source.

    Raises:
        ValueError: two entries have the same plain name.
    """
    # A block that was compiled by itself has this anywhere in the name.
    names = {key: re.sub(r"(?<![^.])_orig_mod\.", "", key) for key in tensors}
    while True:
        names = {key: name for key, name in names.items() if name != "n_averaged"}
        if not names or not all(name.startswith("module.") for name in names.values()):
            break
        names = {key: name.removeprefix("module.") for key, name in names.items()}
    keys: dict[str, list[str]] = {}
    for key, name in names.items():
        keys.setdefault(name, []).append(key)
    if twice := [" and ".join(same) for same in keys.values() if len(same) > 1]:
        raise ValueError(f"{what}: two entries for one weight: {', '.join(twice)}")
    return {name: tensors[key] for key, name in names.items()}


def weights_in(folder: Path) -> Path | None:
    """Return the file that holds a folder's weights, or the index of such files, or None."""
    names = constants.SAFETENSORS_SINGLE_FILE, constants.SAFETENSORS_INDEX_FILE
    return next((folder / name for name in names if (folder / name).is_file()), None)


def check_tensors(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    what: str,
    unused: Iterable[str] = (),
) -> None:
    """Require exactly the keys and shapes of ``shapes``, and finite values.

    Args:
        tensors: what a file holds.
        shapes: what the model needs.
        what: how errors name the file.
        unused: keys that may be there and are ignored.

    Raises:
        ValueError: something does not fit; one line names all that is missing, unknown, misshapen
            or not finite.
    """
    problems = []
    if missing := sorted(set(shapes) - set(tensors)):
        problems.append(f"missing {', '.join(missing)}")
    if extra := sorted(set(tensors) - set(shapes) - set(unused)):
        problems.append(f"unknown {', '.join(extra)}")
    there = [key for key in shapes if key in tensors]
    misshapen = [
        f"{key} (expected {shapes[key]}, got {tuple(tensors[key].shape)})"
        for key in there
        if tuple(tensors[key].shape) != shapes[key]
    ]
    if misshapen:
        problems.append(f"misshapen {', '.join(misshapen)}")
    dense = [
        key
        for key in there
        if tensors[key].is_floating_point()
        and tensors[key].layout == torch.strided
        and not tensors[key].is_meta
    ]
    if other := [key for key in there if key not in set(dense)]:
        problems.append(f"no dense floating-point values in {', '.join(other)}")
    # In float32, since the 8-bit dtypes have no isfinite.
    if not_finite := [key for key in dense if not bool(torch.isfinite(tensors[key].float()).all())]:
        problems.append(f"NaN or infinity in {', '.join(not_finite)}")
    if problems:
        raise ValueError(f"{what} does not fit the model: {'; '.join(problems)}")


def load_checked(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Load exactly the entries that a module has; raises ValueError as `check_tensors` does."""
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    check_tensors(tensors, shapes, what)
    module.load_state_dict(tensors)


def _shipped(cls: type[HubModel], source: str) -> str:
    """Return the folder of a model that comes with the package, or else the source unchanged."""
    own = cls.shipped_as and re.fullmatch(r"[a-z0-9-]+", source)
    if own and not Path(source).exists() and (PRETRAINED / source / cls.shipped_as).is_dir():
        return str(PRETRAINED / source / cls.shipped_as)
    return source


def _find(cls: type, source: str, name: str, download: Mapping) -> Path:
    folder = Path(os.path.expanduser(source))
    if folder.is_file():
        raise FileNotFoundError(
            f"{cls.__name__}: {source} is a file; expected a folder with config.json and "
            "model.safetensors (vfmtok-fast convert makes one from the authors' files)"
        )
    if folder.is_dir():
        if not (folder / name).is_file():
            if (folder / "model" / name).is_file():
                raise FileNotFoundError(
                    f"{cls.__name__}: {source} is a training run; its model is {source}/model"
                )
            raise FileNotFoundError(
                f"{cls.__name__}: the folder {source} has no {name}; save_pretrained and "
                "vfmtok-fast convert write one"
            )
        return folder / name
    # Only a name that can be a repo's, owner/name, is looked up on the hub.
    if "/" not in source:
        shipped = sorted(path.name for path in PRETRAINED.iterdir() if path.is_dir())
        raise FileNotFoundError(
            f"{cls.__name__}: there is no folder {source} with {name}, and the models that come "
            f"with the package are {', '.join(shipped)}; a Hugging Face repo is owner/name, and "
            "the authors' models are read by from_official and vfmtok-fast convert"
        )
    if source.startswith(("/", ".", "~")) or source.endswith("/") or source.count("/") > 1:
        raise FileNotFoundError(f"{cls.__name__}: there is no folder {source} with {name}")
    # Without a network the hub's client warns at every attempt; the error below says enough.
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        return Path(hf_hub_download(source, name, **download))
    # HFValidationError is a ValueError: the source is a path, not the name of a repo.
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{cls.__name__}: there is no folder {source}, and {name} cannot be downloaded from a "
            f"Hugging Face repo of that name ({first_line(error)})"
        ) from error
    finally:
        hub_logging.set_verbosity(verbosity)


def _read_config(path: Path, cls: type) -> dict:
    """Return the fields of a config.json, without those that transformers adds on its own."""
    content = _read_json(path, cls.__name__)
    return {name: value for name, value in content.items() if name not in TRANSFORMERS_FIELDS}


def _read_json(path: Path, what: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{what}: {path} is not JSON ({first_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{what}: {path} must hold an object, got {type(content).__name__}")
    return content
