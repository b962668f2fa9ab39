"""Show the plan to people and to programs.

`plan_to_json` is the schema that programs may rely on (docs/plan-json.md). People at a terminal get a
drawing: each socket is a frame, each core a block in the color of its rank; elsewhere the same facts
are plain lines. rich is imported only to draw: the rest of `launcher` works without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from base.units import format_bytes
from launcher.fit import Fit
from launcher.machine.topology import Core, Node, Topology, format_cpu_list
from launcher.plan import LaunchPlan, RankPlan

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_COLORS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta")


def plan_to_json(topology: Topology, plan: LaunchPlan, fits: Sequence[Fit] = ()) -> dict[str, Any]:
    """The plan for programs; `cpus` are lists of logical cpu numbers, memory is in bytes."""
    machine = asdict(topology)
    del machine["notes"]  # `reasons` includes them
    data: dict[str, Any] = {
        "topology": machine,
        "ranks": [asdict(rank) for rank in plan.ranks],
        "backend": plan.backend,
        "bound": plan.bind_cores,
        "reserved_cpus": list(plan.reserved_cpus),
        "reasons": list(plan.reasons),
    }
    if fits:
        data["memory"] = [asdict(fit) | {"fits": fit.fits} for fit in fits]
    return data


def describe_rank(rank: RankPlan, bound: bool) -> str:
    """A line such as "4 threads, bound to cpus 0-3, memory bind 0"."""
    where = f"{'bound to' if bound else 'free on'} cpus {format_cpu_list(rank.cpus)}"
    device = "" if rank.device == "cpu" else f"{rank.device}, "
    threads = f"{rank.num_threads} thread{'s' * (rank.num_threads != 1)}"
    return f"{device}{threads}, {where}, {describe_memory(rank)}"


def describe_memory(rank: RankPlan) -> str:
    if rank.memory_policy == "none":
        return "memory by first touch"
    if rank.memory_policy == "preferred":
        nodes = format_cpu_list(rank.preferred_nodes)
        rest = format_cpu_list(set(rank.nodes) - set(rank.preferred_nodes))
        return f"memory preferred {nodes}" + (f", then {rest}" if rest else "")
    return f"memory {rank.memory_policy} {format_cpu_list(rank.nodes)}"


@dataclass(frozen=True)
class _Place:
    """What is drawn as one place: a memory node, or several nodes that share their cpus."""

    nodes: tuple[int, ...]
    socket: int | None
    cpus: tuple[int, ...]
    memory_bytes: int
    kind: str
    near: int | None
    cores: tuple[Core, ...]


def _places(topology: Topology) -> list[_Place]:
    """The nodes; those that list the same cpus are one place. Last, as "not allowed", come the nodes
    whose cores may be used but not their memory: the topology lists only their cores."""
    shared: dict[tuple[object, ...], list[Node]] = {}
    for node in topology.nodes:
        shared.setdefault((node.kind, node.cpus) if node.cpus else (node.id,), []).append(node)
    places = [
        _Place(
            tuple(node.id for node in nodes),
            nodes[0].socket,
            nodes[0].cpus,
            sum(node.memory_bytes for node in nodes),
            nodes[0].kind,
            nodes[0].near,
            tuple(core for core in topology.cores if set(core.cpus) & set(nodes[0].cpus)),
        )
        for nodes in shared.values()
    ]
    listed = {node.id for node in topology.nodes}
    closed: dict[int, list[Core]] = {}
    for core in topology.cores:
        if core.node not in listed:
            closed.setdefault(core.node, []).append(core)
    for number, cores in closed.items():
        cpus = tuple(sorted(cpu for core in cores for cpu in core.cpus))
        places.append(_Place((number,), cores[0].socket, cpus, 0, "not allowed", None, tuple(cores)))
    return places


def _frames(topology: Topology) -> list[tuple[str, list[_Place]]]:
    """The title and places of each socket. Sockets that share a place are one frame; places in no
    socket come last, with the title ""."""
    frames: list[tuple[list[int], list[_Place]]] = []
    loose = _places(topology)
    for socket in topology.sockets:
        own = [
            place
            for place in _places(topology)
            if place.socket == socket.id
            or (place.socket is None and set(place.nodes) & set(socket.nodes))
        ]
        loose = [place for place in loose if place not in own]
        shared = [frame for frame in frames if any(place in own for place in frame[1])]
        if shared:
            shared[0][0].append(socket.id)
            shared[0][1].extend(place for place in own if place not in shared[0][1])
        else:
            frames.append(([socket.id], own))
    named = [(f"socket{'s' * (len(ids) > 1)} {format_cpu_list(ids)}", places) for ids, places in frames]
    return [*named, ("", loose)] if loose else named


def _name(place: _Place) -> str:
    return f"node{'s' * (len(place.nodes) > 1)} {format_cpu_list(place.nodes)}"


def _place_line(place: _Place) -> str:
    cores = len(place.cores)
    what = f"{cores} cores, cpus {format_cpu_list(place.cpus)}" if place.cpus else "no cpus"
    if place.near is not None:
        what += f", near node {place.near}"
    return f"{_name(place)}  {format_bytes(place.memory_bytes):>9}  {place.kind:<9}  {what}"


def render_plain(topology: Topology, plan: LaunchPlan, fits: Sequence[Fit] = ()) -> str:
    """Plain lines: the machine, the ranks on it, whether they fit, and the reasons."""
    lines = ["Machine"]
    for title, places in _frames(topology):
        lines += [f"  {title}"] if title else []
        lines += [f"  {'  ' * bool(title)}{_place_line(place)}" for place in places]
    for gpu in topology.gpus:
        where = "node unknown" if gpu.node is None else f"node {gpu.node}"
        lines.append(f"  gpu {gpu.index}  {gpu.pci}  {where}")
    lines.append(f"Ranks ({plan.backend})")
    lines += [f"  rank {rank.rank}  {describe_rank(rank, plan.bind_cores)}" for rank in plan.ranks]
    if fits:
        lines.append("Memory")
        lines += [f"  rank {fit.rank}  {_describe_fit(fit)}" for fit in fits]
    lines.append("Why")
    lines += [f"  - {reason}" for reason in plan.reasons]
    return "\n".join(lines)


def _describe_fit(fit: Fit) -> str:
    parts = " + ".join(f"{name} {format_bytes(size)}" for name, size in fit.needs.items())
    verdict = "fits" if fit.fits else "DOES NOT FIT"
    return (
        f"{parts} = {format_bytes(fit.needed_bytes)} of {format_bytes(fit.available_bytes)}: {verdict}"
    )


def draw(topology: Topology, plan: LaunchPlan, fits: Sequence[Fit] = ()) -> None:
    """Draw the plan on stdout, which is a terminal."""
    from rich.columns import Columns
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    owner = {} if not plan.bind_cores else {c: r.rank for r in plan.ranks for c in r.cpus}
    console = Console()
    frames: list[RenderableType] = []
    for title, places in _frames(topology):
        body = Text("\n").join(_place_picture(place, owner, plan) for place in places)
        frames.append(Panel(body, title=title or "no socket", border_style="dim"))
    console.print(Columns(frames))
    for gpu in topology.gpus:
        rank = next((r.rank for r in plan.ranks if r.device == f"cuda:{gpu.index}"), None)
        style = "dim" if rank is None else _COLORS[rank % len(_COLORS)]
        where = "" if gpu.node is None else f"  node {gpu.node}"
        console.print(Text(f"  ▣ gpu {gpu.index}  {gpu.pci}{where}", style=style))

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("rank", "device", "threads", "cpus", "memory", *(["needs", "has"] if fits else [])):
        table.add_column(title)
    for place in plan.ranks:
        row: list[RenderableType] = [
            Text(f"■ {place.rank}", style=_COLORS[place.rank % len(_COLORS)]),
            place.device,
            str(place.num_threads),
            format_cpu_list(place.cpus) + ("" if plan.bind_cores else " (not bound)"),
            describe_memory(place).removeprefix("memory "),
        ]
        if fits:
            fit = fits[place.rank]
            style = "green" if fit.fits else "bold red"
            row += [
                Text(format_bytes(fit.needed_bytes), style=style),
                format_bytes(fit.available_bytes),
            ]
        table.add_row(*row)
    console.print(table)
    if fits:
        console.print(Text(f"  rank 0: {_describe_fit(fits[0])}", style="dim"))
    for reason in plan.reasons:
        console.print(Text(f"  · {reason}", style="dim"))


def _place_picture(place: _Place, owner: dict[int, int], plan: LaunchPlan) -> Text:
    """The place's name, and a block for each of its cores in the color of the core's rank."""
    from rich.text import Text

    picture = Text(f"{_name(place)}  {format_bytes(place.memory_bytes)}  {place.kind}\n")
    for core in place.cores:
        ranks = [owner[cpu] for cpu in core.cpus if cpu in owner]
        if ranks:
            picture.append("■", style=_COLORS[ranks[0] % len(_COLORS)])
        elif set(core.cpus) & set(plan.reserved_cpus):
            picture.append("r", style="dim")
        else:
            picture.append("□", style="dim")
    if not place.cpus:
        picture.append("memory only", style="dim")
    return picture
