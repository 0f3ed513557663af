"""The KV cache against a shadow model that keeps every token of every (layer, row) in a Python list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from lethe_compile import pool
from lethe_compile.cache import KVCache
from lethe_compile.errors import ConfigError, InputError, OutOfPagesError
from lethe_compile.pool import Geometry

WIDE, NARROW = Geometry(2, 3, 5), Geometry(1, 4, 2)
SLOT_BYTES = 4 + 4  # position and mass


@pytest.fixture(autouse=True)
def harsh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.empty` gives NaN and the largest integer; pages are copied one by one, so that order matters."""
    monkeypatch.setattr(pool, "_CHUNK_BYTES", 1)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class Shadow:
    """Drives a cache as a runtime does and remembers what it must hold: tokens [layer][row] are unique numbers."""

    def __init__(
        self,
        geometries: Sequence[Geometry],
        *,
        page_size: int = 4,
        contiguous: bool = True,
        max_bytes: int | None = None,
        device: str = "cpu",
    ) -> None:
        assert torch.empty(1).isnan().all(), "fresh memory is not poisoned"
        self.geometries, self.page = list(geometries), page_size
        self.cache = KVCache(
            geometries,
            page_size=page_size,
            dtype=torch.float32,
            device=device,
            contiguous=contiguous,
            max_bytes=max_bytes,
        )
        self.serial = 0

    def begin(self, rows: int, hint: int = 0) -> None:
        self.cache.begin(rows, hint)
        self.rows = rows
        self.tokens: list[list[list[int]]] = [[[] for _ in range(rows)] for _ in self.geometries]
        self.room = [[0] * rows for _ in self.geometries]  # tokens that fit, by what was reserved
        self.peak = self.freed = 0
        self.samples: list[int] = []

    def page_bytes(self, layer: int) -> int:
        geometry = self.geometries[layer]
        return self.page * geometry.num_kv_heads * (geometry.k_dim + geometry.v_dim) * 4

    def reserve(self, per_row: Sequence[int]) -> bool:
        """Whether it was granted; a refusal must be right, and change nothing."""
        cache = self.cache
        held = cache.stats()["pages"]
        need = [
            [
                max(held[layer][r], ceil_div(len(self.tokens[layer][r]) + n, self.page) if n else 0)
                for r, n in enumerate(per_row)
            ]
            for layer in range(len(self.geometries))
        ]
        by_geometry = Counter(dict.fromkeys(self.geometries, 0))
        for geometry, pages in zip(self.geometries, need, strict=True):
            by_geometry[geometry] += sum(pages)
        total = sum(n * self.page * (g.bytes_per_token(torch.float32) + SLOT_BYTES) for g, n in by_geometry.items())
        before = cache.stats(), cache.inputs()
        try:
            cache.reserve_rows(per_row)
        except OutOfPagesError as error:
            assert cache.max_bytes is not None
            assert total > cache.max_bytes
            assert str(total) in str(error) and str(cache.max_bytes) in str(error)
            assert cache.stats() == before[0]
            assert all(a is b for a, b in zip(cache.inputs().values(), before[1].values(), strict=True))
            return False
        assert cache.max_bytes is None or total <= cache.max_bytes
        self._check_growth(per_row, held, need)
        self.peak = max(self.peak, self.in_use())
        return True

    def _check_growth(self, per_row: Sequence[int], before: list[list[int]], need: list[list[int]]) -> None:
        pages = self.cache.stats()["pages"]
        for layer, row in self.sequences():
            old, new, length = before[layer][row], pages[layer][row], len(self.tokens[layer][row])
            if need[layer][row] == old:
                assert new == old
            elif self.cache.contiguous:
                slack = max(per_row[row], length // 16)
                assert need[layer][row] <= new <= max(old, ceil_div(length + slack, self.page))
            else:
                assert new == need[layer][row]
            if per_row[row]:
                self.room[layer][row] = max(self.room[layer][row], length + per_row[row])

    def step(self, per_row: Sequence[int], assumed: Sequence[int] | None = None) -> None:
        """What the attention ops of one step do, and the host's part, which may assume more than is true."""
        assumed = per_row if assumed is None else assumed
        state = self.cache.inputs()
        for layer, row in self.sequences():
            for _ in range(per_row[row]):
                self.serial += 1
                self._write(state, layer, row, len(self.tokens[layer][row]), self.serial)
                self.tokens[layer][row].append(self.serial)
        state["length"] += torch.tensor(per_row, dtype=torch.int32, device=self.cache.device)
        self.cache.assume(assumed)
        self.samples.append(self.in_use())
        bounds = self.cache.stats()["lengths"]
        assert all(bounds[layer][row] >= len(self.tokens[layer][row]) for layer, row in self.sequences())
        if list(assumed) != list(per_row):
            (seen,) = self.cache.sync(torch.tensor([self.serial]))
            assert seen.tolist() == [self.serial]
            for layer, row in self.sequences():
                self.room[layer][row] = max(self.room[layer][row], len(self.tokens[layer][row]))

    def compact(self, keep: dict[int, list[list[bool]]]) -> None:
        """A round in which some layers keep only so much, by row."""
        width = max(1, *(len(row) for rows in self.tokens for row in rows))
        mask = torch.ones(len(self.geometries), self.rows, width, dtype=torch.bool)
        for layer, rows in keep.items():
            for row, kept in enumerate(rows):
                mask[layer, row, : len(kept)] = torch.tensor(kept, dtype=torch.bool)
        before, serial = self.cache.compact(mask.to(self.cache.device), torch.tensor(self.serial).to(self.cache.device))
        assert before.tolist() == [[len(row) for row in rows] for rows in self.tokens]
        assert serial == self.serial
        for layer, rows in keep.items():
            for row, kept in enumerate(rows):
                self._drop(layer, row, kept)

    def _drop(self, layer: int, row: int, kept: list[bool]) -> None:
        old = self.tokens[layer][row]
        new = [token for token, stays in zip(old, kept, strict=True) if stays]
        if len(new) < len(old):
            self.room[layer][row] = len(new)
            assert self.cache.stats()["pages"][layer][row] == ceil_div(len(new), self.page)
        self.freed += (ceil_div(len(old), self.page) - ceil_div(len(new), self.page)) * self.page_bytes(layer)
        self.tokens[layer][row] = new

    def free(self, rows: Sequence[int]) -> None:
        self.cache.free_rows(rows)
        for layer in range(len(self.geometries)):
            for row in rows:
                self.tokens[layer][row] = []
                self.room[layer][row] = 0

    def sequences(self) -> Iterator[tuple[int, int]]:
        return ((layer, row) for layer in range(len(self.geometries)) for row in range(self.rows))

    def in_use(self) -> int:
        return sum(sum(row) * self.page_bytes(layer) for layer, row in enumerate(self.cache.stats()["pages"]))

    def _slots(self, state: dict[str, Tensor], layer: int, row: int, slot: int) -> list[Tensor]:
        at, offset = int(state["page_table"][layer, row, slot // self.page]), slot % self.page
        g = self.cache.pool_of_layer[layer]
        k, v, position, mass = (state[f"{n}_{g}"] for n in ("k_pages", "v_pages", "slot_position", "slot_mass"))
        return [k[at, :, offset], v[at, :, offset], position[at, offset], mass[at, offset]]

    def _write(self, state: dict[str, Tensor], layer: int, row: int, slot: int, token: int) -> None:
        for index, view in enumerate(self._slots(state, layer, row, slot)):
            view.copy_(self._value(index, view, token))

    @staticmethod
    def _value(index: int, like: Tensor, token: int) -> Tensor:
        if like.dim() == 0:
            return torch.tensor(token, dtype=like.dtype)
        return token + torch.arange(like.numel()).view_as(like) / 64 + 0.5 * index

    def check(self) -> None:
        """Contents, ownership and figures."""
        state = {name: tensor.cpu() for name, tensor in self.cache.inputs().items()}
        stats = self.cache.stats()
        assert stats["lengths"] == state["length"].tolist() == [[len(row) for row in rows] for rows in self.tokens]
        assert state["page_table"].shape[:2] == (len(self.geometries), self.rows)
        owned: list[list[int]] = [[] for _ in set(self.geometries)]
        for layer, row in self.sequences():
            tokens, pages = self.tokens[layer][row], stats["pages"][layer][row]
            table = state["page_table"][layer, row].tolist()
            assert ceil_div(self.room[layer][row], self.page) <= pages
            assert set(table[pages:]) <= {0}
            owned[self.cache.pool_of_layer[layer]] += table[:pages]
            if self.cache.contiguous and pages:
                assert table[:pages] == list(range(table[0], table[0] + pages))
            for slot, token in enumerate(tokens):
                for index, view in enumerate(self._slots(state, layer, row, slot)):
                    assert torch.equal(view, self._value(index, view, token).to(view.dtype)), (layer, row, slot)
        for g, pages in enumerate(owned):
            assert len(set(pages)) == len(pages)
            assert set(pages) <= set(range(state[f"k_pages_{g}"].shape[0]))
            assert len({state[f"{n}_{g}"].shape[0] for n in ("k_pages", "v_pages", "slot_position", "slot_mass")}) == 1
        self._check_states()
        self._check_figures(state)

    def _check_states(self) -> None:
        mass, position, length = self.cache.scores()
        width = max(1, *(len(row) for rows in self.tokens for row in rows))
        assert (mass.dtype, position.dtype, length.dtype) == (torch.float32, torch.int32, torch.int64)
        assert length.tolist() == [[len(row) for row in rows] for rows in self.tokens]
        assert mass.tolist() == [[row + [0] * (width - len(row)) for row in rows] for rows in self.tokens]
        assert position.tolist() == [[row + [-1] * (width - len(row)) for row in rows] for rows in self.tokens]

    def _check_figures(self, state: dict[str, Tensor]) -> None:
        cache = self.cache
        pages = cache.stats()["pages"]
        pools = [tensor for name, tensor in state.items() if name[-1].isdigit()]
        assert cache.bytes_in_use == self.in_use()
        assert cache.bytes_peak == self.peak
        assert cache.bytes_freed == self.freed
        assert cache.bytes_mean == (sum(self.samples) / len(self.samples) if self.samples else 0)
        assert cache.pool_bytes == sum(tensor.nbytes for tensor in pools) <= cache.pool_bytes_peak
        tables = state["page_table"].nbytes + state["length"].nbytes
        assert cache.overhead_bytes == sum(map(sum, pages)) * self.page * SLOT_BYTES + tables
        assert cache.max_bytes is None or cache.pool_bytes <= cache.max_bytes


class CacheMachine(RuleBasedStateMachine):
    """Any order of what a runtime may do."""

    @initialize(
        geometries=st.sampled_from([[WIDE], [WIDE, NARROW, WIDE]]),
        page_size=st.sampled_from([1, 2, 4, 8]),
        contiguous=st.booleans(),
        max_bytes=st.sampled_from([None, 6_000, 20_000]),
        rows=st.integers(1, 3),
    )
    def create(
        self, geometries: list[Geometry], page_size: int, contiguous: bool, max_bytes: int | None, rows: int
    ) -> None:
        self.shadow = Shadow(geometries, page_size=page_size, contiguous=contiguous, max_bytes=max_bytes)
        self.shadow.begin(rows)

    def per_row(self, data: st.DataObject, high: Sequence[int]) -> list[int]:
        return [data.draw(st.integers(0, top)) for top in high]

    def headroom(self) -> list[int]:
        """[rows] tokens that fit into every layer."""
        room, tokens = self.shadow.room, self.shadow.tokens
        free = [[n - len(t) for n, t in zip(*rows, strict=True)] for rows in zip(room, tokens, strict=True)]
        return [max(0, min(column)) for column in zip(*free, strict=True)]

    @rule(rows=st.integers(1, 4), hint=st.sampled_from([0, 0, 5, 40]))
    def begin(self, rows: int, hint: int) -> None:
        self.shadow.begin(rows, hint)

    @rule(data=st.data(), longest=st.sampled_from([1, 4, 30]))
    def prefill_or_extend(self, data: st.DataObject, longest: int) -> None:
        tokens = self.per_row(data, [longest] * self.shadow.rows)
        if self.shadow.reserve(tokens):
            self.shadow.step(tokens)

    @rule(data=st.data(), tokens=st.integers(1, 9))
    def reserve_ahead(self, data: st.DataObject, tokens: int) -> None:
        active = [data.draw(st.booleans()) for _ in range(self.shadow.rows)]
        self.shadow.reserve([tokens if on else 0 for on in active])

    @precondition(lambda self: any(self.headroom()))
    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        room = self.headroom()
        self.shadow.step(self.per_row(data, room), room if data.draw(st.booleans()) else None)

    @rule(data=st.data(), modulus=st.integers(1, 5), phase=st.integers(0, 4))
    def round(self, data: st.DataObject, modulus: int, phase: int) -> None:
        keep = {
            layer: [
                [modulus == 1 or (token + row) % modulus == phase % modulus for token in tokens]
                for row, tokens in enumerate(self.shadow.tokens[layer])
            ]
            for layer in range(len(self.shadow.geometries))
            if data.draw(st.booleans())
        }
        self.shadow.compact(keep)

    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        self.shadow.free(data.draw(st.lists(st.integers(0, self.shadow.rows - 1), unique=True)))

    @rule()
    def end(self) -> None:
        self.shadow.cache.end()
        self.shadow.free(range(self.shadow.rows))
        assert self.shadow.cache.bytes_in_use == 0

    @invariant()
    def holds(self) -> None:
        self.shadow.check()


CacheMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
test_any_sequence_of_operations = CacheMachine.TestCase


def decode(shadow: Shadow, steps: int, interval: int = 4) -> None:
    """Steps of one token a row, pages reserved once an interval."""
    for step in range(steps):
        if step % interval == 0:
            assert shadow.reserve([interval] * shadow.rows)
        shadow.step([1] * shadow.rows)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_decode_with_rounds_keeps_contents_and_frees_memory(contiguous: bool, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    shadow = Shadow([WIDE, NARROW, WIDE], contiguous=contiguous, device=device)
    shadow.begin(2)
    assert shadow.reserve([40, 13])
    shadow.step([40, 13])
    for _ in range(3):
        decode(shadow, 20)
        before = shadow.cache.stats()["pages"]
        keep = {i: [[slot % 4 == 0 for slot in range(len(row))] for row in shadow.tokens[i]] for i in (0, 2)}
        shadow.compact(keep)
        after = shadow.cache.stats()["pages"]
        assert all(sum(after[layer]) < sum(before[layer]) / 2 for layer in (0, 2))
        assert after[1] == before[1]
        shadow.check()
    assert shadow.cache.bytes_freed == shadow.freed > 0
    shadow.cache.end()
    assert shadow.cache.bytes_in_use == 0


def test_a_round_over_all_layers_and_the_reserve_behind_it_upload_the_table_once() -> None:
    shadow = Shadow([WIDE] * 4)
    shadow.begin(2)
    assert shadow.reserve([32, 32])
    shadow.step([32, 32])
    table, before = shadow.cache.page_table, shadow.cache.page_table._version
    shadow.compact({layer: [[slot < 9 for slot in range(32)]] * 2 for layer in range(4)})
    assert table._version == before
    shadow.cache.reserve(8, active=[True, False])
    shadow.cache.inputs()
    assert shadow.cache.page_table is table
    assert table._version == before + 1
    shadow.cache.reserve(1)
    shadow.cache.inputs()
    assert table._version == before + 1


def test_a_growing_contiguous_pool_is_rebuilt_seldom() -> None:
    shadow = Shadow([WIDE] * 3)
    shadow.begin(4)
    assert shadow.reserve([64] * 4)
    shadow.step([64] * 4)
    pools = []
    for _ in range(64):
        decode(shadow, 4)
        pools.append(shadow.cache.inputs()["k_pages_0"])
    rebuilt = sum(a is not b for a, b in pairwise(pools))
    assert 1 <= rebuilt <= 10  # 64 -> 320 tokens, a quarter more at a time, is 8
    shadow.check()


@pytest.mark.parametrize(("contiguous", "prompt"), [(True, [20, 20]), (False, [20, 7])])
def test_a_hint_makes_room_at_once_and_a_larger_reserve_still_works(contiguous: bool, prompt: list[int]) -> None:
    shadow = Shadow([WIDE, NARROW], contiguous=contiguous)
    shadow.begin(2, hint=48)
    tensors = shadow.cache.inputs()
    assert shadow.reserve(prompt)
    shadow.step(prompt)
    decode(shadow, 28)
    assert all(a is b for a, b in zip(tensors.values(), shadow.cache.inputs().values(), strict=True))
    assert shadow.reserve([100, 1])
    shadow.check()


def test_a_contiguous_pool_shrinks_once_most_of_it_is_free() -> None:
    shadow = Shadow([WIDE])
    shadow.begin(2)
    assert shadow.reserve([400, 400])
    shadow.step([400, 400])
    full = shadow.cache.pool_bytes
    shadow.compact({0: [[slot < 40 for slot in range(400)]] * 2})
    assert shadow.cache.pool_bytes == full
    assert shadow.reserve([8, 8])
    assert shadow.cache.pool_bytes < full / 5
    assert shadow.cache.pool_bytes_peak >= full
    shadow.check()


def test_a_contiguous_row_is_one_strided_matrix() -> None:
    shadow = Shadow([WIDE])
    shadow.begin(2)
    assert shadow.reserve([9, 14])
    shadow.step([9, 14])
    state = shadow.cache.inputs()
    keys = state["k_pages_0"].transpose(0, 1).flatten(1, 2)  # [kv_heads, pages * page, k_dim]
    assert keys.data_ptr() == state["k_pages_0"].data_ptr()
    start = int(state["page_table"][0, 1, 0]) * shadow.page
    assert keys[0, start : start + 14, 0].tolist() == shadow.tokens[0][1]


def test_a_row_that_outgrows_its_place_moves_within_the_pool() -> None:
    shadow = Shadow([WIDE])
    shadow.begin(3, hint=40)
    assert shadow.reserve([8, 8, 8])
    shadow.step([8, 8, 8])
    shadow.free([2])
    state = shadow.cache.inputs()
    assert shadow.reserve([36, 0, 0])  # more than lies free before row 1, less than what row 2 left behind it
    after = shadow.cache.inputs()
    assert after["k_pages_0"] is state["k_pages_0"]
    assert int(after["page_table"][0, 0, 0]) > int(after["page_table"][0, 1, 0])
    shadow.check()


def test_contiguous_growth_takes_a_sixteenth_unless_the_limit_forbids_it() -> None:
    page_bytes = 4 * (64 + SLOT_BYTES)
    for limit, pages in ((None, 170), (161 * page_bytes, 161)):
        shadow = Shadow([WIDE], max_bytes=limit)
        shadow.begin(1)
        assert shadow.reserve([640])
        shadow.step([640])
        assert shadow.reserve([1])
        assert shadow.cache.stats()["pages"] == [[pages]]
        shadow.check()


def test_a_hint_beyond_the_limit_takes_what_there_is_and_keeps_it() -> None:
    shadow = Shadow([WIDE, NARROW], max_bytes=20_000)
    shadow.begin(2, hint=10_000)
    assert 19_000 < shadow.cache.pool_bytes <= 20_000
    tensors = shadow.cache.inputs()
    decode(shadow, 12)
    assert tensors["k_pages_0"] is shadow.cache.inputs()["k_pages_0"]
    assert tensors["v_pages_1"] is shadow.cache.inputs()["v_pages_1"]
    shadow.check()


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_pool_gives_up_room_that_another_needs_under_a_common_limit(contiguous: bool) -> None:
    shadow = Shadow([WIDE, NARROW], contiguous=contiguous, max_bytes=24_000)
    shadow.begin(1)
    assert shadow.reserve([160])
    shadow.step([160])
    wide = shadow.cache.inputs()["k_pages_0"].shape[0]
    shadow.compact({0: [[slot < 2 for slot in range(160)]]})
    assert shadow.reserve([150])
    shadow.step([150])
    assert shadow.cache.inputs()["k_pages_0"].shape[0] < wide
    assert not shadow.reserve([400])
    shadow.check()


def test_a_failed_allocation_leaves_a_paged_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    shadow = Shadow([WIDE], contiguous=False)
    shadow.begin(2)
    assert shadow.reserve([10, 20])
    shadow.step([10, 20])
    allocate = pool.Pool._allocate

    def fail(self: pool.Pool, name: str, pages: int) -> Tensor:
        if name == "v_pages":
            raise torch.OutOfMemoryError("no memory")
        return allocate(self, name, pages)

    with monkeypatch.context() as patch:
        patch.setattr(pool.Pool, "_allocate", fail)
        with pytest.raises(OutOfPagesError, match="the device has no memory"):
            shadow.cache.reserve(100)
        assert shadow.cache.stats()["pages"] == [[3, 5]]
        with pytest.raises(OutOfPagesError, match="the device has no more"):  # known now, so it is not tried again
            shadow.cache.reserve(100)
        assert shadow.cache.limit([1, 0]) == 20
    shadow.begin(2)
    assert shadow.reserve([10, 20])
    shadow.step([10, 20])
    decode(shadow, 30)
    shadow.check()


@pytest.mark.parametrize("contiguous", [True, False])
def test_an_empty_pool_gives_its_memory_back_before_it_grows(contiguous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shadow = Shadow([WIDE], contiguous=contiguous)
    shadow.begin(1, hint=100)
    small, allocate = shadow.cache.pool_bytes, pool.Pool._allocate
    held: list[int] = []

    def watch(self: pool.Pool, name: str, pages: int) -> Tensor:
        held.append(self.bytes)
        if pages > limit:
            raise torch.OutOfMemoryError("no memory")
        return allocate(self, name, pages)

    monkeypatch.setattr(pool.Pool, "_allocate", watch)
    limit = 1_000
    shadow.begin(1, hint=400)
    grown = shadow.cache.pool_bytes
    assert grown > small and max(held[len(held) // 2 :]) == 0
    limit = shadow.cache.inputs()["k_pages_0"].shape[0]
    shadow.begin(1, hint=4_000)  # a wish: denied, it is no error
    assert shadow.cache.pool_bytes == grown  # what there was has come back
    shadow.begin(1)
    assert shadow.reserve([300])
    shadow.step([300])
    shadow.check()


@pytest.mark.parametrize("contiguous", [True, False])
def test_the_generation_changes_with_the_tensors_and_only_then(contiguous: bool) -> None:
    shadow = Shadow([WIDE, NARROW], contiguous=contiguous)
    shadow.begin(2)
    generation, tensors, changes = shadow.cache.generation, shadow.cache.inputs(), 0
    for step in range(60):
        decode(shadow, 4)
        if step % 10 == 9:
            shadow.compact({0: [[slot % 3 == 0 for slot in range(len(row))] for row in shadow.tokens[0]]})
        now = shadow.cache.inputs()
        same = all(a is b for a, b in zip(tensors.values(), now.values(), strict=True))
        assert same == (generation == shadow.cache.generation)
        changes += not same
        generation, tensors = shadow.cache.generation, now
    assert 2 <= changes <= (40 if contiguous else 12)
    shadow.begin(3)
    assert shadow.cache.generation > generation


def test_an_explicit_limit_is_allocated_at_once_where_pages_are_scattered() -> None:
    shadow = Shadow([WIDE, NARROW], contiguous=False, max_bytes=24_000)
    shadow.begin(2, hint=3)
    assert 23_000 < shadow.cache.pool_bytes <= 24_000
    tensors = shadow.cache.inputs()
    assert shadow.reserve([30, 30])
    assert all(a is b for a, b in zip(tensors.values(), shadow.cache.inputs().values(), strict=True) if a.dim() == 4)


@pytest.mark.parametrize("contiguous", [True, False])
def test_the_limit_is_the_most_that_leaves_room(contiguous: bool) -> None:
    shadow = Shadow([WIDE, NARROW], contiguous=contiguous, max_bytes=16_000)
    shadow.begin(2)
    assert shadow.reserve([60, 20])
    shadow.step([60, 20])
    assert not shadow.reserve([40, 40])
    limit = shadow.cache.limit([40, 40])
    assert 0 < limit < 60
    shadow.compact({i: [[slot < limit for slot in range(len(row))] for row in shadow.tokens[i]] for i in (0, 1)})
    shadow.cache.trim()
    shadow.room = [[len(row) for row in rows] for rows in shadow.tokens]
    shadow.check()
    assert shadow.reserve([40, 40])
    with pytest.raises(OutOfPagesError, match="no room for 900 new tokens"):
        shadow.cache.limit([900, 0])


@pytest.mark.parametrize("contiguous", [True, False])
def test_tokens_from_elsewhere_are_packed_in_order(contiguous: bool) -> None:
    """Left-padded rows, and a layer whose window has cut one of them."""
    cache = KVCache(
        [WIDE, NARROW], page_size=2, dtype=torch.float32, device="cpu", contiguous=contiguous, max_bytes=None
    )
    cache.begin(3)  # the third row stays empty
    cache.reserve_rows([4, 5, 0])
    positions = [torch.tensor([[-1, 0, 1, 2, 3], [0, 1, 2, 3, 4]]), torch.tensor([[2, 3], [3, 4]])]
    given = []
    for layer, (geometry, position) in enumerate(zip((WIDE, NARROW), positions, strict=True)):
        heads, slots = geometry.num_kv_heads, position.shape[1]
        given.append([torch.randn(2, heads, slots, size) for size in (geometry.k_dim, geometry.v_dim)])
        cache.load(layer, *given[layer], position)
    assert cache.length.tolist() == cache.lengths.tolist() == [[4, 5, 0], [2, 2, 0]]
    mass, stored, _ = cache.scores()
    assert not mass.any()
    state = cache.inputs()
    for layer, position in enumerate(positions):
        for row in range(2):
            real = position[row] >= 0
            held = int(real.sum())
            assert stored[layer, row, :held].tolist() == position[row, real].tolist()
            for name, tensor in zip(("k_pages", "v_pages"), given[layer], strict=True):
                pages = state[f"{name}_{layer}"][state["page_table"][layer, row].long()]  # [pages, heads, page, size]
                packed = pages.transpose(0, 1).flatten(1, 2)[:, :held]
                assert torch.equal(packed, tensor[row][:, real])
            keys = cache.keys(layer)[row]  # [N, heads, k_dim]
            assert torch.equal(keys[:held], given[layer][0][row][:, real].transpose(0, 1))
            assert not keys[held:].any(), "whatever a page holds behind the last token"
    state["slot_mass_0"].fill_(2.0)
    state["slot_mass_1"].fill_(3.0)
    cache.clear_mass()
    assert not cache.scores()[0].any()
    with pytest.raises(InputError, match="fewer were reserved"):
        cache.load(0, torch.zeros(3, 2, 4, 3), torch.zeros(3, 2, 4, 5), torch.arange(4).expand(3, 4))


@pytest.mark.parametrize("contiguous", [True, False])
def test_values_in_keys_take_no_pool_of_their_own(contiguous: bool) -> None:
    cache = KVCache([Geometry(1, 6, 4, True)], page_size=4, dtype=torch.float32, device="cpu", contiguous=contiguous)
    cache.begin(2)
    cache.reserve(9)
    names = [name for name in cache.inputs() if name.endswith("_0")]
    assert names == ["k_pages_0", "slot_position_0", "slot_mass_0"]
    keys, position = torch.randn(2, 1, 9, 6), torch.arange(9).repeat(2, 1)
    cache.load(0, keys, keys[..., :4], position)
    assert cache.bytes_in_use == 2 * 3 * 4 * 6 * 4, "rows, pages, slots, numbers, bytes"
    keep = position[None] % 2 == 0
    cache.compact(keep)
    state = cache.inputs()
    for row in range(2):
        slots = torch.arange(5)
        pages = state["page_table"][0, row, slots // 4].long()
        assert torch.equal(state["k_pages_0"][pages, 0, slots % 4], keys[row, 0, ::2])
    assert cache.bytes_freed == 2 * 1 * 4 * 6 * 4


def test_geometry_counts_keys_and_values_only() -> None:
    assert Geometry(1, 576, 512, True).bytes_per_token(torch.bfloat16) == 1152
    assert Geometry(8, 128, 128).bytes_per_token(torch.bfloat16) == 4096
    assert Geometry(1, 576, 512).bytes_per_token(torch.float32) == 4352


def test_a_limit_below_one_page_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"max_bytes=100 .* takes 288 bytes"):
        Shadow([WIDE], max_bytes=100)
    with pytest.raises(ConfigError, match="at least one layer"):
        Shadow([])


def test_wrong_inputs_are_refused() -> None:
    shadow = Shadow([WIDE])
    shadow.begin(2)
    assert shadow.reserve([4, 4])
    with pytest.raises(InputError, match="not reserved"):
        shadow.cache.assume([5, 0])
    with pytest.raises(InputError, match="each of 2 rows"):
        shadow.cache.reserve_rows([1])
    with pytest.raises(InputError, match=">= 0"):
        shadow.cache.reserve_rows([1, -1])
    shadow.step([4, 4])
    for shape in ((1, 2, 3), (2, 2, 4), (1, 1, 4)):
        with pytest.raises(InputError, match=r"must be \[1, 2, >= 4\]"):
            shadow.cache.compact(torch.ones(shape, dtype=torch.bool))
    shadow.check()
