"""Reads what hwloc's lstopo says of a recorded machine: the oracle of test_topology.

Two forms: the indented text (`.console`) and XML. Sets of cpus and nodes are of the system's own
numbers. A NUMANode belongs to the object it is indented below, a MemCache in between aside.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Thing:
    """An object of the listing; `number` is the system's (P#), `subtype` such as HBM or Cluster."""

    kind: str
    subtype: str
    number: int | None
    parents: list[Thing]
    cpus: set[int] = field(default_factory=set)
    efficiency: int | None = None


@dataclass(frozen=True)
class Listing:
    """What a machine is, by hwloc. `nodes` gives the cpus below the node's parent, and the package."""

    packages: frozenset[int]
    nodes: dict[int, tuple[frozenset[int], int | None]]
    node_kinds: dict[int, str]
    cores: frozenset[frozenset[int]]
    package_of: dict[int, int | None]
    l3: frozenset[frozenset[int]]
    allowed: frozenset[int]
    efficiency: dict[int, int]


def read_listing(path: Path) -> Listing:
    things = _from_xml(path) if path.suffix == ".xml" else _from_text(path)
    nodes: dict[int, tuple[frozenset[int], int | None]] = {}
    for node in _of(things, "NUMANode"):
        parents = [parent for parent in node.parents if parent.kind != "MemCache"]
        package = [parent.number for parent in parents if parent.kind == "Package"]
        assert node.number is not None and node.number not in nodes
        nodes[node.number] = (frozenset(parents[-1].cpus), package[0] if package else None)
    packages = [thing.number for thing in _of(things, "Package")]
    assert len(set(packages)) == len(packages)
    units = _of(things, "PU")
    return Listing(
        frozenset(number for number in packages if number is not None),
        nodes,
        {node.number: node.subtype for node in _of(things, "NUMANode") if node.number is not None},
        frozenset(frozenset(core.cpus) for core in _of(things, "Core")),
        {
            cpu: next((p.number for p in unit.parents if p.kind == "Package"), None)
            for unit in units
            for cpu in unit.cpus
        },
        frozenset(frozenset(cache.cpus) for cache in _of(things, "L3Cache") if cache.cpus),
        frozenset(cpu for unit in units for cpu in unit.cpus),
        {
            cpu: core.efficiency
            for core in _of(things, "Core")
            for cpu in core.cpus
            if core.efficiency is not None
        },
    )


def _of(things: list[Thing], kind: str) -> list[Thing]:
    return [thing for thing in things if thing.kind == kind]


def _from_text(path: Path) -> list[Thing]:
    things: list[Thing] = []
    stack: list[tuple[int, Thing]] = []
    for line in path.read_text().splitlines():
        if line.startswith("depth"):  # the tree ends, its statistics begin
            break
        match = re.match(r"( *)(\w+)(?:\[[^\]]*\])?(?:\(([^)]*)\))?", line)
        assert match, line
        while stack and stack[-1][0] >= len(match[1]):
            stack.pop()
        number = re.search(r"\(P#(\d+)", line)
        thing = Thing(
            match[2], match[3] or "", int(number[1]) if number else None, [t for _, t in stack]
        )
        kind = re.search(r"cpukind=(\d+)", line)
        thing.efficiency = int(kind[1]) if kind else None
        stack.append((len(match[1]), thing))
        things.append(thing)
        if thing.kind == "PU":
            for _, parent in stack:
                assert thing.number is not None
                parent.cpus.add(thing.number)
    return things


def _from_xml(path: Path) -> list[Thing]:
    things: list[Thing] = []

    def visit(element: ElementTree.Element, parents: list[Thing]) -> None:
        if element.tag == "object":
            number = element.get("os_index")
            cpus = _mask(element.get("cpuset", "0x0"))
            subtype = element.get("subtype", "")
            thing = Thing(element.get("type", ""), subtype, int(number or -1), parents, cpus)
            thing.number = int(number) if number is not None else None
            things.append(thing)
            parents = [*parents, thing]
        for child in element:
            visit(child, parents)

    visit(ElementTree.parse(path).getroot(), [])
    return things


def _mask(text: str) -> set[int]:
    """ "0x1,0x00000005" -> {0, 2, 32}"""
    value = 0
    for word in text.split(","):
        value = value << 32 | int(word, 16)
    return {bit for bit in range(value.bit_length()) if value >> bit & 1}
