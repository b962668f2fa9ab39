"""Each family, split over 1 to 8 real ranks, against transformers on a checkpoint that it saved.

The tolerance is that of sums of some hundred float32 products in another order: 1e-4 relative to
logits of the order of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from base.errors import InputError
from comm import ops
from comm.group import Group
from models.config import expected_shapes
from models.decoder import Decoder
from models.load import config_of, destinations, load_model
from tests.models.families import NAMES, run, save, wanted
from tests.models.table import DEFAULTS_ABOUT, TITLES, defaults_table, described
from tests.models.traces import expected, group_of_one, trace
from tests.running import RunRanks
from tp.shard import Dims, find_spec, plan_layout, slices_of
from weights.open import open_checkpoint

# Of these, 8 ranks can be made.
UP_TO_8 = ("llama", "llama-biases", "qwen2", "qwen3", "gptj")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's checkpoint, with transformers' logits for `tokens` beside it."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            torch.save(wanted(save(name, made[name])), made[name] / "wanted.pt")
        return made[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_one_rank(name: str, saved: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(saved(name))
    model = load_model(config_of(checkpoint), checkpoint, Group(0, 1), torch.float32)
    expected = torch.load(saved(name) / "wanted.pt")
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(model, slice(0, 1)), expected[:1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2", "gptj"])  # a block each
def test_some_tokens_of_some_texts(name: str, saved: Callable[[str], Path]) -> None:
    """The last layer does nothing for the others but their keys and values, which later tokens see."""
    checkpoint = open_checkpoint(saved(name))
    model = load_model(config_of(checkpoint), checkpoint, Group(0, 1), torch.float32)
    model.setup(2, 16)
    texts, positions = torch.randint(100, (2, 9)), torch.arange(9)
    every = model.all_logits(texts, positions).flatten(0, 1)
    model.setup(2, 16)
    rows, wanted = torch.tensor([0, 1]).repeat_interleave(8), torch.tensor([12, 3, 3, 7])
    found = model.extend(texts[:, :8].flatten(), positions[:8].repeat(2), rows, wanted)
    torch.testing.assert_close(found, every[[13, 3, 3, 7]], rtol=1e-4, atol=1e-4)
    found = model.decode(texts[:, 8], positions[8:].expand(2))
    torch.testing.assert_close(found, every[[8, 17]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sizes", "names"), [([2], NAMES), ([3, 4, 5, 6, 7, 8], UP_TO_8)])
def test_ranks(
    sizes: list[int], names: tuple[str, ...], saved: Callable[[str], Path], run_ranks: RunRanks
) -> None:
    folders = {name: str(saved(name)) for name in names}
    code, out, err = run_ranks("families", max(sizes), "shm", folders=folders, sizes=sizes)
    assert code == 0, err
    assert out.splitlines() == [f"{size} {name}" for size in sizes for name in names]


@pytest.fixture(scope="module")
def one() -> Iterator[Group]:
    with group_of_one() as group:
        yield group


@pytest.mark.parametrize("name", NAMES)
def test_steps_are_whole_graphs(name: str, saved: Callable[[str], Path], one: Group) -> None:
    """With their collectives in them, and the logits of the model as it is."""
    checkpoint = open_checkpoint(saved(name))
    model = load_model(config_of(checkpoint), checkpoint, one, torch.float32)
    assert trace(model) == [expected(model.config)] * 2


def test_the_table_lists_these_families() -> None:
    """docs/families.md is made by `python -m tests.models.table`; its figures vary with the machine."""
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    found = [row for row in rows if row[0] in NAMES]
    assert [tuple(row[: len(TITLES)]) for row in found] == [described(name) for name in NAMES]
    for row in found:
        _, *differences, graphs = row[len(TITLES) :]
        assert len(differences) == 4 and all(0 < float(cell) < 1e-3 for cell in differences), row
        assert graphs == "yes", row
    named = [row[0] for row in rows if len(row) > len(TITLES) and not row[0].startswith("-")]
    assert named == ["variant", *NAMES], "a family in the table that is not tested"


def test_the_defaults_of_keys_are_listed() -> None:
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    assert text.endswith(f"\n{DEFAULTS_ABOUT}\n{defaults_table()}\n")


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 16, 32, 64])
@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_its_ranks(name: str, size: int, saved: Callable[[str], Path]) -> None:
    """The sharding of any world, in one process: what ranks hold is the whole, each part once, but for
    what several need."""
    checkpoint = open_checkpoint(saved(name))
    config = config_of(checkpoint)
    shapes = expected_shapes(config)
    if size > config.num_heads:
        with pytest.raises(InputError, match=f"{size} ranks for {config.num_heads} query heads"):
            Decoder(config, Group(0, size))
        return
    covered = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in shapes.items()}
    for rank in range(size):
        with torch.device("meta"):
            model = Decoder(config, Group(rank, size))
        targets = destinations(model)
        assert targets.keys() == shapes.keys()
        for weight, shape in shapes.items():
            slices = slices_of(weight, shape, model.layout)
            assert targets[weight].shape == covered[weight][slices].shape
            covered[weight][slices] += 1
    for weight, count in covered.items():
        axis = find_spec(weight).axis
        if axis in ("q", "ffn", "expert", "vocab"):
            assert (count == 1).all(), weight
        elif axis == "kv":
            assert (count >= 1).all() and int(count.max()) <= -(-size // config.num_kv_heads) + 1, (
                weight
            )
        else:
            assert (count == size).all(), weight


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_one_collective_for_each_sum(
    name: str, saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention and MLP one after the other take a sum each, side by side one for both."""
    calls: list[str] = []

    def watch(collective: str) -> None:
        plain = getattr(ops, collective)

        def spy(*args: Any) -> Any:
            calls.append(collective)
            return plain(*args)

        monkeypatch.setattr(ops, collective, spy)

    for collective in ("all_reduce", "all_reduce_add_rms_norm"):
        watch(collective)
    checkpoint = open_checkpoint(saved(name))
    config = config_of(checkpoint)
    model = load_model(config, checkpoint, Group(0, 1), torch.float32)
    model.setup(1, 8)
    model(torch.zeros(1, 1, dtype=torch.int64), torch.arange(1))
    if name == "gptj":
        assert calls == ["all_reduce"] * config.num_layers
    else:
        assert calls.count("all_reduce_add_rms_norm") == 2 * config.num_layers


@pytest.mark.parametrize(("heads", "kv_heads"), [(64, 8), (32, 32), (64, 4), (71, 1), (40, 10)])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_no_rank_has_more_than_one_head_too_many(heads: int, kv_heads: int, size: int) -> None:
    if size > heads:
        pytest.skip("more ranks than heads are refused")
    dims = Dims(heads, kv_heads, head_dim=8, ffn_dim=1000, vocab_size=999)
    layouts = [plan_layout(dims, rank, size) for rank in range(size)]
    counts = [layout.heads.num_q for layout in layouts]
    assert sum(counts) == heads and max(counts) - min(counts) <= 1
    widths = [layout.ffn_stop - layout.ffn_start for layout in layouts]
    assert sum(widths) == 1000 and min(widths) > 0
