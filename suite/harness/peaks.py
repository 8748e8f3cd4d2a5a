"""What devices can do at most, for the share of it that a training reaches (MFU, HFU).

Dense matrix products in TFLOPS (10^12 operations per second, a multiply-add is two) at the boost clock
and with fp32 accumulation, from the manufacturers' data sheets; where these give numbers with
structured sparsity, half of them. A power limit or another clock than the data sheet's is not seen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """TFLOPS of one device by what is multiplied; None where the device has no such units.

    `name` is a regular expression that is searched for in the name that the driver gives.
    """

    name: str
    bf16: float | None
    fp16: float | None
    tf32: float | None
    fp32: float
    source: str


# The first that is found counts: narrower names come first.
PEAKS = (
    Peak(r"V100S", None, 130, None, 16.4, "NVIDIA V100S data sheet, 2019"),
    Peak(r"V100.*PCIE", None, 112, None, 14, "NVIDIA V100 data sheet, 2020"),
    Peak(r"V100", None, 125, None, 15.7, "NVIDIA V100 data sheet, 2020 (SXM2)"),
    Peak(r"\bT4\b", None, 65, None, 8.1, "NVIDIA T4 data sheet, 2019"),
    Peak(r"A100", 312, 312, 156, 19.5, "NVIDIA A100 data sheet, 2021"),
    Peak(r"\bA10\b", 125, 125, 62.5, 31.2, "NVIDIA A10 data sheet, 2021"),
    Peak(r"\bA30\b", 165, 165, 82, 10.3, "NVIDIA A30 data sheet, 2021"),
    Peak(r"\bA40\b", 149.7, 149.7, 74.8, 37.4, "NVIDIA A40 data sheet, 2021"),
    Peak(r"\bL4\b", 121, 121, 60, 30.3, "NVIDIA L4 data sheet, 2023"),
    Peak(r"L40S", 362, 362, 183, 91.6, "NVIDIA L40S data sheet, 2023"),
    Peak(r"\bL40\b", 181, 181, 90.5, 90.5, "NVIDIA L40 data sheet, 2022"),
    Peak(r"GH200", 989, 989, 494, 67, "NVIDIA GH200 data sheet, 2024"),
    Peak(r"H[12]00.*NVL", 835, 835, 417, 60, "NVIDIA H100 and H200 data sheets, 2024 (NVL)"),
    Peak(r"H100.*PCIe", 756, 756, 378, 51, "NVIDIA H100 data sheet, 2023 (PCIe)"),
    Peak(r"H[12]00", 989, 989, 494, 67, "NVIDIA H100 and H200 data sheets, 2024 (SXM)"),
    Peak(r"GB200", 2500, 2500, 1250, 80, "NVIDIA GB200 data sheet, 2025"),
    Peak(r"B200", 2250, 2250, 1125, 75, "NVIDIA HGX data sheet, 2025 (B200)"),
    Peak(r"MI300X", 1307, 1307, 654, 163, "AMD MI300X data sheet, 2023"),
)


def peak_tflops(device_name: str, precision: str, tf32: bool) -> float | None:
    """The peak for matrix products of that `precision` (`fp32`, `bf16` or `fp16`), with `tf32` for fp32
    ones that may round their operands; None for a device that is not in the table."""
    for peak in PEAKS:
        if re.search(peak.name, device_name):
            units = "tf32" if precision == "fp32" and tf32 and peak.tf32 else precision
            return getattr(peak, units)
    return None
