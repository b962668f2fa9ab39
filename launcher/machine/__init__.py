"""What this machine has: sockets, cores, memory nodes, GPUs, limits, read from sysfs and proc."""
