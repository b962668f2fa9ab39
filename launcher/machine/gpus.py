"""NVIDIA GPUs: their place on the PCI bus, the cpus near them, and which of them CUDA will list.

They are read from sysfs and the driver's files in proc. CUDA is not loaded: that takes a second and
creates a context in the wrong process.

What is not here: other vendors, slices of a GPU (MIG), memory sizes, links between GPUs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from launcher.machine.sysfs import names, read, read_cpus, read_int

_DISPLAY_CLASSES = ("0x0300", "0x0302")  # VGA and 3D controllers


@dataclass(frozen=True)
class Gpu:
    """A visible GPU. `index` is CUDA's index with CUDA_DEVICE_ORDER=PCI_BUS_ID.

    `node` is the memory node it is attached to (None: unknown); `cpus` are the usable cpus near it
    (empty: unknown).
    """

    index: int
    pci: str
    node: int | None
    cpus: tuple[int, ...] = ()
    uuid: str = ""


def read_gpus(
    base: str,
    allowed_cpus: Iterable[int],
    visible: str | None,
    devices: str | None,
    notes: list[str],
) -> tuple[Gpu, ...]:
    """The GPUs below `base`, in CUDA's order; `visible` is the value of CUDA_VISIBLE_DEVICES.

    `devices` is the folder of the device files (None: a recorded tree has none). A container sees
    every PCI device, but only the device files of its own GPUs.
    """
    allowed = set(allowed_cpus)
    found: list[Gpu] = []
    hidden: list[str] = []
    for pci in sorted(names(f"{base}/sys/bus/pci/devices"), key=_pci_order):
        if not _is_nvidia_gpu(base, pci):
            continue
        device = f"{base}/sys/bus/pci/devices/{pci}"
        information = read(f"{base}/proc/driver/nvidia/gpus/{pci}/information") or ""
        minor = re.search(r"Device Minor:\s*([0-9]{1,5})", information)
        if devices is not None and not _has_device_file(devices, minor and minor[1]):
            hidden.append(pci)
            continue
        node = read_int(f"{device}/numa_node")
        near = read_cpus(f"{device}/local_cpus", f"{device}/local_cpulist") or ()
        uuid = re.search(r"GPU UUID:\s*(\S+)", information)
        found.append(
            Gpu(
                len(found),
                pci,
                None if node is None or node < 0 else node,
                tuple(cpu for cpu in near if cpu in allowed),
                uuid[1] if uuid else "",
            )
        )
    if hidden:
        notes.append(f"GPUs {', '.join(hidden)} are not used: {devices} has no device file for them")
    if visible is None:
        return tuple(found)
    chosen = _visible(found, visible, notes)
    return tuple(Gpu(index, gpu.pci, gpu.node, gpu.cpus, gpu.uuid) for index, gpu in enumerate(chosen))


def gpu_memory_nodes(base: str) -> frozenset[int]:
    """Memory nodes that belong to a GPU (POWER9, Grace Hopper): they must not be used as host
    memory."""
    folder = f"{base}/proc/driver/nvidia/gpus"
    statuses = (read(f"{folder}/{pci}/numa_status") or "" for pci in names(folder))
    matches = (re.search(r"^Node:\s*([0-9]{1,5})$", text, re.MULTILINE) for text in statuses)
    return frozenset(int(match[1]) for match in matches if match)


def _pci_order(name: str) -> tuple[list[int], str]:
    """A key that sorts PCI addresses by number: a domain of five digits comes after one of four."""
    parts = re.split("[:.]", name)
    hexadecimal = all(re.fullmatch("[0-9a-fA-F]{1,8}", part) for part in parts)
    return [int(part, 16) for part in parts] if hexadecimal else [], name


def _is_nvidia_gpu(base: str, pci: str) -> bool:
    device = f"{base}/sys/bus/pci/devices/{pci}"
    vendor = read(f"{device}/vendor")
    if vendor is None:  # some recorded trees lack it: then ask the driver's files
        nvidia = os.path.isdir(f"{base}/proc/driver/nvidia/gpus/{pci}")
    else:
        nvidia = vendor == "0x10de"
    return nvidia and (read(f"{device}/class") or "").startswith(_DISPLAY_CLASSES)


def _has_device_file(devices: str, minor: str | None) -> bool:
    # nvidiactl exists whenever there is a driver that CUDA can use.
    return os.path.exists(f"{devices}/nvidiactl") and (
        minor is None or os.path.exists(f"{devices}/nvidia{minor}")
    )


def _visible(gpus: list[Gpu], visible: str, notes: list[str]) -> list[Gpu]:
    """The GPUs that CUDA lists for this CUDA_VISIBLE_DEVICES: those up to the first entry that names no
    GPU; none at all if an entry is repeated."""
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in visible.split(",")):
        number = re.match(r"\+?([0-9]{1,9})", entry)
        if number:
            matching = [gpu for gpu in gpus if gpu.index == int(number[1])]
        else:
            matching = [gpu for gpu in gpus if entry.startswith("GPU-") and gpu.uuid.startswith(entry)]
        if len(matching) != 1:
            if entry not in ("", "-1", "NoDevFiles"):
                notes.append(
                    f"CUDA_VISIBLE_DEVICES={visible}: {entry!r} names none of the {len(gpus)} GPUs "
                    "here, so it and the entries after it are not visible"
                )
            return chosen
        if matching[0] in chosen:
            notes.append(
                f"CUDA_VISIBLE_DEVICES={visible} names {entry!r} twice: then CUDA lists no GPU"
            )
            return []
        chosen += matching
    return chosen
