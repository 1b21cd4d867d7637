"""Settings as data: spaces, tables on disk, and how an enabled op uses them."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

import vfmtok_fast as vf
from vfmtok_fast import ops, switch

pytest.importorskip("triton")
from vfmtok_fast.kernels import tables, tuning

CUDA = torch.device("cuda", 0)
CARD = "NVIDIA Test 9000"
TAKE = {"rows": 64, "warps": 8}


@pytest.fixture
def space(monkeypatch) -> tuning.Space:
    monkeypatch.setattr(tuning.Space, "made", [])
    return tuning.Space(
        "op.kernel",
        {"rows": (16, 32, 64), "warps": (4, 8)},
        {80: {"rows": 16, "warps": 4}, 90: {"rows": 32, "warps": 4}},
        valid=lambda s: s.rows * s.warps <= 512,
    )


@pytest.fixture
def card(monkeypatch, tmp_path) -> Path:
    """A GPU that does not exist; returns the path of the user's table for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: CARD)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    tuning._capability.cache_clear()
    tuning.forget_tables()
    yield tmp_path / "vfmtok_fast" / "tuned" / "nvidia-test-9000.json"
    tuning._capability.cache_clear()
    tuning.forget_tables()


def row(take=TAKE, size: int = 1024, kind: str = "float32") -> dict:
    return {"space": "op.kernel", "kind": kind, "size": size, "take": take, "us": 9.0,
            "default_us": 10.0}  # fmt: skip


def op_row(us: float, reference_us: float, size: int = 4, op: str = "nearest_code") -> dict:
    kind = "float32 d=3"
    return {"op": op, "kind": kind, "size": size, "us": us, "reference_us": reference_us}


def write(path: Path, settings=(), ops=(), **changes) -> None:
    content = tables.empty(CARD, "2026-11-26", "a test")
    content |= {"settings": list(settings), "ops": list(ops)} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    tuning.forget_tables()


def test_a_chip_takes_the_default_of_the_highest_capability_that_it_has(space, card):
    cpu = torch.device("cpu")
    assert space.at(cpu, "any", 1) == (32, 4)
    assert space.at(CUDA, "any", 1) == (16, 4)  # compute capability 8.9
    for chip, rows in ((80, 16), (89, 16), (90, 32), (120, 32), (70, 16)):
        with tuning.pretend(chip):
            assert space.at(cpu, "any", 1).rows == rows


def test_candidates_are_all_that_can_exist(space):
    assert len(space.candidates()) == 6
    space.valid = lambda s: s.rows * s.warps <= 128
    assert set(space.candidates()) == {(16, 4), (16, 8), (32, 4)}


@pytest.mark.parametrize(
    "values", [{"rows": 64}, {"rows": 48, "warps": 4}, {**TAKE, "x": 1}, {"rows": 64.0, "warps": 8}]
)
def test_what_is_no_setting_is_refused(space, values):
    with pytest.raises(ValueError, match="op.kernel"):
        space.setting(values)


def test_a_measured_setting_is_taken_at_the_nearest_size(space, card):
    far = row({"rows": 16, "warps": 8}, size=2**20)
    write(card, [row(), far])
    assert space.at(CUDA, "float32", 1024) == (64, 8)
    assert space.at(CUDA, "float32", 3000) == (64, 8)
    assert space.at(CUDA, "float32", 2**18) == (16, 8)
    # Nothing was measured for this dtype.
    assert space.at(CUDA, "bfloat16", 1024) == (16, 4)
    # Nor does it count for a chip that is only compiled for.
    with tuning.pretend(90):
        assert space.at(CUDA, "float32", 1024) == (32, 4)


def test_the_users_table_comes_before_the_shipped_one(space, card):
    write(tables.SHIPPED / card.name, [row({"rows": 32, "warps": 8}), row(kind="float16")])
    assert space.at(CUDA, "float32", 1) == (32, 8)
    write(card, [row()])
    assert space.at(CUDA, "float32", 1) == (64, 8)
    assert space.at(CUDA, "float16", 1) == (64, 8)


def test_a_setting_that_the_kernel_no_longer_has_is_passed_over(space, card):
    write(card, [row({"rows": 48, "warps": 4}), row({"tile": 1}, kind="float16")])
    assert space.at(CUDA, "float32", 1) == space.at(CUDA, "float16", 1) == (16, 4)


@pytest.mark.parametrize(
    ("versions", "said"),
    [({"triton": "2.0.0"}, "triton 2.0.0"), ({"vfmtok_fast": "0.0.1"}, "vfmtok_fast 0.0.1"),
     ({"triton": None}, "damaged"), ({"torch": "1.0"}, "")],
)  # fmt: skip
def test_a_table_of_other_versions_does_not_count_and_says_so(space, card, versions, said):
    write(card, [row()], versions=tables.versions() | versions)
    taken = space.at(CUDA, "float32", 1)
    text = "\n".join(tuning.describe(CUDA))
    if said:
        assert taken == (16, 4)
        assert said in text and "vfmtok-fast tune" in text and "defaults of compute" in text
    else:
        assert taken == (64, 8) and "1 settings measured on 2026-11-26" in text
    # A table that ships with the package is part of it.
    card.unlink()
    if said != "damaged":
        write(tables.SHIPPED / card.name, [row()], versions=tables.versions() | versions)
        assert space.at(CUDA, "float32", 1) == (64, 8)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 2}',
        '{"format": 1, "settings": [], "ops": []}',
        "\x00",
        "[" * 100_000,
    ],
)
def test_a_damaged_table_is_passed_over_and_says_so(space, card, text):
    card.parent.mkdir(parents=True)
    card.write_text(text)
    tuning.forget_tables()
    assert space.at(CUDA, "float32", 1) == (16, 4)
    (line, defaults) = tuning.describe(CUDA)
    assert "not used" in line and str(card) in line and "defaults" in defaults


@pytest.mark.parametrize(
    "change",
    [{"size": 0}, {"size": "big"}, {"us": float("nan")}, {"us": "fast"}, {"take": None},
     {"kind": 3}, {"default_us": -1.0}, {"size": True}, {"us": 10**400}, {"size": 10**400}],
)  # fmt: skip
def test_a_damaged_row_makes_the_table_damaged(card, change):
    write(card, [row() | change])
    assert "damaged" in tuning.describe(CUDA)[0]


def test_a_user_without_a_home_has_no_table(space, card, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tables.Path, "home", homeless)
    tuning.forget_tables()
    assert space.at(CUDA, "float32", 1) == (16, 4)


def test_saving_keeps_other_rows_and_replaces_its_own(card):
    first = tables.empty(CARD, "2026-11-26", "a test") | {"settings": [row(), row(size=4)]}
    tables.save(card, first)
    tables.save(card, first | {"settings": [row({"rows": 16, "warps": 4})], "ops": [op_row(1, 2)]})
    content = json.loads(card.read_text())
    assert [r["size"] for r in content["settings"]] == [4, 1024]
    assert content["settings"][1]["take"]["rows"] == 16 and len(content["ops"]) == 1
    # Nothing is kept of a table that is damaged or of other versions.
    tables.save(card, first | {"versions": {"triton": "0", "vfmtok_fast": "0"}, "settings": []})
    assert json.loads(card.read_text())["settings"] == []
    card.write_text("{")
    tables.save(card, first)
    assert len(json.loads(card.read_text())["settings"]) == 2
    assert [p.name for p in card.parent.iterdir()] == unordered(card.name, card.stem + ".lock")


def unordered(*names: str):
    class Same(list):
        def __eq__(self, other):
            return sorted(self) == sorted(other)

        __hash__ = None

    return Same(names)


def test_a_write_that_fails_leaves_the_old_table(card, monkeypatch):
    content = tables.empty(CARD, "2026-11-26", "a test") | {"settings": [row()]}
    tables.save(card, content)
    before = card.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables.os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        tables.save(card, content | {"settings": [row(size=2)]})
    assert card.read_bytes() == before
    assert [p for p in card.parent.iterdir() if p.suffix == ".tmp"] == []


def _save_many(path: Path, first: int) -> None:
    for size in range(first, first + 20):
        content = tables.empty(CARD, "2026-11-26", "a test")
        tables.save(path, content | {"settings": [row(size=size)]})


def test_two_processes_lose_nothing(card):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_save_many, args=(card, 1 + 20 * i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert [r["size"] for r in json.loads(card.read_text())["settings"]] == list(range(1, 61))


class TestAnEnabledOp:
    """Which implementation it uses if a table has both times; tensors are on a CPU."""

    Z, CODEBOOK = torch.eye(3), torch.eye(3).flip(0)

    @pytest.fixture(autouse=True)
    def kernel(self, monkeypatch, card):
        """A kernel of nearest_code that returns -7, on a card that was measured."""

        class Module:
            @staticmethod
            def nearest_code(z, codebook, **settings):
                return torch.full((z.shape[0],), -7)

            @staticmethod
            def tuning_key(z, codebook, **settings):
                return f"float32 d={z.shape[1]}", z.shape[0]

        monkeypatch.setattr(tuning, "tables", lambda device: tuning._card_tables(0))
        candidates = switch._registry["nearest_code"].candidates
        monkeypatch.setattr(candidates[0], "load", lambda: None)
        monkeypatch.setattr(candidates[0], "module", Module)
        monkeypatch.setattr(candidates[0], "tuning", tuning)
        monkeypatch.setattr(candidates[0], "serves", lambda device: True)
        switch._registry["nearest_code"]._found = {}
        yield
        switch._registry["nearest_code"]._found = {}

    def codes(self, n: int = 3) -> list[int]:
        return ops.nearest_code(self.Z[:n], self.CODEBOOK).tolist()

    def test_takes_the_kernel_where_nothing_was_measured(self):
        with vf.enable("nearest_code"):
            assert self.codes() == [-7] * 3

    def test_takes_the_reference_where_that_is_faster(self, card):
        write(card, ops=[op_row(9.0, 5.0)])
        # No fallback: it does not warn, and strict allows it.
        with vf.enable("nearest_code", strict=True):
            assert self.codes() == [2, 1, 0]
        status = vf.status().ops["nearest_code"]
        assert status.calls == {"reference": 1} and not status.fallbacks
        ((why, count),) = status.slower.items()
        assert "the reference is faster by nvidia-test-9000.json: 5 us against 9 us" in why
        assert count == 1 and why in str(vf.status())

    def test_takes_the_kernel_at_sizes_nearer_to_one_where_it_won(self, card):
        write(card, ops=[op_row(9.0, 5.0, size=1), op_row(9.0, 50.0, size=256)])
        with vf.enable("nearest_code"):
            assert self.codes(1) == [2] and self.codes(3) == [2, 1, 0]
            z = self.Z[:1].expand(40, 3)
            assert ops.nearest_code(z, self.CODEBOOK).tolist() == [-7] * 40

    def test_is_traced_with_it_by_torch_compile(self, card):
        write(card, ops=[op_row(9.0, 5.0)])
        torch._dynamo.reset()
        function = torch.compile(self.codes_tensor, backend="eager", fullgraph=True)
        with vf.enable("nearest_code"):
            assert function(self.Z, self.CODEBOOK).tolist() == [2, 1, 0]
        assert vf.status().ops["nearest_code"].slower

    @pytest.mark.parametrize("measured", [False, True])
    def test_is_traced_once_for_all_sizes_where_no_table_prefers_the_reference(
        self, card, measured
    ):
        if measured:
            write(card, ops=[op_row(5.0, 9.0)])
        torch._dynamo.reset()
        graphs = []

        def noting(graph, inputs):
            graphs.append(graph)
            return graph

        function = torch.compile(self.codes_tensor, backend=noting, fullgraph=True)
        with vf.enable("nearest_code"):
            for n in (3, 5, 9, 17):
                assert function(torch.ones(n, 3), self.CODEBOOK).shape == (n,)
        # The first size, then any size.
        assert len(graphs) <= 2

    @staticmethod
    def codes_tensor(z, codebook):
        return ops.nearest_code(z, codebook) + 0


def test_shipped_tables_fit_the_kernels_of_today():
    """Checks names, kinds of values and settings; their speed is what was measured."""
    files = sorted(tables.SHIPPED.glob("*.json"))
    assert files, "no card was measured"
    every = {
        space.name: space
        for op in ops.__all__
        for space in getattr(switch.kernel(op), "SPACES", ())
    }
    for file in files:
        table = tables._load(file, own=False)
        assert not table.problem, table
        for (name, _), rows in table.settings.items():
            for measured in rows:
                every[name].setting(measured["take"])
        assert {op for op, _ in table.ops} <= set(ops.__all__)


def test_every_kernel_with_settings_names_what_they_are_for():
    for op in ops.__all__:
        module = switch.kernel(op)
        for space in getattr(module, "SPACES", ()):
            assert space.candidates() and min(space.defaults) == 80, space
            assert all(default in space.candidates() for default in space.defaults.values())
