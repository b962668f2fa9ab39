"""What is here: sockets, cores, memory nodes, GPUs, limits, read from sysfs and proc."""
