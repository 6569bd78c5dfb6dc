#!/usr/bin/env python3
"""Reads the CSV of `ncu --section LaunchStats --section Occupancy --csv` and prints one line for
every kernel: its largest launch's block, registers, shared memory and theoretical occupancy."""

import csv
import re
import sys

WANTED = {
    "Block Size": "threads",
    "Registers Per Thread": "registers",
    "Static Shared Memory Per Block": "static",
    "Dynamic Shared Memory Per Block": "dynamic",
    "Theoretical Occupancy": "occupancy",
    "Grid Size": "blocks",
}
TO_BYTES = {"byte/block": 1, "Kbyte/block": 1000, "Mbyte/block": 1000000}


def main():
    lines = [line for line in sys.stdin if line.startswith('"')]
    launches = {}
    for row in csv.DictReader(lines):
        if row["Metric Name"] in WANTED:
            value = float(row["Metric Value"].replace(",", "")) * TO_BYTES.get(row["Metric Unit"], 1)
            launch = launches.setdefault(row["ID"], {"name": row["Kernel Name"]})
            launch[WANTED[row["Metric Name"]]] = value
    kernels = {}
    for launch in launches.values():
        name = re.sub(r"^void |ssm::kernels::cuda::|\(.*", "", launch["name"])[:90]
        key = (name, launch["threads"], launch["registers"], launch["static"] + launch["dynamic"])
        if launch["blocks"] > kernels.get(key, {"blocks": 0})["blocks"]:
            kernels[key] = launch
    if not kernels:
        sys.exit(1)
    print(f"{'threads':>7} {'regs':>5} {'shared':>8} {'occ %':>6}  kernel")
    for (name, threads, registers, shared), launch in sorted(kernels.items()):
        print(f"{threads:7.0f} {registers:5.0f} {shared:8.0f} {launch['occupancy']:6.1f}  {name}")


if __name__ == "__main__":
    main()
