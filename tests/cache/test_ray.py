"""The Ray engine makes the bytes of a run without Ray, even if actors or nodes are lost."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import types

import pytest

from vfmtok_fast import cache, cli, switch
from vfmtok_fast.cache.make import on_ray

SMALL = {"batch_size": 3, "shard_size": 4, "views": ("center", "ten-crop-6")}


@pytest.fixture(scope="module")
def cluster(fake):
    """A local Ray cluster of two nodes with one core each."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # Classes of the tests are pickled by value, because the actors cannot import them.
    modules = sys.modules[fake.__name__], sys.modules[__name__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        for module in modules:
            ray.cloudpickle.register_pickle_by_value(module)
        handler = signal.getsignal(signal.SIGTERM)
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        found.second = found.add_node(num_cpus=1)
        ray.init(address=found.address, log_to_driver=False, logging_level="ERROR")
        yield found
        ray.shutdown()
        found.shutdown()
        signal.signal(signal.SIGTERM, handler)  # Ray leaves its own handler.
        for module in modules:
            ray.cloudpickle.unregister_pickle_by_value(module)


def watched(fake, folder, die_at=None):
    """Return a tokenizer that waits until two processes use it; one dies at batch `die_at`."""

    class Watched(fake.FakeTokenizer):
        def encode(self, images):
            assert switch.policy() == policy
            tokens = super().encode(images)
            (folder / str(os.getpid())).touch()
            for _ in range(600):
                if len(pids(folder)) >= 2:
                    break
                time.sleep(0.1)
            time.sleep(0.05)
            if len(self.batches) == die_at and not (folder / "died").exists():
                (folder / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return tokens

    policy = switch.policy()
    folder.mkdir()
    return Watched()


def pids(folder):
    return {int(path.name) for path in folder.iterdir() if path.name.isdigit()}


@pytest.mark.slow
def test_the_same_bytes_although_an_actor_is_killed(cluster, tmp_path, out, fake):
    tree = fake.make_tree(tmp_path / "p", count=60, bad=(3, 4, 31))
    cache.build(tree, tmp_path / "whole", fake.FakeTokenizer(), **SMALL)
    seen = []
    with switch.enable("nearest_code", strict=True):  # and thereby in the actors
        tokenizer = watched(fake, tmp_path / "seen", die_at=7)
        summary = cache.build_on_ray(tree, out, tokenizer, progress=seen.append, **SMALL)
    assert (tmp_path / "seen" / "died").exists() and len(pids(tmp_path / "seen")) >= 2
    assert (summary.images, summary.bad, summary.encoded, summary.exit_code) == (60, 3, 60, 3)
    assert seen[-1] == cache.Progress(60, 3, 60) and [p.done for p in seen] == sorted(
        p.done for p in seen
    )
    # The next run sweeps what the killed actor left half written, and finds every shard done.
    assert cache.build(tree, out, fake.FakeTokenizer(), **SMALL).encoded == 0
    assert fake.read_tree(out) == fake.read_tree(tmp_path / "whole")


@pytest.mark.slow
def test_the_same_bytes_although_a_node_is_lost(cluster, tmp_path, out, fake):
    tree = fake.make_tree(tmp_path / "p", count=60)
    cache.build(tree, tmp_path / "whole", fake.FakeTokenizer(), **SMALL)
    lost = []

    def lose(state):
        if not lost:
            cluster.remove_node(cluster.second)
            lost.append(state.done)

    try:
        cache.build_on_ray(tree, out, watched(fake, tmp_path / "seen"), progress=lose, **SMALL)
    finally:
        cluster.second = cluster.add_node(num_cpus=1)
    assert lost[0] < 56 and len(pids(tmp_path / "seen")) >= 2
    assert cache.build(tree, out, fake.FakeTokenizer(), **SMALL).encoded == 0
    assert fake.read_tree(out) == fake.read_tree(tmp_path / "whole")


@pytest.mark.slow
def test_a_shard_that_kills_every_actor_ends_the_run(
    cluster, tmp_path, tree, out, fake, monkeypatch
):
    class Deadly(fake.FakeTokenizer):
        def encode(self, images):
            os._exit(1)

    monkeypatch.setattr(on_ray, "MOST_LOST_ON_A_SHARD", 2)
    with pytest.raises(cache.ActorsLost, match=r"2 Ray actors died in shard \d; see Ray's logs"):
        cache.build_on_ray(tree, out, Deadly(), actors=1, **SMALL)
    assert cache.build(tree, out, fake.FakeTokenizer(), **SMALL).encoded == 11


@pytest.mark.slow
def test_an_actor_raises_what_a_run_without_ray_would(cluster, tmp_path, tree, out, fake):
    job = cache.prepare(tree, out, fake.FakeTokenizer(), **SMALL)
    (out / "shards" / "tokens-00000.safetensors").mkdir()
    with pytest.raises(cache.CacheWriteError, match=r"tokens-00000.safetensors: Is a directory"):
        cache.build_on_ray(tree, out, fake.FakeTokenizer(), actors=1, **SMALL)
    (out / "shards" / "tokens-00000.safetensors").rmdir()
    assert job.manifest == cache.read_manifest(out)


@pytest.mark.slow
def test_the_command(cluster, tmp_path, tree, out, capsys):
    small = ["--untrained", "small", "--shard-size", "6", "--batch-size", "4"]
    asked = ["cache", str(tree), str(out), *small]
    assert cli.main([*asked, "--engine", "ray", "--actors", "1", "--device", "cpu", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["state"] == "complete" and lines[-1]["encoded"] == 11
    assert cli.main([*asked, "--device", "cpu"]) == 0
    assert ", 0 encoded now" in capsys.readouterr().out


class LostCluster:
    """A fake Ray whose first actor starts and is lost with its node; no other actor ever starts."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            pass

    class Method:
        def __init__(self, name):
            self.name = name

        def remote(self, *arguments):
            return self.name, object()

    def __init__(self):
        self.opened = self.waits = 0

    def remote(self, kind):
        return types.SimpleNamespace(options=lambda **settings: self.Kind())

    class Kind:
        def remote(self, *arguments):
            method = LostCluster.Method
            return types.SimpleNamespace(open=method("open"), encode=method("encode"))

    def put(self, value):
        return value

    def kill(self, actor):
        pass

    def wait(self, answers, timeout):
        self.waits += 1
        assert self.waits < 50, "waits for ever"
        ready = [answer for answer in answers if answer[0] == "encode" or not self.opened]
        self.opened += bool(ready)
        return ready, []

    def get(self, answer):
        if answer[0] == "encode":
            raise self.exceptions.RayError("its node died")


def test_a_cluster_that_starts_no_actor_any_more_is_not_waited_for_for_ever(monkeypatch):
    job, ray = types.SimpleNamespace(out="tokens"), LostCluster()
    crew = on_ray._Crew(ray, job, on_ray._Room(1, 1, 0), None)
    check = crew._check_patience
    monkeypatch.setattr(on_ray, "START_PATIENCE", 0.0)
    monkeypatch.setattr(crew, "_check_patience", lambda heard: ray.opened and check(heard - 1))
    with pytest.raises(cache.ActorsLost, match="has not started an actor"):
        list(crew.encode(iter([0])))


def test_what_the_cluster_is_asked_for(monkeypatch):
    class Ray:
        def __init__(self, *nodes):
            self.found = [
                {
                    "Alive": alive,
                    "Resources": {"CPU": cores, "GPU": gpus} if gpus else {"CPU": cores},
                }
                for alive, cores, gpus in nodes
            ]

        def nodes(self):
            return self.found

    room, Room = on_ray._room, on_ray._Room
    assert room(Ray((True, 2.0, 0)), None, None, 99) == Room(1, 2, 0)
    assert room(Ray((True, 2.0, 0)), 2, None, 99) == Room(2, 1, 0)
    assert room(Ray((True, 32.0, 0), (True, 4.0, 0)), None, None, 99) == Room(4, 8, 0)
    gpus = Ray((True, 64.0, 8), (True, 16.0, 4), (True, 99.0, 0), (False, 9.0, 9))
    assert room(gpus, None, None, 99) == Room(12, 4, 1)
    assert room(gpus, None, None, 5).actors == 5
    assert room(gpus, 3, "cuda", 99).actors == 3 and room(gpus, 3, "cuda", 99).device == "cuda"
    assert room(gpus, None, "cpu", 99).gpus == 0
    for device, text in (("cuda", "has no GPU"), ("tpu", "must be cuda or cpu on Ray, got 'tpu'")):
        with pytest.raises(ValueError, match=text):
            room(Ray((True, 2.0, 0)), None, device, 99)


def test_without_ray_or_with_wrong_settings(tree, out, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="actors must be at least 1, got 0"):
        cache.build_on_ray(tree, out, tokenizer, actors=0, **SMALL)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ValueError, match=r"needs the package ray: pip install 'vfmtok-fast\[ray\]'"
    ):
        cache.build_on_ray(tree, out, tokenizer, **SMALL)
    assert not out.exists()
