"""The report of `doctor` for people: rows of strings (pure), as plain text or drawn with rich."""

from __future__ import annotations

from typing import Any

from launcher.doctor.selfcheck import placement_of
from launcher.machine.topology import format_cpu_list
from launcher.placement import render_placement

Section = tuple[str, list[tuple[str, str]]]


def rows(report: dict[str, Any]) -> list[Section]:
    """The sections that have lines: a title, and (label, text) of each line."""
    sections = [
        ("Machine", _machine_rows(report)),
        ("Limits", _limit_rows(report)),
        ("Software", _software_rows(report)),
        ("Optional packages, none needed", _backend_rows(report)),
        ("Will use, with --bind-cores-to-rank", _use_rows(report["will_use"])),
        ("Tried", [("", render_placement(placement_of(p))) for p in report["placement"]]),
        ("To change", _change_rows(report["to_change"])),
        ("Could not be found out", [("", text) for text in report["not_told"]]),
    ]
    return [(title, lines) for title, lines in sections if lines]


def render(report: dict[str, Any]) -> str:
    """The report as plain text."""
    lines = []
    for title, pairs in rows(report):
        lines.append(title)
        lines.extend(f"  {label:<13} {text}" if label else f"  {text}" for label, text in pairs)
    return "\n".join(lines)


def draw(report: dict[str, Any]) -> None:
    """Print the report in color, wrapped to the terminal's width."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for title, pairs in rows(report):
        console.print(Text(title, style="bold"))
        table = Table.grid(padding=(0, 2))
        table.add_column(min_width=15, no_wrap=True)
        table.add_column()
        for label, text in pairs:
            style = {"STOPS": "bold red", "WARNING": "yellow", "->": "green"}.get(label, "")
            table.add_row(Text(f"  {label}", style=style or "cyan"), Text(text, style=style))
        console.print(table)


def _machine_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    machine, cpu = report["machine"], report["cpu"]
    has = " ".join(name for name, there in cpu.items() if there)
    kinds = ", ".join(f"{count} {kind}" for kind, count in machine["kinds"].items())
    cores = _count(machine["cores"], "core") + (f" ({kinds})" if kinds else "")
    lines = [
        (
            "processor",
            f"{machine['model'] or machine['arch'] or 'unknown'}; {has or 'no vector units known'}",
        ),
        (
            "cores",
            f"{_count(machine['sockets'], 'socket')}, {cores}, "
            f"{_count(machine['threads'], 'hardware thread')} allowed",
        ),
    ]
    for node in machine["nodes"]:
        cpus = f"cpus {format_cpu_list(node['cpus'])}" if node["cpus"] else "no cpus"
        lines.append((f"node {node['id']}", f"{_size(node['memory_bytes'])} {node['kind']}, {cpus}"))
    for gpu in machine["gpus"]:
        node = "node unknown" if gpu["node"] is None else f"node {gpu['node']}"
        lines.append((f"gpu {gpu['index']}", f"{gpu['pci']}, {node}"))
    if not machine["gpus"]:
        lines.append(("gpus", "none"))
    return lines + [("note", note) for note in machine["notes"]]


def _limit_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    limits, kernel = report["limits"], report["kernel"]
    lines = []
    if "shm_bytes" in limits:
        shm = "none"
        if limits["shm_bytes"] is not None:
            shm = f"{_size(limits['shm_free_bytes'])} free of {_size(limits['shm_bytes'])}"
        memory = "no cgroup limit"
        if limits["memory_limit_bytes"] is not None:
            memory = f"the cgroup's limit is {_size(limits['memory_limit_bytes'])}"
            if limits["memory_used_bytes"] is not None:
                memory += f", {_size(limits['memory_used_bytes'])} used"
        locked = limits["memlock_bytes"]
        quota = limits["cpu_quota"]
        lines = [
            ("/dev/shm", shm),
            ("memory", f"{memory}; may lock {'any' if locked is None else _size(locked)}"),
            ("cpu quota", "none" if quota is None else f"{quota:g} cpus"),
            ("open files", "no limit" if limits["open_files"] is None else str(limits["open_files"])),
        ]
    refused = f"cannot be set: {limits['memory_policy_refusal']}"
    policy = {True: "can be set", False: refused, None: "unknown"}[limits["memory_policy"]]
    lines.append(("memory policy", policy))
    if kernel:
        balancing = {True: "on", False: "off", None: "unavailable"}[kernel["numa_balancing"]]
        governors = ", ".join(kernel["governors"]) or "unknown"
        lines.append(
            (
                "kernel",
                f"NUMA balancing {balancing}; huge pages {kernel['huge_pages'] or 'unknown'}; "
                f"governor {governors}; swap used {_size(kernel['swap_used_bytes'])}",
            )
        )
    return lines


def _software_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    compiler, torch = report["compiler"], report["torch"]
    lines = []
    if compiler:
        state = "compiles" if compiler["works"] else f"does not work: {compiler['error']}"
        headers = "Python's headers found" if compiler["python_headers"] else "no headers of Python"
        lines.append(("compiler", f"{compiler['version'] or compiler['path']}: {state}; {headers}"))
    if torch is None:
        return [*lines, ("torch", "no working torch, see below")]
    libraries = [name for name, key in (("MKL", "mkl"), ("oneDNN", "onednn")) if torch[key]]
    openmp = " and ".join(torch["openmp"] or ()) or "none"
    words = [f"kernels for {torch['cpu_capability']}", *libraries, f"OpenMP is {openmp}"]
    lines.append(("torch", f"{torch['version']}; {', '.join(words)}"))
    built = torch["extension"] is not None
    lines.append(("Yoke", "operators are built" if built else "operators are compiled at first use"))
    devices = ", ".join(
        f"{device['name']} ({_size(device['memory_bytes'])}, sm {device['capability']})"
        for device in torch["cuda_devices"] or ()
    )
    if torch["cuda"] is None:
        lines.append(("CUDA", "this torch is built without it"))
    else:
        nccl = torch["nccl"] or "none"
        lines.append(("CUDA", f"{torch['cuda']}, NCCL {nccl}; torch sees {devices or 'no device'}"))
    return lines


def _backend_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    short = {"intel_extension_for_pytorch": "IPEX", "oneccl_bindings_for_pytorch": "oneCCL"}
    lines = []
    for backend in report["backends"]:
        state = "not installed"
        if backend["found"]:
            fit = {True: "fits", False: "does NOT fit", None: "not checked"}[backend["fits"]]
            state = f"{backend['version']}, {fit}"
        lines.append((short.get(backend["name"], backend["name"]), f"{state}; {backend['note']}"))
    return lines


def _use_rows(use: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [
        (
            f"rank {rank['rank']}",
            f"{rank['device']}: {_count(rank['num_threads'], 'thread')} on cpus "
            f"{format_cpu_list(rank['cpus'])}, node {format_cpu_list(rank['nodes'])}",
        )
        for rank in use["ranks"]
    ]
    lines.append(("transport", f"{use['transport']}: {use['transport_why']}"))
    return [*lines, ("compute", use["compute"])]


def _change_rows(changes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    lines = []
    for change in changes:
        lines.append(("STOPS" if change["stops"] else "WARNING", change["problem"]))
        lines.append(("->", change["action"]))
    return lines or [("nothing", "this machine is ready")]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
