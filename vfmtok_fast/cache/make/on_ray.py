"""Build a cache on a Ray cluster: Ray starts actors and hands them shard numbers, nothing else.

Each actor reads, encodes and commits its shard with the function that every other worker uses, so
the files have the same bytes as without Ray, and no image or token passes through Ray's object
store. Actors and nodes may be lost at any moment: the shard goes to another actor, and a new actor
replaces the lost one as soon as the cluster has room for it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ... import switch
from ...errors import first_line
from ...images import quiet_pillow
from ..format import manifest
from ..format.fingerprint import Tokenizer, describe
from .build import Summary, exit_on_sigterm
from .encode import Waits
from .job import Job, encode_shards, finish
from .prepare import MAX_DEFAULT_WORKERS, prepare
from .progress import Progress, State, reporting
from .spec import CacheSpec, check_count

# If this many actors died in one shard, the shard is taken to be the cause.
MOST_LOST_ON_A_SHARD = 5
# Seconds to wait for a first actor. Clusters that grow on demand take minutes to add a machine.
START_PATIENCE = 900.0


class ActorsLost(ConnectionError):
    """Actors cannot be started, or keep dying."""


def build_on_ray(
    images: str | os.PathLike, out: str | os.PathLike, tokenizer: Tokenizer,
    spec: CacheSpec | None = None, *, max_bad: int | None = None, actors: int | None = None,
    device: str | None = None, progress: bool | Callable[[Progress], None] = False, **settings: Any,
) -> Summary:  # fmt: skip
    """Build a token cache with actors on a Ray cluster; the same bytes as `build` makes.

    Uses the Ray that the program is connected to, otherwise the cluster of RAY_ADDRESS or of this
    machine, otherwise starts one here for the duration of the call. What is enabled here
    (`vfmtok_fast.enable`) is enabled in the actors too.

    Args:
        images, out: as in `build`; both must be reachable under the same path on every node.
        tokenizer: in CPU memory; it is sent to the actors, so nodes need no file of it.
        spec, max_bad, progress, settings: as in `build`; progress and bad images are counted by
            whole shards, and ``workers`` are threads of each actor, by default one per core.
        actors: how many; None: one per GPU or, without GPUs, one per 8 cores or node.
        device: "cuda" or "cpu"; None: "cuda" if the cluster has GPUs.

    Returns, Raises: as `build`, and
        ValueError: Ray is not installed, or the cluster lacks what an actor needs.
        ActorsLost: actors cannot be started, or keep dying; finished shards are kept.
    """
    started = time.monotonic()
    spec = CacheSpec.of(spec, settings)
    if actors is not None:
        check_count("actors", actors, 1)
    if max_bad is not None:
        check_count("max_bad", max_bad, 0)
    ray = _import_ray()
    with quiet_pillow(), exit_on_sigterm():
        job = prepare(images, out, tokenizer, spec, device=device or "cuda")
        state = State(job, max_bad)
        numbers = list(state.missing(range(job.manifest.shards)))
        if numbers:
            with (
                _connected(ray),
                reporting(progress, job.manifest.images, state.progress().done) as report,
            ):
                room = _room(ray, actors, device, len(numbers))
                sent = replace(job, tokenizer=None, workers=spec.workers or room.cores)
                with contextlib.closing(_Crew(ray, sent, room, tokenizer)) as crew:
                    for number, waits in crew.encode(state.missing(numbers)):
                        state.waits.data += waits.data / room.actors
                        state.waits.device += waits.device / room.actors
                        state.encoded += len(job.manifest.rows_of(number))
                        state.refresh()
                        report(state.progress())
        bad = finish(job)
    seconds = time.monotonic() - started
    return Summary(job.out, job.manifest.images, bad, job.manifest.shards, state.encoded, seconds)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "cache: the engine ray needs the package ray: pip install 'vfmtok-fast[ray]'"
        ) from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """Connect to Ray for the duration of the block, unless the program is connected already."""
    if ray.is_initialized():
        yield
        return
    # A cluster started here sends no usage reports to Ray's makers unless the user asks for them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ActorsLost(f"cache: cannot connect to Ray: {first_line(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class _Room:
    """What the cluster is asked for: `actors` of `cores` CPU cores and `gpus` GPUs each."""

    actors: int
    cores: int
    gpus: int

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


def _room(ray: Any, actors: int | None, device: str | None, shards: int) -> _Room:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(node.get("CPU", 0)) for node in nodes]
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    if device not in (None, "cuda", "cpu"):
        raise ValueError(f"cache: device must be cuda or cpu on Ray, got {device!r}")
    if device == "cuda" and not sum(gpus):
        raise ValueError("cache: device cuda: the Ray cluster has no GPU")
    if not sum(cores):
        raise ValueError("cache: the Ray cluster has no CPU core for an actor")
    if sum(gpus) and device != "cpu":
        count = min(actors or sum(gpus), shards)
        share = min(c // g for c, g in zip(cores, gpus, strict=True) if g)
        return _Room(count, max(1, min(share, MAX_DEFAULT_WORKERS)), 1)
    share = min(max(cores), MAX_DEFAULT_WORKERS)
    if actors is not None:
        share = max(1, min(share, sum(cores) // actors))
    count = actors or sum(c // share for c in cores)
    return _Room(min(count, shards), share, 0)


class _Encoder:
    """An actor: encodes and commits the shards that it is given, one after the other.

    It receives the job without its tokenizer, the device, what is enabled, and the tokenizer.
    """

    def __init__(self, job: Job, device: str, policy: switch.Policy, tokenizer: Tokenizer) -> None:
        # Nothing here can fail: an error in __init__ would reach the caller without its type.
        self.job, self.device, self.policy = job, device, policy
        self.tokenizer = tokenizer

    def open(self) -> None:
        """Load the model onto the device, and check that its tokens would be those of the cache.

        Another decoder version on this node, for example, would change them.
        """
        if hasattr(self.tokenizer, "to"):
            self.tokenizer.to(self.device)
        switch.enable(self.policy.ops, strict=self.policy.strict)
        found = self.job.manifest
        covers = describe(self.tokenizer, found.views, found.batch_size, found.seed, found.heif)
        manifest.check_same(found, covers, found.shard_size, self.job.out)
        self.job = replace(self.job, tokenizer=self.tokenizer)

    def encode(self, number: int) -> Waits:
        """Encode a shard and return the waiting times."""
        waits = Waits()
        with quiet_pillow():
            encode_shards(self.job, [number], waits=waits)
        return waits


class _Crew:
    """The actors, and which shard each one is making."""

    def __init__(self, ray: Any, job: Job, room: _Room, tokenizer: Tokenizer) -> None:
        self.ray, self.room, self.out = ray, room, job.out
        self.told = job, room.device, switch.policy(), ray.put(tokenizer)
        self.kind = ray.remote(_Encoder).options(
            num_cpus=room.cores, num_gpus=room.gpus, scheduling_strategy="SPREAD"
        )
        self.idle: list[Any] = []
        # By pending result: the actor and its shard, which is None while the actor starts.
        self.busy: dict[Any, tuple[Any, int | None]] = {}
        self.lost: Counter[int | None] = Counter()

    def encode(self, numbers: Iterator[int]) -> Iterator[tuple[int, Waits]]:
        """Have shards encoded; yield number and waiting times of each when it is done."""
        for _ in range(self.room.actors):
            self._start()
        again: deque[int] = deque()
        heard = time.monotonic()
        while True:
            while self.idle:
                number = again.popleft() if again else next(numbers, None)
                if number is None:
                    break
                actor = self.idle.pop()
                self.busy[actor.encode.remote(number)] = actor, number
            if all(number is None for _, number in self.busy.values()):
                if self.idle:
                    return  # nothing is left to hand out, and nothing is being made
                self._check_patience(heard)
            ready, _ = self.ray.wait(list(self.busy), timeout=1.0)
            for answer in ready:
                actor, number = self.busy.pop(answer)
                heard = time.monotonic()
                found = self._receive(answer, actor, number, again)
                if found is not None and number is not None:
                    yield number, found

    def close(self) -> None:
        """Kill the actors, even in the middle of a shard: an incomplete shard has no name yet."""
        for actor in [*self.idle, *(actor for actor, _ in self.busy.values())]:
            self.ray.kill(actor)

    def _start(self) -> None:
        actor = self.kind.remote(*self.told)
        self.busy[actor.open.remote()] = actor, None

    def _receive(
        self, answer: Any, actor: Any, number: int | None, again: deque[int]
    ) -> Waits | None:
        errors = self.ray.exceptions
        try:
            found = self.ray.get(answer)
        except errors.RayTaskError as error:
            # Raised by the actor's own code: raise it as if it had been raised here.
            raise error.cause from error
        except errors.RayError as error:
            self.lost[number] += 1
            with contextlib.suppress(errors.RayError):
                self.ray.kill(actor)  # in case it is only unreachable
            self._check_lost(number, error)
            if number is not None:
                again.append(number)
            self._start()
            return None
        self.idle.append(actor)
        self.lost[None] = 0
        return found

    def _check_lost(self, number: int | None, error: Exception) -> None:
        if number is None:
            most, what = 2 * self.room.actors + 3, "in a row died while starting"
        else:
            most, what = MOST_LOST_ON_A_SHARD, f"died in shard {number}"
        if self.lost[number] >= most:
            raise ActorsLost(
                f"{self.out}: {self.lost[number]} Ray actors {what}; see Ray's logs, then run "
                f"again (finished shards are kept): {first_line(error)}"
            ) from error

    def _check_patience(self, heard: float) -> None:
        if time.monotonic() - heard > START_PATIENCE:
            raise ActorsLost(
                f"{self.out}: Ray has not started an actor with {self.room.cores} CPU cores and "
                f"{self.room.gpus} GPUs in {START_PATIENCE:.0f} s; see `ray status`, then run "
                "again (finished shards are kept)"
            )
